"""APGD on the embedding distance: ours beside the published way of writing it and beside torchattacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from unittest import mock

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.attacks import Linf, PerImageLoss, Threat, apgd
from fasttrain.attacks.evaluation import loss_and_gradient, loss_only
from fasttrain.attacks.losses import squared_distance
from fasttrain.benchmarks.ceilings import PRODUCT, ceilings
from fasttrain.benchmarks.network import NetworkConfig, Setting, channels_last, plain, setting
from fasttrain.benchmarks.timing import Comparison, Report, StepTiming, Stopwatch, alternate_steps, marked, quantity
from fasttrain.models import Encoder
from fasttrain.models.folding import fold_batchnorm

THREAT = Linf(8 / 255)
UNIT = "forward, PyTorch"
LOWER = 0.01
"The share by which an attack's final loss may be below another's and still count as no lower."


class AttackBenchConfig(NetworkConfig):
    """APGD on how far it moves the embedding of each image, within 8/255 in L∞."""

    iterations: int = Field(10, ge=1)
    "steps of APGD"


def compare_attacks(config: AttackBenchConfig, rounds: int) -> Iterator[Report]:
    """Time and final loss of the same attack, by ours in full, by ours on the plain network, by the published way.

    The unit F is one forward of the plain network (contiguous, fp32, PyTorch's own BatchNorm, evaluation mode). All
    start at the same points, others in each round, raise the distance from the same embeddings, and are judged by that
    network's loss over all rounds. Yields after every round.
    """
    place = setting(config)
    reference, batch = plain(place.encoder).eval(), place.batch(1)
    fast, images = fold_batchnorm(channels_last(place.encoder)), place.batch(1, torch.channels_last).images[0]
    with torch.no_grad():
        targets = reference(batch.images[0]).features
    found: dict[str, dict[int, Tensor]] = {}
    starts = Starts(batch.images[0])

    def distance(encoder: Encoder) -> PerImageLoss:
        return lambda x: squared_distance(encoder(x).features, targets)

    def attack(name: str, run: Callable[[Threat], Tensor], autocast: bool = False) -> None:
        found[name] = {}

        def step(stopwatch: Stopwatch) -> None:
            with cast(place, autocast):
                found[name][starts.round] = run(starts.threat)
            stopwatch.mark("attack")

        contestants[name] = step

    ours, count = f"ours ({fast_form(place)})", config.iterations
    contestants = passes(UNIT, distance(reference), batch.images[0], place, autocast=False)
    contestants |= passes(f"forward, {ours}", distance(fast), images, place, autocast=True)
    attack(f"APGD-{count}, {ours}", lambda threat: apgd(threat, count)(distance(fast), images), autocast=True)
    plainly = distance(reference), batch.images[0]
    attack(f"APGD-{count}, ours on the plain network", lambda threat: apgd(threat, count)(*plainly))
    attack(
        f"APGD-{count}, published code",
        lambda threat: published_apgd(*plainly, threat.start(batch.images[0], batch.index), threat.eps, count),
    )
    if (rival := torchattacks_apgd(reference, batch.images[0], targets, count)) is not None:
        attack(f"APGD-{count}, torchattacks", lambda _: rival(starts.uniform))

    limit = ceilings(place.autocast or torch.float32, place.device)
    work = flops(distance(reference), batch.images[0], contestants, count)
    product = {PRODUCT: marked(limit.contestants[PRODUCT])}
    first, plainly_ours, *_ = found
    for timings, refusals in alternate_steps(
        contestants | product,
        rounds,
        place.steps,
        place.device,
        memory=True,
        needed={UNIT, PRODUCT, first},
        before_round=starts.draw,
    ):
        product_rate = limit.work[PRODUCT].flops / timings.pop(PRODUCT).seconds
        losses = {
            name: torch.cat([loss_only(distance(reference), x) for x in rounds.values()])
            for name, rounds in found.items()
            if name in timings
        }
        others = losses.keys() - {first, plainly_ours}
        comparisons = [no_lower(first, other, losses) for other in found if other in others]
        yield _report(config, place, timings, refusals, losses, comparisons, work, product_rate)


def _report(
    config: AttackBenchConfig,
    place: Setting,
    timings: Mapping[str, StepTiming],
    refusals: Mapping[str, str],
    losses: Mapping[str, Tensor],
    comparisons: list[Comparison],
    work: Mapping[str, int],
    product_rate: float,
) -> Report:
    lines = [
        f"{len(place.images) // 2} images of {config.size} pixels, {config.model.arch}, width {config.model.width:g}; "
        f"a large matrix product of this run: {quantity(product_rate, 'FLOP/s')} in {place.precision}\n",
        "| what | in forwards F | least to greatest | by CPU time | ms, median "
        "| of the product's rate | peak MiB | final loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    forward = timings[UNIT].seconds
    for name, timing in timings.items():
        least, greatest = min(timing.rounds) / forward, max(timing.rounds) / forward
        loss = f"{losses[name].mean().item():.4g}" if name in losses else ""
        memory = "" if timing.memory is None else f"{timing.memory / 2**20:,.0f}"
        lines.append(
            f"| {name} | {timing.seconds / forward:.2f} | {least:.2f} to {greatest:.2f} "
            f"| {ratio(timing.cpu_over(timings[UNIT]))} | {1000 * timing.seconds:,.1f} "
            f"| {work[name] / timing.seconds / product_rate:.0%} | {memory} | {loss} |"
        )
    lines += ["", *(f"- {comparison.sentence(timings)}" for comparison in comparisons)]
    lines += [f"- {name} does not run: {reason}" for name, reason in refusals.items()]
    rows = [timing.row() | {"flops": work[name]} for name, timing in timings.items()]
    for row in rows:
        if row["name"] in losses:
            row["final_loss"] = losses[row["name"]].mean().item()
    in_forwards = {name: timing.seconds / forward for name, timing in timings.items()}
    return Report("\n".join(lines), rows, in_forwards, "forwards F of the plain network")


def flops(loss: PerImageLoss, images: Tensor, contestants: Iterable[str], count: int) -> dict[str, int]:
    """What each contestant needs. An input gradient takes as many as a forward, an attack ``count`` of both and one."""
    with FlopCounterMode(display=False) as counter:
        loss_only(loss, images)
    passes = {"APGD": 2 * count + 1, "forward and": 2, "forward": 1}
    forward = counter.get_total_flops()
    return {
        name: forward * next(number for kind, number in passes.items() if name.startswith(kind)) for name in contestants
    }


class Starts:
    """Where the attacks of a round start; drawn before the stopwatch runs."""

    def __init__(self, images: Tensor) -> None:
        self._images, self.round = images, -1

    def draw(self) -> None:
        """Those of the next round."""
        self.round += 1
        torch.manual_seed(self.round)
        self.uniform = torch.rand_like(self._images)  # [B, 3, H, W] in [0, 1)

    @property
    def threat(self) -> Threat:
        return Drawn(THREAT.eps, self.uniform)


@dataclass(frozen=True)
class Drawn(Linf):
    """A ball whose random start is what torchattacks' APGD makes of the same numbers."""

    uniform: Tensor

    def start(self, images: Tensor, keys: Tensor) -> Tensor:
        noise = 2 * self.uniform - 1
        noise = noise / noise.abs().amax((1, 2, 3), keepdim=True)
        return torch.empty_like(images).copy_((images + self.eps * noise).clamp(0, 1))


def no_lower(ours: str, reference: str, losses: Mapping[str, Tensor]) -> Comparison:
    """Whether the mean of our final losses [B] is no lower: by 1 %, or by two standard errors of the difference."""
    found, published = losses[ours], losses[reference]
    lacking = (published - found).mean().item()
    noise = 2 * (published - found).std().item() / len(found) ** 0.5
    evidence = f"final loss {found.mean().item():.4g} against {published.mean().item():.4g}"
    return Comparison(ours, reference, lacking <= max(LOWER * published.mean().item(), noise), evidence)


def ratio(value: float | None) -> str:
    """For a cell of a table."""
    return "" if value is None else f"{value:.2f}"


def fast_form(place: Setting) -> str:
    """What our attacks do to a network, in words."""
    return "folded, channels-last" + (f", {place.precision} autocast" if place.autocast is not None else "")


def cast(place: Setting, enabled: bool) -> AbstractContextManager:
    """The setting's autocast."""
    return torch.autocast(place.device.type, place.autocast, enabled=enabled and place.autocast is not None)


def passes(
    name: str, loss: PerImageLoss, images: Tensor, place: Setting, autocast: bool
) -> dict[str, Callable[[Stopwatch], None]]:
    """The two passes that attacks are made of: a forward without a graph, and one with the images' gradient."""

    def forward(stopwatch: Stopwatch) -> None:
        with cast(place, autocast):
            loss_only(loss, images)
        stopwatch.mark("forward")

    def with_gradient(stopwatch: Stopwatch) -> None:
        with cast(place, autocast):
            loss_and_gradient(loss, images)
        stopwatch.mark("forward and input gradient")

    return {name: forward, name.replace("forward", "forward and input gradient", 1): with_gradient}


def published_apgd(loss_of_images: PerImageLoss, images: Tensor, start: Tensor, eps: float, steps: int) -> Tensor:
    """APGD on L∞ written the way its authors' code is: bookkeeping by indices, read on the host at every step.

    A gradient is taken after the last step too, which nothing uses. Returned is each image's iterate
    of the highest loss.
    """

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            loss = loss_of_images(x)
        return loss.detach(), torch.autograd.grad(loss.sum(), [x])[0].detach()

    def ball(x: Tensor) -> Tensor:
        return torch.clamp(torch.min(torch.max(x, images - eps), images + eps), 0.0, 1.0)

    count = len(images)
    x = start
    loss, gradient = evaluate(x)
    best, best_loss, best_gradient = x.clone(), loss.clone(), gradient.clone()
    step_size = torch.full([count, 1, 1, 1], 2 * eps, dtype=images.dtype, device=images.device)
    history = torch.zeros(steps, count, dtype=loss.dtype)
    window, shortest, decrease = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    old, counter = x.clone(), 0
    loss_at_check, reduced = best_loss.clone(), torch.ones(count, dtype=torch.bool)
    for i in range(steps):
        momentum, old = x - old, x.clone()
        share = 0.75 if i > 0 else 1.0
        moved = ball(x + step_size * torch.sign(gradient))
        x = ball(x + (moved - x) * share + momentum * (1 - share))
        loss, gradient = evaluate(x)
        history[i] = loss.cpu()
        higher = (loss > best_loss).nonzero().squeeze(1)
        best[higher], best_gradient[higher], best_loss[higher] = x[higher], gradient[higher], loss[higher]
        counter += 1
        if counter == window:
            rises = sum((history[i - j] > history[i - j - 1]).int() for j in range(window))
            reduced = (rises <= 0.75 * window) | (~reduced & (loss_at_check >= best_loss).cpu())
            loss_at_check = best_loss.clone()
            if reduced.any():
                at = reduced.nonzero().squeeze(1).to(images.device)
                step_size[at] /= 2.0
                x[at], gradient[at] = best[at].clone(), best_gradient[at].clone()
            counter, window = 0, max(window - decrease, shortest)
    return best


def torchattacks_apgd(
    encoder: Encoder, images: Tensor, targets: Tensor, steps: int
) -> Callable[[Tensor], Tensor] | None:
    """torchattacks' APGD with our loss in the place of its DLR loss; ``None`` where it is not installed.

    It takes the uniform numbers of its start, which it draws by itself otherwise.
    """
    try:
        from torchattacks import APGD
    except ImportError:
        return None

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x).features

    attack = APGD(Features().eval(), eps=THREAT.eps, steps=steps, loss="dlr")
    attack.dlr_loss = lambda features, labels: squared_distance(features, targets)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def run(uniform: Tensor) -> Tensor:
        with mock.patch.object(torch, "rand", lambda shape: uniform):
            return attack.attack_single_run(images, labels)[0]

    return run
