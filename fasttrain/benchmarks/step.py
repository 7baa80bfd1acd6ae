"""Whole training steps in one run: plain, penalties, adversarial views, FARE, and the plain ways to write them."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasttrain.attacks import AttackConfig, image_keys
from fasttrain.attacks.losses import squared_distance
from fasttrain.attacks.structured import StructuredConfig
from fasttrain.benchmarks.attack import THREAT, cast, no_lower, passes, published_apgd, ratio
from fasttrain.benchmarks.cases.contrastive import Loss, cross_entropy, nt_xent_peers
from fasttrain.benchmarks.network import NetworkConfig, Setting, channels_last, plain, setting
from fasttrain.benchmarks.timing import Comparison, Report, StepTiming, Stopwatch, alternate_steps
from fasttrain.data import Batch
from fasttrain.models import Encoded, Encoder
from fasttrain.models.folding import fold_batchnorm
from fasttrain.models.reference import keep_in_evaluation
from fasttrain.objectives import (
    Objective,
    Reference,
    Traits,
    fare,
    fare_one_sided,
    gradient_penalty,
    info_nce,
    nt_xent,
)
from fasttrain.objectives.objective import with_traits
from fasttrain.optim import OptimizerConfig, build_optimizer
from fasttrain.step import Term, TrainStep
from fasttrain.views import Structured, adversarial, structured

ITERATIONS = 10
"Of FARE's APGD."
TOLERANCE = 1e-4
"Relative error of a loss or a parameter gradient that always counts as agreement."
PLAIN, PLAIN_TORCH = "plain", "plain, PyTorch"
PENALTY, PENALTY_TORCH = "penalty, double backward", "penalty, PyTorch"
FARE, FARE_TORCH, FLOOR = f"FARE, APGD-{ITERATIONS}", "FARE, published code", "FARE's floor"
FORWARD, GRADIENT, BACKWARD = "F: forward", "F + G: forward, input gradient", "F + B: forward, backward"


class StepBenchConfig(NetworkConfig):
    """One optimiser step of each kind."""

    temperature: float = Field(0.5, gt=0)
    "of NT-Xent"
    pgd_steps: int = Field(5, ge=1)
    "of the adversarial view"


class Step:
    """Forward, backward, optimiser of a :class:`TrainStep`; at learning rate 0, so every round does the same work."""

    def __init__(self, module: TrainStep, batch: Batch, place: Setting, name: str = "sgd", autocast: bool = True):
        self.module, self.batch, self.place, self.autocast = module, batch, place, autocast
        self.optimizer = build_optimizer(OptimizerConfig(name=name), module, 0, place.device)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def __call__(self, stopwatch: Stopwatch) -> None:
        hooks = list(self._hooks(stopwatch))
        self.optimizer.zero_grad()
        with cast(self.place, self.autocast):
            loss, self.values = self.module(self.batch)
        stopwatch.mark("forward")
        loss.backward()
        stopwatch.mark("backward")
        self.optimizer.step()
        stopwatch.mark("optimiser")
        self.loss = loss.detach()
        for hook in hooks:
            hook.remove()

    def gradients(self) -> dict[str, Tensor]:
        """Of the last step."""
        return {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}

    def in_float64(self) -> Step:
        """The same step on a copy, in double precision."""
        batch = self.batch._replace(images=self.batch.images.double())
        return Step(copy.deepcopy(self.module).double(), batch, self.place, autocast=False)

    def in_channels_last(self) -> Step:
        """The same step on a copy, in that memory format."""
        images = self.batch.images
        flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        batch = self.batch._replace(images=flat.unflatten(0, images.shape[:2]))
        module = copy.deepcopy(self.module).to(memory_format=torch.channels_last)
        return Step(module, batch, self.place, autocast=self.autocast)

    def _hooks(self, stopwatch: Stopwatch) -> Iterator[RemovableHandle]:
        """Book the reference's and the views' passes apart from the forward, and keep what a view shows."""
        parts = {"view" if isinstance(view, Structured) else "attack": view for view in self.module.views.values()}
        if self.module.prepare is not None:
            parts["reference"] = self.module.prepare
        for part, module in parts.items():
            yield module.register_forward_pre_hook(lambda *_: stopwatch.mark("forward"))
            yield module.register_forward_hook(lambda *_, part=part: stopwatch.mark(part))
        for view in self.module.views.values():
            yield view.register_forward_hook(self._see)

    def _see(self, view: nn.Module, given: tuple, shown: Batch) -> None:
        self.seen = shown.images.detach()


def compare_steps(config: StepBenchConfig, rounds: int) -> Iterator[Report]:
    """Every step's time over that of the best plain one, the split by part, and FARE's over its floor.

    The contrastive steps see two views of each image, FARE one. Ours are channels-last and autocast. The plain ways are
    contiguous, with torch's own BatchNorm, the losses as one would write them, or a peer's where it is installed; the
    plain and the penalty step are autocast like ours, FARE's published code is not. In float64 they are what losses and
    parameter gradients are held against. Yields after every round.

    The floor: 10 (F + G) + F + (F + B) and the clean images' (F + B), with F and G of the folded network.
    """
    place = setting(config)
    peers = _peers(config, place)
    steps = _contrastive(config, place) | peers | _fare(place)
    pairs = [(PLAIN, PLAIN_TORCH), *((PLAIN, peer) for peer in peers), (PENALTY, PENALTY_TORCH)]
    contestants, needed = steps | _floor_parts(place), (PLAIN, PENALTY, FARE, FORWARD, GRADIENT, BACKWARD)
    comparisons = None
    for timings, refusals in alternate_steps(
        contestants, rounds, place.steps, place.device, memory=True, needed=needed
    ):
        if comparisons is None:  # each step does the same in every round
            comparisons = [_same_step(ours, theirs, steps) for ours, theirs in pairs if theirs in timings]
            comparisons += [_no_lower(FARE, FARE_TORCH, steps)] if FARE_TORCH in timings else []
        yield _report(config, place, timings, refusals, comparisons)


def _report(
    config: StepBenchConfig,
    place: Setting,
    timings: Mapping[str, StepTiming],
    refusals: Mapping[str, str],
    comparisons: list[Comparison],
) -> Report:
    floor = _floor({name: timing.seconds for name, timing in timings.items()})
    plain_ones = [timings[name] for name in (PLAIN, PLAIN_TORCH) if name in timings]
    best = min(plain_ones, key=lambda timing: timing.seconds)
    bars = {name: timing.over(best) for name, timing in timings.items()} | {FLOOR: floor / best.seconds}
    by_cpu = ""
    if best.cpu:
        cpu = {name: statistics.median(timing.cpu) for name, timing in timings.items()}
        by_cpu = f"; {cpu[FARE] / _floor(cpu):.2f} times by CPU time"
    lines = [
        f"{len(place.images) // 2} images of {config.size} pixels, {config.model.arch}, width {config.model.width:g}, "
        f"{place.precision}\n",
        _table(timings, best),
        "",
        f"- {FARE}: {timings[FARE].seconds / floor:.2f} times its floor, {ITERATIONS} (F + G) + F + 2 (F + B) = "
        f"{floor / best.seconds:.2f} plain steps{by_cpu}",
        *_memory(timings, best),
        *(f"- {comparison.sentence(timings)}" for comparison in comparisons if comparison.reference in timings),
        *(f"- {name} does not run: {reason}" for name, reason in refusals.items()),
    ]
    rows = [timing.row() for timing in timings.values()] + [{"name": FLOOR, "seconds": floor}]
    agree = all(comparison.agrees for comparison in comparisons)
    return Report("\n".join(lines), rows, bars, "time over the best plain step", agree)


def _contrastive(config: StepBenchConfig, place: Setting) -> dict[str, Step]:
    tau, half = config.temperature, place.autocast is not None
    batch, flat = place.batch(2, torch.channels_last), place.batch(2)

    def ours(objective: Objective, view: nn.Module | None = None) -> Step:
        term = Term("simclr", objective) if view is None else Term("simclr", objective, view=view.to(place.device))
        return Step(TrainStep(channels_last(place.encoder), [term]), batch, place)

    def torchs(objective: Objective) -> Step:
        return Step(TrainStep(plain(place.encoder), [Term("simclr", objective)]), flat, place)

    weight = _balancing_weight(place, tau)
    differences = gradient_penalty(nt_xent(tau), weight, "finite_difference", precision="fp32" if half else "autocast")
    pgd = AttackConfig(name="pgd", steps=config.pgd_steps)
    return {
        PLAIN: ours(nt_xent(tau)),
        PLAIN_TORCH: torchs(plain_nt_xent(tau)),
        PENALTY: ours(gradient_penalty(nt_xent(tau), weight)),
        PENALTY_TORCH: torchs(plain_penalty(plain_nt_xent(tau), weight)),
        "penalty, finite difference" + (", fp32" if half else ""): ours(differences),
        f"adversarial view, PGD-{config.pgd_steps}": ours(nt_xent(tau), adversarial(pgd, info_nce(tau), seed=0)),
        "structured view, colour": ours(
            nt_xent(tau), structured(StructuredConfig(), place.encoder.backbone.num_features)
        ),
    }


def _peers(config: StepBenchConfig, place: Setting) -> dict[str, Step]:
    """The plain step with the NT-Xent of each other library that is installed."""

    def step(loss: Loss) -> Step:
        def objective(encoded: Encoded, batch: Batch) -> Tensor:
            return loss(encoded.projections) / len(encoded.projections)

        return Step(TrainStep(plain(place.encoder), [Term("simclr", objective)]), place.batch(2), place)

    losses = nt_xent_peers(config.temperature, len(place.images) // 2, place.device)
    return {f"plain, {name}": step(loss) for name, loss in losses.items()}


def _fare(place: Setting) -> dict[str, Step]:
    attack = AttackConfig(name="apgd", steps=ITERATIONS, eps_255=255 * THREAT.eps)

    def step(encoder: Encoder, view: nn.Module, batch: Batch, autocast: bool) -> Step:
        reference = Reference(encoder)
        terms = [Term("adversarial", fare(), view=view), Term("clean", fare(), 0.1)]
        return Step(TrainStep(keep_in_evaluation(encoder), terms, reference), batch, place, "adamw", autocast)

    ours = adversarial(attack, fare_one_sided(), seed=0).to(place.device)
    return {
        FARE: step(channels_last(place.encoder), ours, place.batch(1, torch.channels_last), True),
        FARE_TORCH: step(plain(place.encoder), PublishedAttack(), place.batch(1), False),
    }


class PublishedAttack(nn.Module):
    """The view that :func:`published_apgd` makes on the network as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, encoder: Encoder, batch: Batch) -> Batch:
        def loss(x: Tensor) -> Tensor:
            return squared_distance(encoder(x).features, batch.targets)

        images = batch.images[0]
        start = THREAT.start(images, image_keys(0, self.calls, batch.index))  # ours is the same
        self.calls += 1
        return batch._replace(images=published_apgd(loss, images, start, THREAT.eps, ITERATIONS)[None])


def plain_nt_xent(temperature: float) -> Objective:
    """NT-Xent as the cross-entropy of the whole similarity matrix, the way most code has it."""

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        return cross_entropy(encoded.projections, temperature=temperature) / len(encoded.projections)

    return objective


def plain_penalty(of: Objective, weight: float) -> Objective:
    """L + λ/2 Σ ‖∇ₓL‖² / 2 over both views, by ``autograd.grad(create_graph=True)``."""

    def objective(encoded: Encoded, batch: Batch) -> Tensor:
        loss = of(encoded, batch)
        return loss + weight / 2 * _squared_gradient(loss, encoded.images, create_graph=True)

    return with_traits(objective, Traits(image_gradient=True))


def _squared_gradient(loss: Tensor, images: Tensor, create_graph: bool) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(loss, images, create_graph=create_graph)
        return gradient.square().sum() / 2


def _balancing_weight(place: Setting, temperature: float) -> float:
    """λ with which penalty and loss weigh the same, so that a mistake in either shows."""
    batch = place.batch(2)
    encoded = plain(place.encoder)(batch.images.flatten(0, 1).requires_grad_())
    loss = plain_nt_xent(temperature)(encoded, batch)
    return 2 * loss.item() / _squared_gradient(loss, encoded.images, create_graph=False).item()


def _floor_parts(place: Setting) -> dict[str, Callable[[Stopwatch], None]]:
    encoder = keep_in_evaluation(channels_last(place.encoder))
    folded, images = fold_batchnorm(encoder), place.batch(1, torch.channels_last).images[0]
    with torch.no_grad():
        targets = encoder(images + 0.01).features

    def train(stopwatch: Stopwatch) -> None:
        encoder.zero_grad()
        with cast(place, True):
            loss = squared_distance(encoder(images).features, targets).mean()
        loss.backward()
        stopwatch.mark("forward and backward")

    parts = passes("forward", lambda x: squared_distance(folded(x).features, targets), images, place, True)
    return dict(zip((FORWARD, GRADIENT), parts.values(), strict=True)) | {BACKWARD: train}


def _floor(seconds: Mapping[str, float]) -> float:
    forward, gradient, backward = (seconds[name] for name in (FORWARD, GRADIENT, BACKWARD))
    return ITERATIONS * gradient + forward + 2 * backward


def _same_step(ours: str, reference: str, steps: Mapping[str, Step]) -> Comparison:
    """Whether loss and parameter gradient are at most twice as far from float64 as the plain way's in channels-last.

    On a CPU PyTorch sums BatchNorm's statistics less accurately there, by a factor of 100, and a float32 gradient is
    7e-3 off instead of 1e-3 (ResNet-18, 2 x 64 images of 32 pixels). That is its rounding, not a mistake of ours.
    """
    exact, rounded = steps[reference].in_float64(), steps[reference].in_channels_last()
    for step in (exact, rounded):
        step(Stopwatch(step.place.device))
    found, allowed, theirs = (_errors(step, exact) for step in (steps[ours], rounded, steps[reference]))
    agrees = all(error <= max(TOLERANCE, 2 * other) for error, other in zip(found, allowed, strict=True))
    evidence = (
        f"loss and parameter gradient {found[0]:.1e}, {found[1]:.1e} from float64; PyTorch's {theirs[0]:.1e}, "
        f"{theirs[1]:.1e}, in channels-last {allowed[0]:.1e}, {allowed[1]:.1e}"
    )
    return Comparison(ours, reference, agrees, evidence)


def _errors(step: Step, exact: Step) -> tuple[float, float]:
    """Relative errors of the loss and, as one vector, of the parameter gradient."""
    gradients, true = step.gradients(), exact.gradients()
    if gradients.keys() != true.keys():
        return float("inf"), float("inf")
    off = sum((gradients[name] - true[name]).square().sum().item() for name in true)
    size = sum(gradient.square().sum().item() for gradient in true.values())
    return abs(step.loss.item() / exact.loss.item() - 1), (off / size) ** 0.5


def _no_lower(ours: str, reference: str, steps: Mapping[str, Step]) -> Comparison:
    """What the two steps' last attacks came to, on the plain network in float32."""
    judge = steps[reference].module.encoder
    with torch.no_grad():
        targets = judge(steps[reference].batch.images[0]).features
        losses = {name: squared_distance(judge(steps[name].seen[0]).features, targets) for name in (ours, reference)}
    return no_lower(ours, reference, losses)


def _memory(timings: Mapping[str, StepTiming], best: StepTiming) -> Iterator[str]:
    """The penalty steps' peak memory over that of the best plain step."""
    if best.memory:
        steps = [name for name in (PENALTY, PENALTY_TORCH) if name in timings]
        ratios = [f"{name} {timings[name].memory / best.memory:.2f}" for name in steps]
        yield f"- peak memory over the best plain step's: {'; '.join(ratios)}"


def _table(timings: Mapping[str, StepTiming], best: StepTiming) -> str:
    head = ["step", "over the best plain", "ms, median", "least to greatest", "by part", "peak MiB"]
    lines = [head, ["---"] * len(head)]
    for timing in timings.values():
        shares = timing.shares()
        parts = ", ".join(f"{part} {100 * share:.0f} %" for part, share in shares.items()) if len(shares) > 1 else ""
        memory = "" if timing.memory is None else f"{timing.memory / 2**20:,.0f}"
        over = ratio(timing.over(best))
        lines.append([timing.name, over, f"{1000 * timing.seconds:,.1f}", timing.spread, parts, memory])
    if best.cpu:
        by_cpu = ["by CPU time", "---", *(ratio(timing.cpu_over(best)) for timing in timings.values())]
        lines = [[*line[:2], cell, *line[2:]] for line, cell in zip(lines, by_cpu, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
