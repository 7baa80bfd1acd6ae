"""AutoAttack and its parts, ours beside the published code and torchattacks: images a second at equal robust accuracy.

::

    random network ── features of drawn images ── linear layer fitted ── ε at which a linear network would lose half
        ── each contestant attacks the same images ── who stands, by the plain network

An attack that leaves more images standing has done less, however fast: no speed-up is given for it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fasttrain.attacks import Linf
from fasttrain.attacks.autoattack import VERSIONS, AttackName, Budget, autoattack
from fasttrain.attacks.losses import margin
from fasttrain.benchmarks.attack import AttackBenchConfig, compare_attacks
from fasttrain.benchmarks.network import channels_last, plain, settle
from fasttrain.benchmarks.timing import Comparison, Report, StepTiming, Stopwatch, alternate_steps
from fasttrain.config import Config, Where
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.models.folding import fold_batchnorm
from fasttrain.precision import Precision, autocast_dtype, decide

Table = Literal["distance", "autoattack"]
CLASSES = 10
CONTRAST, VARIETY = 0.2, 0.05
"Standard deviations of what images of a class share, and of what is an image's own, in the range [0, 1]."
ATTACKS: dict[str, tuple[AttackName, ...]] = {
    "APGD-CE": ("apgd-ce",),
    "APGD-T": ("apgd-t",),
    "AutoAttack": VERSIONS["standard"],
}
RIVALS = {
    "published code": "the published code (pip install git+https://github.com/fra31/auto-attack)",
    "torchattacks": "torchattacks",
}
TOUCH = 1e-5
"By how much rounding may carry a change beyond ε."


class SearchBenchConfig(Config):
    """AutoAttack and its parts on a classifier, L∞; its standard is iterations=100, targets=9, queries=5000."""

    model: ModelConfig | None = None
    "the network; null: resnet18 with the cifar stem, of width 1/8 on a CPU and 1 on a GPU"
    size: int = Field(32, ge=8)
    "pixels of an image's side"
    images: int | None = Field(None, ge=2)
    "images that are attacked, at once; null: 32 on a CPU, 512 on a GPU"
    iterations: int = Field(20, ge=1)
    "steps of each gradient attack"
    targets: int = Field(3, ge=1, le=CLASSES - 1)
    "classes that APGD-T and FAB-T head for"
    queries: int = Field(100, ge=1)
    "of Square, an image"

    @property
    def budget(self) -> Budget:
        return Budget(self.iterations, self.targets, self.queries)


class AttacksBenchConfig(AttackBenchConfig):
    """APGD on the embedding distance, and AutoAttack on a classifier."""

    tables: tuple[Table, ...] = Field(("distance", "autoattack"), min_length=1)
    "distance: APGD on the embedding distance; autoattack: AutoAttack and its parts on a classifier"
    autoattack: SearchBenchConfig = SearchBenchConfig()

    reads: ClassVar[dict[str, Where]] = {
        name: Where("by_distance", why="tables=[autoattack]")
        for name in ("model", "size", "batch", "steps", "iterations")
    } | {"autoattack": Where("by_autoattack", why="tables=[distance]")}

    @property
    def by_distance(self) -> bool:
        return "distance" in self.tables

    @property
    def by_autoattack(self) -> bool:
        return "autoattack" in self.tables


def compare_all(config: AttacksBenchConfig, rounds: int) -> Iterator[Report]:
    """The tables that are asked for, one below the other; the chart is the first one's."""
    before: Report | None = None
    if config.by_distance:
        for report in compare_attacks(config, rounds):
            before = report
            yield report
    if config.by_autoattack:
        for report in compare_searches(config.autoattack, config.precision, rounds):
            yield report if before is None else _below(before, report)


def _below(first: Report, second: Report) -> Report:
    text, rows = f"{first.text}\n\n{second.text}", first.rows + second.rows
    return first._replace(text=text, rows=rows, passed=first.passed and second.passed)


class Classifier(nn.Module):
    """Images [B, 3, H, W] in [0, 1] -> logits W x + b of their features."""

    def __init__(self, encoder: Callable[[Tensor], Any], weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.encoder, self.weight, self.bias = encoder, nn.Parameter(weight), nn.Parameter(bias)
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).features, self.weight, self.bias)


class Problem(NamedTuple):
    """What all contestants attack."""

    plain: Classifier  # contiguous, PyTorch's own layers, float32; who stands is told by it
    fast: Classifier  # the same, folded and channels-last
    images: Tensor  # [B, 3, H, W], all classified right but for a few
    labels: Tensor  # [B]
    threat: Linf
    autocast: torch.dtype | None  # of ours

    @property
    def device(self) -> torch.device:
        return self.images.device

    def fell(self, moved: Tensor) -> Tensor:
        """Of images [B, 3, H, W] in the place of its own, which are in the ball and misclassified."""
        within = ((moved - self.images).abs().flatten(1).amax(1) <= self.threat.eps + TOUCH).logical_and(
            ((moved >= 0) & (moved <= 1)).flatten(1).all(1)
        )
        with torch.no_grad():
            return within & (self.plain(moved).argmax(1) != self.labels)


def problem(config: SearchBenchConfig, precision: Precision) -> Problem:
    """A network and images of which some fall, without data or training.

    The network's weights are random, but for its linear layer: ridge regression of the classes on the features of
    images drawn like those that are attacked. ε is the median, over images, of margin / ‖its gradient‖₁, the distance
    from the boundary if the network were linear.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    model = config.model or ModelConfig(arch="resnet18", stem="cifar", width=1.0 if gpu else 0.125)
    encoder = Encoder(model.model_copy(update={"head": HeadConfig(layers=0), "zero_init_residual": False})).to(device)
    count = config.images or (512 if gpu else 32)
    shared = _smooth(CLASSES, config.size)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % CLASSES
        images = 0.5 + CONTRAST * shared[labels] + VARIETY * _smooth(count, config.size)
        return images.clamp(0, 1).to(device), labels.to(device)

    images, labels = drawn(max(256, count))
    settle(encoder, images)
    reference = plain(encoder).eval()
    with torch.no_grad():
        weight, bias = _ridge(reference(images).features, labels)
    images, labels = drawn(count)
    victim = Classifier(reference, weight, bias)
    autocast = autocast_dtype(decide(precision, device))
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        fast = fold_batchnorm(channels_last(encoder.eval()))
    return Problem(
        victim, Classifier(fast, weight, bias), images, labels, Linf(_half(victim, images, labels)), autocast
    )


def _smooth(count: int, size: int) -> Tensor:
    """``count`` random images [count, 3, H, W] of large blobs, around 0."""
    return F.interpolate(torch.randn(count, 3, 4, 4), size=(size, size), mode="bicubic")


def _ridge(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The linear layer whose logits are 10 for an image's own class and 0 for the others, as near as may be."""
    x, y = features.double(), 10 * (F.one_hot(labels, CLASSES).double() - 1 / CLASSES)
    mean = x.mean(0)
    x = x - mean
    gram = x.T @ x
    weight = torch.linalg.solve(gram + gram.trace() / len(gram) * torch.eye(len(gram)).to(gram), x.T @ y).T
    return weight.float(), -(weight @ mean).float()


def _half(victim: Classifier, images: Tensor, labels: Tensor) -> float:
    x = images.clone().requires_grad_()
    lead = -margin(victim(x), labels)
    (gradient,) = torch.autograd.grad(lead.sum(), [x])
    return float((lead.detach() / gradient.abs().sum((1, 2, 3)))[lead > 0].median())


def compare_searches(config: SearchBenchConfig, precision: Precision, rounds: int) -> Iterator[Report]:
    """Rate and robust accuracy of each attack, by ours and by others; yields after every round.

    All attack the same images of the same network, from other random numbers in each round; rivals that are not
    installed are named.
    """
    place = problem(config, precision)
    contestants: dict[str, Callable[[Stopwatch], None]] = {}
    stood: dict[str, list[Tensor]] = {}  # round after round, the warm-up's first
    pairs: list[tuple[str, str]] = []
    absent: set[str] = set()

    def contest(name: str, run: Callable[[int], Tensor]) -> None:
        stood[name] = []

        def step(stopwatch: Stopwatch) -> None:
            moved = run(len(stood[name]))
            stopwatch.mark("attack")
            stood[name].append(~place.fell(moved))

        contestants[name] = step

    for title, attacks in ATTACKS.items():
        ours = f"{title}, ours"
        contest(ours, _ours(place, attacks, config.budget))
        for rival, build in {"published code": _published, "torchattacks": _torchattacks}.items():
            if (run := build(place, attacks, config.budget)) is None:
                absent.add(rival)
                continue
            contest(f"{title}, {rival}", _refusable(run))
            pairs.append((ours, f"{title}, {rival}"))

    for timings, refusals in alternate_steps(contestants, rounds, 1, place.device, needed=[x for x, _ in pairs]):
        standing = {name: torch.stack(stood[name][1:]) for name in timings}
        compared = [no_more(*pair, standing) for pair in pairs if pair[1] in timings]
        missing = [f"{RIVALS[name]} is not installed" for name in RIVALS if name in absent]
        missing += [f"{name} does not run: {reason}" for name, reason in refusals.items()]
        yield _report(config, place, timings, standing, compared, missing)


def _report(
    config: SearchBenchConfig,
    place: Problem,
    timings: Mapping[str, StepTiming],
    standing: Mapping[str, Tensor],
    compared: list[Comparison],
    missing: list[str],
) -> Report:
    count, model = len(place.images), place.plain.encoder.config
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[place.autocast]
    lines = [
        f"{count} images of {config.size} pixels in {CLASSES} classes, {model.arch}, width {model.width:g}, ours in "
        f"{precision}; {config.iterations} iterations, {config.targets} targets, {config.queries:,} queries. "
        "The network's weights are random but for its linear layer, which is fitted to such images: what attacks cost "
        f"and whether they agree can be seen, no network's robustness. L∞, ε = {255 * place.threat.eps:.3g}/255, at "
        "which a linear network would lose half of the images. An image fell if the plain network in fp32 mistakes "
        "what the attack returned, within ε.\n",
        "| what | images/s, median | least to greatest | CPU s per 1,000 images | robust accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = []
    for name, timing in timings.items():
        rates, robust = [count / seconds for seconds in timing.rounds], float(standing[name].double().mean())
        cpu = f"{sorted(timing.cpu)[len(timing.cpu) // 2] / count * 1000:.3g}" if timing.cpu else ""
        rate = count / timing.seconds
        lines.append(f"| {name} | {rate:.3g} | {min(rates):.3g} to {max(rates):.3g} | {cpu} | {robust:.1%} |")
        rows.append(timing.row() | {"images_per_second": rate, "robust_accuracy": robust})
    lines += ["", *(f"- {comparison.sentence(timings)}" for comparison in compared), *(f"- {x}" for x in missing)]
    return Report("\n".join(lines), rows, {row["name"]: row["images_per_second"] for row in rows}, "images/s")


def no_more(ours: str, reference: str, standing: Mapping[str, Tensor]) -> Comparison:
    """Whether no more images stand [rounds, B] after our attack than after another.

    More may stand by as many as chance moves: √n of the n that stand after one of the two alone, and at least one image
    a round.
    """
    mine, theirs = standing[ours], standing[reference]
    alone, fewer = int((mine & ~theirs).sum()), int((theirs & ~mine).sum())
    allowed = max(len(mine), (alone + fewer) ** 0.5)
    evidence = (
        f"robust accuracy {mine.double().mean():.1%} against {theirs.double().mean():.1%}: {alone} of {mine.numel()} "
        f"stand after ours alone, {fewer} after theirs alone; {allowed:.3g} more count as equal"
    )
    return Comparison(ours, reference, alone - fewer <= allowed, evidence)


def _ours(place: Problem, attacks: tuple[AttackName, ...], budget: Budget) -> Callable[[int], Tensor]:
    count = len(place.images)
    images = place.images.contiguous(memory_format=torch.channels_last)

    def logits(x: Tensor) -> Tensor:
        with torch.autocast(place.device.type, place.autocast, enabled=place.autocast is not None):
            return place.fast(x)

    judge = place.plain if place.autocast is not None else None

    def run(number: int) -> Tensor:
        index = number * count + torch.arange(count, device=place.device)
        return autoattack(
            logits, images, place.labels, place.threat, attacks, budget, index=index, batch=count, judge=judge
        ).images

    return run


def _published(place: Problem, attacks: tuple[AttackName, ...], budget: Budget) -> Callable[[int], Tensor] | None:
    """The authors' code; ``None`` where it is not installed."""
    try:
        from autoattack import AutoAttack
        from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    except ImportError:
        return None
    model, eps, device = place.plain, place.threat.eps, place.device

    def run(number: int) -> Tensor:
        whole = AutoAttack(model, "Linf", eps, number, False, list(attacks), "custom", device=device)
        settings = {"n_iter": budget.steps, "eps": eps, "device": device, "logger": whole.logger}
        whole.apgd = APGDAttack(model, **settings)
        whole.apgd_targeted = APGDAttack_targeted(model, n_target_classes=budget.targets, **settings)
        whole.fab.n_restarts, whole.fab.n_iter, whole.fab.n_target_classes = 1, budget.steps, budget.targets
        whole.square.n_queries = budget.queries
        with contextlib.redirect_stdout(io.StringIO()):  # its remarks would stand within our table
            return whole.run_standard_evaluation(place.images, place.labels, bs=len(place.images))

    return run


def _torchattacks(place: Problem, attacks: tuple[AttackName, ...], budget: Budget) -> Callable[[int], Tensor] | None:
    """torchattacks' AutoAttack; ``None`` where it is not installed."""
    try:
        from torchattacks import APGD, APGDT, FAB, MultiAttack, Square
    except ImportError:
        return None
    model, eps, classes = place.plain, place.threat.eps, budget.targets + 1

    def run(number: int) -> Tensor:
        kinds: dict[AttackName, Callable[[], Any]] = {
            "apgd-ce": lambda: APGD(model, eps=eps, steps=budget.steps, seed=number, loss="ce"),
            "apgd-t": lambda: APGDT(model, eps=eps, steps=budget.steps, seed=number, n_classes=classes),
            "fab-t": lambda: FAB(
                model, eps=eps, steps=budget.steps, seed=number, multi_targeted=True, n_classes=classes
            ),
            "square": lambda: Square(model, eps=eps, n_queries=budget.queries, seed=number),
        }
        chosen = [kinds[name]() for name in attacks]
        return (chosen[0] if len(chosen) == 1 else MultiAttack(chosen))(place.images, place.labels)

    return run


def _refusable(run: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """``run``, whose errors of any kind are those of one that leaves the contest."""

    def attempt(number: int) -> Tensor:
        try:
            return run(number)
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return attempt


__all__ = ["AttacksBenchConfig", "SearchBenchConfig", "compare_all", "compare_searches", "no_more", "problem"]
