"""AutoAttack and its parts, ours beside the published code and torchattacks: images a second at equal robust accuracy.

::

    a classifier and its images ── each contestant attacks them ── who stands, by the plain network

An attack that leaves more images standing has done less, however fast: no speed-up is given for it.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fasttrain.attacks.autoattack import VERSIONS, AttackName, Budget, autoattack
from fasttrain.benchmarks.attack import AttackBenchConfig, compare_attacks
from fasttrain.benchmarks.timing import Comparison, Report, StepTiming, Stopwatch, alternate_steps
from fasttrain.benchmarks.victim import CLASSES, Attacked, attacked_classifier
from fasttrain.config import Config, Where
from fasttrain.models import ModelConfig
from fasttrain.precision import Precision

Table = Literal["distance", "autoattack"]
ATTACKS: dict[str, tuple[AttackName, ...]] = {
    "APGD-CE": ("apgd-ce",),
    "APGD-T": ("apgd-t",),
    "AutoAttack": VERSIONS["standard"],
}
RIVALS = {
    "published code": "the published code (pip install git+https://github.com/fra31/auto-attack)",
    "torchattacks": "torchattacks",
}


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


def compare_searches(config: SearchBenchConfig, precision: Precision, rounds: int) -> Iterator[Report]:
    """Rate and robust accuracy of each attack, by ours and by others; yields after every round.

    All attack the same images of the same network, from other random numbers in each round; rivals that are not
    installed are named.
    """
    gpu = torch.cuda.is_available()
    model = config.model or ModelConfig(arch="resnet18", stem="cifar", width=1.0 if gpu else 0.125)
    place = attacked_classifier(model, config.size, config.images or (512 if gpu else 32), precision)
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

    ours = {f"{title}, ours" for title in ATTACKS}
    for title, attacks in ATTACKS.items():
        contest(f"{title}, ours", _ours(place, attacks, config.budget))
        for rival, build in {"published code": _published, "torchattacks": _torchattacks}.items():
            if (run := build(place, attacks, config.budget)) is None:
                absent.add(rival)
                continue
            contest(f"{title}, {rival}", _refusable(run))
            pairs.append((f"{title}, ours", f"{title}, {rival}"))

    for timings, refusals in alternate_steps(contestants, rounds, 1, place.device, needed=ours):
        standing = {name: torch.stack(stood[name][1:]) for name in timings}
        compared = [no_more(*pair, standing) for pair in pairs if pair[1] in timings]
        missing = [f"{RIVALS[name]} is not installed" for name in RIVALS if name in absent]
        missing += [f"{name} does not run: {reason}" for name, reason in refusals.items()]
        yield _report(config, place, timings, standing, compared, missing)


def _report(
    config: SearchBenchConfig,
    place: Attacked,
    timings: Mapping[str, StepTiming],
    standing: Mapping[str, Tensor],
    compared: list[Comparison],
    missing: list[str],
) -> Report:
    count, model = len(place.images), place.plain.encoder.config
    hastily = "" if place.faster is None else ", AutoAttack's APGD-CE by ours under autocast"
    lines = [
        f"{count} images of {config.size} pixels in {CLASSES} classes, {model.arch}, width {model.width:g}"
        f"{hastily}; {config.iterations} iterations, {config.targets} targets, {config.queries:,} queries. "
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
        cpu = f"{statistics.median(timing.cpu) / count * 1000:.3g}" if timing.cpu else ""
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


def _ours(place: Attacked, attacks: tuple[AttackName, ...], budget: Budget) -> Callable[[int], Tensor]:
    count = len(place.images)
    images = place.images.contiguous(memory_format=torch.channels_last)

    def run(number: int) -> Tensor:
        index = number * count + torch.arange(count, device=place.device)
        given = place.labels, place.threat, attacks, budget
        return autoattack(place.fast, images, *given, index=index, batch=count, faster=place.faster).images

    return run


def _published(place: Attacked, attacks: tuple[AttackName, ...], budget: Budget) -> Callable[[int], Tensor] | None:
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


def _torchattacks(place: Attacked, attacks: tuple[AttackName, ...], budget: Budget) -> Callable[[int], Tensor] | None:
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


__all__ = ["AttacksBenchConfig", "SearchBenchConfig", "compare_all", "compare_searches", "no_more"]
