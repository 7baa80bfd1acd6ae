"""Robustness curves: the share of images misclassified, against the size of the change that an attacker may make.

FGSM, PGD and APGD are run anew for each size. PLB finds each image's smallest change, which gives the whole curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pydantic
import torch
from pydantic import Field
from torch import Tensor

from fasttrain.accuracies import wilson
from fasttrain.attacks import AttackConfig, PLBConfig, image_keys, make_attack, plb
from fasttrain.attacks.evaluation import Watched
from fasttrain.attacks.losses import margin
from fasttrain.attacks.plb import PLBSteps
from fasttrain.config import Where
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.evaluation.attacked import Logits, Targets, not_finite
from fasttrain.evaluation.classifier import ClassifierConfig, classifier_of
from fasttrain.evaluation.evaluation import ComparisonConfig, Evaluation, EvaluationData, Subject
from fasttrain.evaluation.images import chunks
from fasttrain.evaluation.parts import Found, Parts, Point
from fasttrain.figures import Style, panels, style
from fasttrain_kernels.apgd import Norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Name = Literal["fgsm", "pgd", "apgd", "plb"]
SIZES: dict[Norm, tuple[float, ...]] = {
    "linf": tuple(float(i) for i in range(1, 16)),  # Cowlagi, Liu & Neervannan, figure 2b
    "l2": tuple(25.5 * i for i in range(1, 16)),  # 0.1, 0.2, …, 1.5
}
CONFIDENCE = 0.95


class CurvesEvaluation(ComparisonConfig):
    """Share of images misclassified, against the size of the change that an attacker may make."""

    classifier: ClassifierConfig = ClassifierConfig()
    attacks: tuple[Name, ...] = ("fgsm", "pgd", "plb")
    "fgsm, pgd, apgd (each size its own attack) and plb (each image's smallest change), one or several"
    norm: Norm = "linf"
    "norm of the change: linf or l2"
    eps_255: tuple[float, ...] | None = None
    "sizes in 1/255 of the pixel range, growing, for either norm; null: 1 to 15 (linf), 0.1 to 1.5 times 255 (l2)"
    steps: int = Field(20, ge=1)
    "steps of pgd and apgd"
    step_255: float | None = Field(None, gt=0)
    "step size of pgd in 1/255; null: 2.5 eps / steps"
    restarts: int = Field(1, ge=1)
    "random starts of pgd and apgd; each image keeps the one of the highest loss"
    plb: PLBSteps = PLBSteps()
    images: int | None = Field(None, ge=1)
    "validation images to attack, evenly spaced over the listing; null: all"
    bootstrap: int = Field(1000, ge=1)
    "how often images are drawn anew for an interval"
    seed: int = 0
    "of those draws"

    reads: ClassVar[dict[str, Where]] = {
        "steps": Where("iterates", why="neither pgd nor apgd is among the attacks"),
        "restarts": Where("iterates", why="neither pgd nor apgd is among the attacks"),
        "step_255": Where("by_pgd", why="pgd is not among the attacks"),
        "plb": Where("by_plb", why="plb is not among the attacks"),
    }

    @property
    def iterates(self) -> bool:
        """Whether an attack takes several steps to a given size."""
        return not {"pgd", "apgd"}.isdisjoint(self.attacks)

    @property
    def by_pgd(self) -> bool:
        return "pgd" in self.attacks

    @property
    def by_plb(self) -> bool:
        return "plb" in self.attacks

    @property
    def radii_255(self) -> tuple[float, ...]:
        """The sizes that are tried."""
        return SIZES[self.norm] if self.eps_255 is None else self.eps_255

    @pydantic.field_validator("attacks")
    @classmethod
    def _each_once(cls, attacks: tuple[Name, ...]) -> tuple[Name, ...]:
        if not attacks:
            raise ValueError("attacks=[]: give one or several of fgsm, pgd, apgd, plb")
        if len(set(attacks)) < len(attacks):
            raise ValueError(f"attacks=[{', '.join(attacks)}]: give each once")
        return attacks

    @pydantic.model_validator(mode="after")
    def _sizes_grow(self) -> CurvesEvaluation:
        sizes = self.radii_255
        shown = f"eps_255=[{', '.join(f'{size:g}' for size in sizes)}]"
        if not sizes or sizes[0] < 0 or any(after <= before for before, after in pairwise(sizes)):
            raise ValueError(f"{shown}: give sizes from 0 on, each once, in growing order")
        if self.norm == "linf" and sizes[-1] > 255:
            raise ValueError(f"{shown}: an linf size is at most 255, the whole pixel range")
        return self

    def doubts(self) -> list[str]:
        return self.attack_at("fgsm", self.radii_255[-1]).doubts()  # smaller sizes than the last may be meant

    def attack_at(self, name: Name, eps_255: float) -> AttackConfig:
        """Of one size."""
        used = {"pgd": ("steps", "restarts", "step_255"), "apgd": ("steps", "restarts")}.get(name, ())
        return AttackConfig(name=name, norm=self.norm, eps_255=eps_255, **{key: getattr(self, key) for key in used})


class Curve(NamedTuple):
    """What one attack does to one encoder's classifier. Sizes are in 1/255 of the pixel range, for either norm."""

    attack: str
    sizes_255: list[float]  # from 0, where nothing is changed
    misclassified: list[float]  # share of the images at each size: the clean error, and those that a change fools too
    low: list[float]  # 95 % interval of each share, by Wilson
    high: list[float]
    median_255: float  # the size at which half are misclassified; infinite (null in JSON): beyond those that were tried
    median_low_255: float  # its 95 % interval, over images drawn anew
    median_high_255: float
    never_fooled: float  # share of the images that are right at every size that was tried (plb: whatever was tried)
    smallest: Tensor | None = None  # plb: [n] float64 each image's smallest change, pixels in [0, 1]; 0, wrong; ∞, none


class EncoderCurves(NamedTuple):
    """Of one encoder."""

    source: str
    name: str
    method: str  # which other seeds of the same share
    curves: list[Curve]


class Curves(NamedTuple):
    """Robustness curves of encoders, all on the same images."""

    norm: str
    images: int
    classes: int
    encoders: list[EncoderCurves]
    index: Tensor  # [images] int64 their positions in the validation split's listing


def evaluate(subjects: Sequence[Subject], data: EvaluationData, config: CurvesEvaluation, parts: Parts) -> Curves:
    """The curves of ``subjects``, each under each attack.

    FGSM, PGD and APGD raise the cross-entropy, in the precision of the evaluation; PLB the margin, never in bf16 or
    fp16: rounded scores would move the boundary that it walks along. All know encoder and classifier.

    Raises:
        UsageError: no validation image; as :func:`classifier_of`.
        NotFinite: a score, a loss or a gradient is not finite.
    """
    targets: list = []
    for subject in subjects:
        encoder = subject.load(data.device)
        targets.append((encoder, classifier_of(subject, encoder, data, config.classifier, parts)))
    task = targets[0][1].task
    indices = data.choose("val", config.images, task)
    if not len(indices):
        raise UsageError("robustness curves have 0 validation images: give a data set with a validation split")
    asked = Targets(data, targets)
    settings = PLBConfig(norm=config.norm, **config.plb.model_dump())
    smallest_of = plb(settings)

    def points(target: int) -> list[tuple[str, float, Point]]:
        """Those of one chunk in a row, so that its images are read once; PLB, at hundreds of passes, of fewer."""
        swept = [(name, eps) for name in config.attacks if name != "plb" for eps in config.radii_255]
        found = [
            (name, eps, asked.point(target, chunk, data.autocast, attack=_told(config.attack_at(name, eps))))
            for chunk in chunks(indices, config.batch)
            for name, eps in swept
        ]
        for chunk in chunks(indices, math.ceil(config.batch / 4)) if config.by_plb else ():
            found.append(("plb", math.inf, asked.point(target, chunk, None, plb=settings.model_dump())))
        return found

    def work(point: Point) -> Found:
        if "plb" in point:
            logits, batch = asked.at(point)
            sizes = smallest_changes(logits, batch, smallest_of, config.norm).cpu()
            if sizes.isnan().any():
                raise not_finite(int(sizes.isnan().sum()), len(sizes), True, None)
            return {"smallest": sizes}
        found = asked.outcomes(point, make_attack(AttackConfig(**point["attack"])))
        return {"clean": found.clean.to(torch.uint8), "robust": found.robust.to(torch.uint8)}

    listed = [(number, *entry) for number in range(len(subjects)) for entry in points(number)]
    results = parts.run("robustness curves", [point for *_, point in listed], work)
    by_size: dict[tuple[int, str], dict[float, list[Found]]] = {}  # chunk after chunk
    for (number, name, eps, _), found in zip(listed, results, strict=True):
        by_size.setdefault((number, name), {}).setdefault(eps, []).append(found)

    def curve(number: int, name: Name) -> Curve:
        at = by_size[number, name]
        if name == "plb":
            smallest = _joined(at[math.inf], "smallest")
            return curve_of_smallest(smallest, config.radii_255, config.bootstrap, config.seed)
        right = {0.0: _joined(at[config.radii_255[0]], "clean")} | {eps: _joined(at[eps], "robust") for eps in at}
        wrong = 1 - torch.stack(list(right.values()), 1)
        return curve_of_outcomes(name, wrong, list(right), config.bootstrap, config.seed)

    encoders = [
        EncoderCurves(subject.source, subject.name, subject.method, [curve(number, name) for name in config.attacks])
        for number, subject in enumerate(subjects)
    ]
    return Curves(config.norm, len(indices), len(task.classes), encoders, torch.from_numpy(indices))


def _joined(found: Sequence[Found], key: str) -> Tensor:
    return torch.cat([part[key] for part in found])


def smallest_changes(
    logits: Logits, batch: Batch, attack: Callable[..., Tensor], norm: Norm = "linf"
) -> Tensor:  # [B] float64
    """Norms of the smallest changes with which ``attack`` (PLB) makes the margin of images (view 0) positive.

    0 where the image is misclassified as it is, infinite where nothing fooled the classifier, NaN where a score or a
    gradient that the attack went by was not finite.
    """
    images, labels = batch.images[0], batch.labels
    watched = Watched(lambda x: margin(logits(x), labels))
    moved = watched.or_nan(attack(watched, images, image_keys(0, 0, batch.index)))
    order = math.inf if norm == "linf" else 2
    sizes = torch.linalg.vector_norm((moved.double() - images.double()).flatten(1), order, dim=1)
    with torch.no_grad():
        wrong = margin(logits(images), labels) > 0
    return torch.where(sizes == 0, torch.where(wrong, 0.0, torch.inf).to(sizes), sizes)


def curve_of_smallest(smallest: Tensor, radii_255: Sequence[float], resamples: int, seed: int = 0) -> Curve:
    """PLB's: at size s the share of images whose smallest change [n] is at most s, 0 being the clean errors.

    The median is that of the n smallest changes; the interval's are those of n drawn from them with replacement.
    """
    smallest = smallest.double()
    sizes = torch.tensor(sorted({0.0, *radii_255}), dtype=torch.float64)
    values = smallest.numpy() * 255
    median = float(np.median(values))
    low, high = bootstrap(lambda rows: float(np.median(values[rows])), len(values), resamples, seed)
    wrong, never = smallest[:, None] * 255 <= sizes, float(smallest.isinf().double().mean())
    return Curve("plb", sizes.tolist(), *_shares(wrong), median, low, high, never, smallest)


def curve_of_outcomes(
    name: str, wrong: Tensor, sizes_255: Sequence[float], resamples: int, seed: int = 0
) -> Curve:  # wrong [n, S] 0 or 1: whether image n is misclassified at size S
    """Of an attack that is run anew at each size; the median is :func:`half_size` of the shares.

    An attack of a larger size may do less: a share may fall, and no image is carried over from a smaller size.
    """
    table = wrong.double().numpy()
    low, high = bootstrap(lambda rows: half_size(sizes_255, table[rows].mean(0)), len(table), resamples, seed)
    half = half_size(sizes_255, table.mean(0))
    return Curve(name, list(sizes_255), *_shares(wrong), half, low, high, float((table.max(1) == 0).mean()))


def _shares(wrong: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Of wrong [n, S] at each size: the share of the images, and the ends of its interval."""
    total = len(wrong)
    counts = [int(count) for count in wrong.sum(0)]
    low, high = zip(*(wilson(count, total) for count in counts), strict=True)
    return [count / total for count in counts], list(low), list(high)


def half_size(sizes: Sequence[float], shares: Sequence[float] | np.ndarray) -> float:
    """The first size at which half are misclassified, on straight lines between those tried; ∞: at none of them."""
    if shares[0] >= 0.5:
        return float(sizes[0])
    for (start, below), (end, above) in pairwise(zip(sizes, shares, strict=True)):
        if above >= 0.5:
            return float(start + (end - start) * (0.5 - below) / (above - below))
    return math.inf


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, resamples: int, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of ``statistic(rows)``, rows [count] drawn with replacement (Efron 1979).

    Its ends are values that occurred, so that they may be infinite; the draws depend on count and seed alone.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    found = [statistic(generator.integers(0, count, count)) for _ in range(resamples)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def _told(attack: AttackConfig) -> dict:
    """What of its settings is read."""
    return attack.model_dump(include={"name", "norm", "eps_255"} | attack.model_fields_set)


SHOWN = 4  # sizes of which a line tells


def lines(result: Curves) -> list[str]:
    """A line an encoder and attack: percent misclassified at a few sizes, the median with its interval, the rest."""
    sizes = result.encoders[0].curves[0].sizes_255
    chosen = sorted({round(i * (len(sizes) - 1) / SHOWN) for i in range(SHOWN + 1)})
    wide = max(12, *(len(one.name) for one in result.encoders))
    unit = "1/255" if result.norm == "linf" else "L2 norm"
    heads = "".join(f"{_size(sizes[i], result.norm):>8}" for i in chosen)
    found = [
        f"percent misclassified of {result.images:,} images of {result.classes} classes, at sizes in {unit}",
        f"{'encoder':{wide}s} attack{heads}   half at   95 % interval   never",
    ]
    for one in result.encoders:
        for curve in one.curves:
            shares = "".join(f"{100 * curve.misclassified[i]:8.2f}" for i in chosen)
            ends = (curve.median_255, curve.median_low_255, curve.median_high_255)
            half, low, high = (_size(value, result.norm) for value in ends)
            never = f"{100 * curve.never_fooled:6.2f}"
            found.append(f"{one.name:{wide}s} {curve.attack:6s}{shares}{half:>10}{f'{low} to {high}':>16}  {never}")
    return found


def _size(value_255: float, norm: str) -> str:
    if math.isinf(value_255):
        return "beyond"
    return f"{value_255:.4g}" if norm == "linf" else f"{value_255 / 255:.4g}"


def figure(result: Curves) -> Figure:
    """A panel an attack; a line a method, the mean of its seeds with each of them behind it, or its interval if one."""
    attacks = [curve.attack for curve in result.encoders[0].curves]
    picture, axes = panels(1, len(attacks), sharey=True)
    methods = list(dict.fromkeys(one.method for one in result.encoders))
    unit = 1 if result.norm == "linf" else 255
    for column, (axis, attack) in enumerate(zip(axes[0], attacks, strict=True)):
        for number, method in enumerate(methods):
            curves = [one.curves[column] for one in result.encoders if one.method == method]
            label = f"{method} ({len(curves)} seeds)" if len(curves) > 1 else method
            _draw(axis, curves, unit, style(number), label)
        axis.set_title(attack.upper())
        axis.set_xlabel("$L_\\infty$ size of the change, 1/255" if unit == 1 else "$L_2$ size of the change")
        axis.set_ylim(0, 100)
        axis.set_xlim(0, result.encoders[0].curves[column].sizes_255[-1] / unit or 1)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("misclassified, %")
    axes[0][-1].legend()
    return picture


def _draw(axis: Any, curves: Sequence[Curve], unit: float, look: Style, label: str) -> None:
    tables = [np.array(_drawn(curve)) for curve in curves]  # [4, S] each
    sizes, mean = tables[0][0] / unit, 100 * np.mean([table[1] for table in tables], 0)
    if len(curves) == 1:
        axis.fill_between(sizes, *(100 * tables[0][2:]), color=look.color, alpha=0.15, linewidth=0)
    else:
        for table in tables:
            axis.plot(sizes, 100 * table[1], color=look.color, linewidth=0.6, alpha=0.6)
    axis.plot(
        sizes, mean, label=label, markersize=4, markevery=max(1, len(sizes) // 15), clip_on=False, **look._asdict()
    )


def _drawn(curve: Curve) -> tuple[list[float], list[float], list[float], list[float]]:
    """Sizes, shares and their intervals: PLB's at sizes as close as a picture shows, another's as they are."""
    if curve.smallest is None:
        return curve.sizes_255, curve.misclassified, curve.low, curve.high
    sizes = torch.linspace(0, curve.sizes_255[-1], 201, dtype=torch.float64)
    return sizes.tolist(), *_shares(curve.smallest[:, None] * 255 <= sizes)


EVALUATION = Evaluation(
    CurvesEvaluation,
    evaluate,
    "percent misclassified against the size of the change: FGSM, PGD, APGD, PLB",
    lines,
    figure,
)


__all__ = [
    "Curve",
    "Curves",
    "CurvesEvaluation",
    "EncoderCurves",
    "bootstrap",
    "curve_of_outcomes",
    "curve_of_smallest",
    "half_size",
    "smallest_changes",
]
