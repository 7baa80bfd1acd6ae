"""What runs logged while they trained, read back: series, means over seeds, and by what settings runs differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fasttrain import checkpoint, distributed
from fasttrain.config import differing
from fasttrain.errors import UsageError
from fasttrain.evaluation.evaluation import Subject
from fasttrain.figures import Style
from fasttrain.run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = list[dict[str, Any]]
"Of a ``metrics.jsonl``: the reports of training, which have a learning rate, and those of evaluations."

R = TypeVar("R")
"Whatever has a ``method``."

SIDE = ("run.", "loader.", "export.", "robust.", "train.device", "train.cuda_graph", "data.root")
"Settings that say nothing of what is compared."
MOST = 3
"Settings named in a label."


class Series(NamedTuple):
    """A value over training; NaN where it was not finite, or where a report lacks it."""

    steps: Tensor  # [T] int64, increasing
    values: Tensor  # [T] float64


class Curve(NamedTuple):
    """The mean of one method's seeds over training, at the steps that all of them have."""

    steps: Tensor  # [T] int64
    mean: Tensor  # [T] float64, NaN where a seed's value is
    sd: Tensor  # [T] float64, of n - 1; NaN of one seed
    seeds: int


class Reached(NamedTuple):
    """What a series came to."""

    first: float  # NaN: it was not finite
    last: float
    best: float  # the greatest of what is finite
    best_step: int


def logged(subjects: Sequence[Subject], section: str, instead: dict[str, str]) -> list[Lines]:
    """What each run logged; rank 0 reads it, and every rank has it.

    Args:
        section: that the configurations of such runs have.
        instead: by the section that others have, what shows those.

    Raises:
        UsageError: something is no run, a run of another script, or has logged nothing.
    """
    for subject in subjects:
        if not subject.settings:
            raise UsageError(f"'{subject.source}' is no run's folder (it has no config.yaml): give folders of runs")
        if section not in subject.settings:
            others = [what for key, what in instead.items() if key in subject.settings]
            raise UsageError(
                f"'{subject.source}' is a run of another kind, without the section '{section}'"
                + (f": {others[0].format(source=subject.source)}" if others else ": leave it out")
            )

    def read() -> list[Lines]:
        found = [read_metrics(subject.folder / "metrics.jsonl") for subject in subjects]
        for subject, lines in zip(subjects, found, strict=True):
            if not lines:
                raise UsageError(
                    f"'{subject.folder / 'metrics.jsonl'}' has no line that can be read: let the run take some steps "
                    "first, or leave it out"
                )
        return found

    return distributed.on_rank_zero(read)


def check_one_data_set(subjects: Sequence[Subject]) -> None:
    """See that all runs were trained on one data set: the same root, or the same images in their newest checkpoints.

    Raises:
        UsageError: they were not.
    """

    def check() -> None:
        first, *others = subjects
        for other in others:
            if _root(first) != _root(other) and (_images(first) is None or _images(first) != _images(other)):
                raise UsageError(
                    f"'{first.source}' was trained on data.root={_root(first)} and '{other.source}' on "
                    f"data.root={_root(other)}, and their accuracies are not of the same images: give runs of one "
                    "data set at a time"
                )

    distributed.on_rank_zero(check)


def series(lines: Lines, key: str) -> Series | None:
    """Of the reports of the kind that has ``key`` anywhere; None where none has.

    A report of training that lacks it (its step was rejected) counts as not finite; of two of a step the later holds.
    """
    kinds = {"lr" in line for line in lines if key in line}
    if not kinds:
        return None
    found = {line["step"]: float(line.get(key, np.nan)) for line in lines if key in line or ("lr" in line) in kinds}
    steps = sorted(found)
    return Series(torch.tensor(steps), torch.tensor([found[step] for step in steps], dtype=torch.float64))


def reached(of: Series) -> Reached:
    """Of an accuracy, say."""
    finite = of.values.nan_to_num(-torch.inf)
    best = int(finite.argmax())
    first, last = float(of.values[0]), float(of.values[-1])
    return Reached(first, last, float(of.values[best]), int(of.steps[best]))


def mean_of(seeds: Sequence[Series | None]) -> Curve | None:
    """Mean and standard deviation over ``seeds`` at the steps that all of them have; None where there are none."""
    found = [one for one in seeds if one is not None]
    if len(found) < len(seeds):
        return None
    steps = found[0].steps
    for other in found[1:]:
        steps = steps[torch.isin(steps, other.steps)]
    if not len(steps):
        return None
    values = torch.stack([one.values[torch.isin(one.steps, steps)] for one in found])
    sd = values.std(0) if len(found) > 1 else torch.full_like(values[0], torch.nan)
    return Curve(steps, values.mean(0), sd, len(found))


def spread(share: Curve) -> str:
    """``62.5 ± 0.3 % over 3 runs``, at its last step."""
    return f"{100 * share.mean[-1]:.1f} ± {100 * share.sd[-1]:.1f} % over {share.seeds} runs"


def called(method: str, seeds: int) -> str:
    """A method in a picture's legend."""
    return f"{method} (mean ± sd of {seeds})" if seeds > 1 else method


def smoothed(values: Tensor, window: int) -> Tensor:
    """The mean of the ``window`` values around each (fewer at the ends), of those that are finite; NaN where it is.

    Args:
        values: [T] float64.
        window: odd.
    """
    finite = values.isfinite()
    ones = np.ones(window)
    half = window // 2
    total, count = (
        torch.from_numpy(np.convolve(part.double().numpy(), ones)[half : half + len(values)])
        for part in (values.nan_to_num(0.0), finite)
    )
    return (total / count).where(finite, torch.nan)


def epochs_of(steps: Tensor, lines: Lines) -> Tensor:
    """``steps`` [T] in epochs, float64: training's reports have both, the epoch rounded to 3 digits."""
    reports = [(line["step"], line["epoch"]) for line in lines if line.get("epoch")]
    if not reports:
        return torch.zeros(len(steps), dtype=torch.float64)
    step, epoch = reports[-1]
    return steps.double() / max(1, round(step / epoch))


def draw(axis: Axes, x: Tensor, of: Curve, look: Style, scale: float = 1.0, **options: Any) -> None:
    """A line, with a band of a standard deviation to either side where there are seeds."""
    mean, sd = scale * of.mean, scale * of.sd
    every = max(1, len(x) // 10)
    axis.plot(x, mean, **look._asdict(), markersize=4, markevery=every, **options)
    if of.seeds > 1:
        axis.fill_between(x, mean - sd, mean + sd, color=look.color, alpha=0.2, linewidth=0)


def from_zero(axis: Axes) -> None:
    """Let what is drawn be read off: from 0 up, on a grid."""
    axis.update_datalim([(0.0, 0.0)], updatex=False)
    axis.autoscale_view()
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def by_method(runs: Sequence[R]) -> dict[str, list[R]]:
    """Each method's seeds, in the order of the first ones."""
    methods: dict[str, list[R]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def labels(subjects: Sequence[Subject]) -> dict[str, str]:
    """What each method is called in a picture: the settings that differ between methods, ``alpha 0.1, lr 1e-4``.

    Where those are none, are many or are not enough to tell methods apart, it is its name.
    """
    methods = by_method(subjects)
    settings = [seeds[0].settings for seeds in methods.values()]
    told = {key: values for key, values in differing(settings).items() if not key.startswith(SIDE)}
    last = [key.rpartition(".")[2] for key in told]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(told, last, strict=True)}
    texts = [", ".join(f"{short[key]} {_short(told[key][i])}" for key in told) for i in range(len(methods))]
    usable = 0 < len(told) <= MOST and len(set(texts)) == len(texts)
    return dict(zip(methods, texts if usable else methods, strict=True))


def _short(value: Any) -> str:
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _root(subject: Subject) -> str | None:
    root = subject.settings.get("data", {}).get("root")
    return None if root is None else os.path.realpath(os.path.expanduser(str(root)))


def _images(subject: Subject) -> str | None:
    """The fingerprint of the training images in the newest checkpoint."""
    found, _ = checkpoint.find(subject.folder / "checkpoints")
    return None if found is None else found.state.get("data")


__all__ = [
    "Curve",
    "Lines",
    "Reached",
    "Series",
    "by_method",
    "called",
    "check_one_data_set",
    "draw",
    "epochs_of",
    "from_zero",
    "labels",
    "logged",
    "mean_of",
    "reached",
    "series",
    "smoothed",
    "spread",
]
