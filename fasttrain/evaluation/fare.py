"""FARE over training, from what runs of ``launch/finetune.py`` logged (Yadav & Singhi, figures 2 to 4).

::

    adversarial loss    mean_i ‖φ(zᵢ) − φ_org(xᵢ)‖²        of each report's batch
    clean loss          mean_i ‖φ(xᵢ) − φ_org(xᵢ)‖²
    clean, robust       accuracy of the classifier fitted to φ_org's clean features, every ``robust.every_steps`` steps

Lines are called by the settings that differ between the runs: ``alpha 0.1``, ``lr 1e-4``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from fasttrain.errors import UsageError
from fasttrain.evaluation.accuracy import percent
from fasttrain.evaluation.autoattack import attack_text
from fasttrain.evaluation.evaluation import Evaluation, EvaluationData, SourcesConfig, Subject
from fasttrain.evaluation.logged import (
    Lines,
    Reached,
    Series,
    by_method,
    called,
    check_one_data_set,
    draw,
    from_zero,
    labels,
    logged,
    mean_of,
    reached,
    series,
    smoothed,
    spread,
)
from fasttrain.evaluation.parts import Parts
from fasttrain.evaluation.spread import aligned
from fasttrain.figures import panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = {"adversarial": "loss/adversarial", "clean": "loss/clean"}
"By what they are called here, how a run's reports call them."
ACCURACIES = ("clean_top1", "robust_top1")
INSTEAD = {"terms": "python launch/eval.py views {source} shows what a pretraining logged"}
SHARE = 50
"Of the longest run's reports one in so many is the window of the smoothing, where none is given."


class FareEvaluation(SourcesConfig):
    """Loss and accuracy of adversarial fine-tuning, over training."""

    smoothing: int | None = Field(None, ge=1)
    "reports around each whose mean loss is drawn strong, made odd; 1: none; null: a fiftieth of the longest run's"


class FareRun(NamedTuple):
    """What one run logged."""

    name: str
    method: str  # the label that it shares with other seeds of the same
    losses: dict[str, Series]  # adversarial, clean: unweighted, a squared distance
    accuracies: dict[str, Series]  # clean_top1, robust_top1: shares in [0, 1]; {}: none were measured
    reached: dict[str, Reached]  # of the accuracies; the first is the source's


class FareResult(NamedTuple):
    """Runs of ``launch/finetune.py``, in the order given."""

    runs: list[FareRun]
    window: int  # reports that a smoothed loss is the mean of
    attack: dict[str, Any] | None  # that robust_top1 is measured by, and of how many images; None: it is not
    notes: list[str]


def evaluate(subjects: Sequence[Subject], data: EvaluationData, config: FareEvaluation, parts: Parts) -> FareResult:
    """What the runs logged; no image is read."""
    lines = logged(subjects, "fare", INSTEAD)
    check_one_data_set(subjects)
    names = labels(subjects) if config.names is None else {name: name for name in config.names}
    runs = [of_run(subject, names[subject.method], mine) for subject, mine in zip(subjects, lines, strict=True)]
    longest = max(len(run.losses["adversarial"].steps) for run in runs)
    window = config.smoothing or longest // SHARE
    window += 1 - window % 2
    measured = [subject for subject, run in zip(subjects, runs, strict=True) if run.accuracies]
    notes = [
        f"{run.name} measured no accuracy (robust.every_steps=0), and is among the losses alone: python launch/eval.py "
        f"robust {subject.source} measures what it ended with"
        for subject, run in zip(subjects, runs, strict=True)
        if not run.accuracies
    ]
    return FareResult(runs, window, attack_of(measured), notes)


def of_run(subject: Subject, method: str, lines: Lines) -> FareRun:
    """The run's series.

    Raises:
        UsageError: it has not reported a loss yet.
    """
    losses = {name: found for name, key in LOSSES.items() if (found := series(lines, key)) is not None}
    if "adversarial" not in losses:
        raise UsageError(
            f"'{subject.source}' has reported no {LOSSES['adversarial']}: let it take run.log_every steps first, or "
            "leave it out"
        )
    accuracies = {name: found for name in ACCURACIES if (found := series(lines, name)) is not None}
    return FareRun(subject.name, method, losses, accuracies, {name: reached(one) for name, one in accuracies.items()})


def attack_of(subjects: Sequence[Subject]) -> dict[str, Any] | None:
    """What robust accuracy was measured by: the settings ``robust`` of all ``subjects``, without when.

    Raises:
        UsageError: they were attacked in different ways, or different images were.
    """
    found = [{key: value for key, value in s.settings["robust"].items() if key != "every_steps"} for s in subjects]
    for subject, one in zip(subjects, found, strict=True):
        if one != found[0]:
            raise UsageError(
                f"'{subject.source}' measured robust accuracy by {measured_by(one)} and '{subjects[0].source}' by "
                f"{measured_by(found[0])}: give runs of one robust.attack and robust.images at a time"
            )
    return found[0] if found else None


def measured_by(robust: dict[str, Any]) -> str:
    """``apgd on cross-entropy, linf 8/255, 10 steps, 1,000 images``, of a run's settings ``robust``."""
    images = robust["images"]
    return f"{attack_text(robust['attack'])}, {'all images' if images is None else f'{images:,} images'}"


def lines(found: FareResult) -> list[str]:
    """A row a run: accuracies of the source, at last and at best; ``points``: of clean accuracy, from first to last."""
    rows = [["run", "", "steps", "source", "clean", "points", "best", "at step", "source", "robust", "best", "at step"]]
    for run in found.runs:
        row = [run.name, run.method if run.method != run.name else "", f"{int(run.losses['adversarial'].steps[-1]):,}"]
        for name in ACCURACIES:
            if name not in run.reached:
                row += ["-"] * (5 if name == "clean_top1" else 4)
                continue
            came = run.reached[name]
            gap = [f"{100 * (came.last - came.first):+.1f}"] if name == "clean_top1" else []
            row += [percent(came.first), percent(came.last), *gap, percent(came.best), f"{came.best_step:,}"]
        rows.append(row)
    said = aligned(rows)
    for method, seeds in by_method(found.runs).items():
        for name in ACCURACIES:
            if len(seeds) > 1 and (curve := mean_of([seed.accuracies.get(name) for seed in seeds])) is not None:
                said.append(f"{method}: {name} {spread(curve)}")
    if found.attack is not None:
        said.append(
            f"robust: under {measured_by(found.attack)}, an image that is wrong without an attack counted wrong"
        )
    return said + found.notes


def figure(found: FareResult) -> Figure:
    """Adversarial and clean loss, clean and robust accuracy against the step; a line a method (its seeds' mean)."""
    picture, axes = panels(2, 2)
    methods = by_method(found.runs)
    for axis, name in zip(axes[0], LOSSES, strict=True):
        for number, seeds in enumerate(methods.values()):
            if (curve := mean_of([seed.losses.get(name) for seed in seeds])) is not None:
                if found.window > 1:
                    axis.plot(curve.steps, curve.mean, color=style(number).color, alpha=0.25, linewidth=0.8)
                draw(axis, curve.steps, curve._replace(mean=smoothed(curve.mean, found.window)), style(number))
        axis.set(xlabel="step", ylabel=f"{name} loss (squared distance)")
        strong = f"strong: mean of {found.window} reports; faint: each" if found.window > 1 else ""
        axis.set_title(strong, fontsize="small")
    for axis, name in zip(axes[1], ACCURACIES, strict=True):
        for number, seeds in enumerate(methods.values()):
            if (curve := mean_of([seed.accuracies.get(name) for seed in seeds])) is not None:
                draw(axis, curve.steps, curve, style(number), 100)
        axis.set(xlabel="step", ylabel=f"{name.removesuffix('_top1')} accuracy (%)")
    if found.attack is not None:
        axes[1, 1].set_title(measured_by(found.attack), fontsize="small")
    for axis in axes.flat:
        from_zero(axis)
    handles = [
        axes[0, 0].plot([], [], **style(number)._asdict(), label=called(method, len(seeds)))[0]
        for number, (method, seeds) in enumerate(methods.items())
    ]
    picture.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return picture


EVALUATION = Evaluation(
    FareEvaluation, evaluate, "adversarial fine-tuning over its steps: losses, clean and robust accuracy", lines, figure
)
