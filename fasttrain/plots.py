"""The picture of a run, ``curves.png``, made of what it reported::

    loss            the weighted sum of the terms; each report, of one step, faint and their moving mean strong
    terms           where there are several or one has a penalty: unweighted, the penalty λ/2 R in a panel of its own
    accuracies      in percent from 0, over what the encoder had before training and what a guess has
    learning rate   as scheduled

A value that was not finite is a gap in its line, and a cross at the bottom of its panel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch

from fasttrain.accuracies import attack_text, percent
from fasttrain.errors import UsageError
from fasttrain.evaluation.logged import Lines, Series, from_zero, series, smoothed
from fasttrain.figures import panels, png, style
from fasttrain.inherited import settings_of
from fasttrain.output import write_output
from fasttrain.printable import printable
from fasttrain.run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Settings = dict[str, dict[str, Any]]
"The sections of a run's configuration."
Panel = Callable[["Axes"], None]
"Draws into the axes that it is given."

SHARE = 20
"Of a run's reports one in so many is the window of the moving mean."
FLATTENED = 100
"A value that many times the median would press all others to the bottom: the axis is logarithmic then."
FEW = 40
"Fewer reports than these are points."
ABREAST = 3
"Panels in a row."
WIDE = 56
"Letters of a title in a line."
UNITS = {
    "nt_xent": "nats",
    "sup_con": "nats",
    "cross_entropy": "nats",
    "simsiam": "negative cosine",
    "fare": "squared distance",
}
"Of an objective's value."
ACCURACIES = {"knn_top1": "kNN", "clean_top1": "clean", "robust_top1": "robust"}


def curves(run_dir: Path, classes: int | None = None) -> Path:
    """``curves.png`` of the run in ``run_dir``, from its ``metrics.jsonl`` and ``config.yaml``.

    Args:
        classes: of the data set; None: they are not known, and neither is what a guess has.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        settings = settings_of(run_dir)
    except UsageError:  # it names terms and where they began, without which there is a picture all the same
        settings = {}
    path = run_dir / "curves.png"
    picture = figure(read_metrics(run_dir / "metrics.jsonl"), settings, classes)
    write_output(path, png(picture), "free space and run the same command again")
    return path


def figure(lines: Lines, settings: Settings, classes: int | None = None) -> Figure:
    """The picture of what a run reported; where that is nothing, it says so."""
    drawn = [*_losses(lines, settings), *_learning_rate(lines), *_accuracies(lines, settings, classes)]
    columns = min(ABREAST, len(drawn)) or 1
    picture, axes = panels(math.ceil(len(drawn) / columns) or 1, columns)
    for axis, draw in zip_longest(axes.flat, drawn):
        if draw is None:
            axis.set_axis_off()
            continue
        draw(axis)
        axis.set_xlabel(_steps(lines))
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_legend_handles_labels()[0]:  # below, where it hides nothing
            axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
    if not drawn:
        axes[0, 0].text(0.5, 0.5, "nothing was reported that can be read", ha="center", wrap=True)
    return picture


def _losses(lines: Lines, settings: Settings) -> list[Panel]:
    """The total, then each term and what of it is a penalty."""
    rate, total = series(lines, "lr"), series(lines, "loss")
    if rate is None:
        return []
    if total is None:  # each step was rejected
        total = rate._replace(values=torch.full_like(rate.values, torch.nan))
    terms = {name: None for line in lines for name in line if name.startswith("loss/")}
    if not terms:
        one = next(iter(settings.get("terms", {})), "")
        title = f"loss, {one}{_weight(one, settings)}" if one else "loss"
        return [partial(_loss, of=total, title=title, unit=_unit(one, settings))]
    found = [partial(_loss, of=total, title="loss, the weighted sum", unit="loss")]
    for key in terms:
        name = key.removeprefix("loss/")
        term, penalty, weight = series(lines, key), series(lines, f"penalty/{name}"), _weight(name, settings)
        title = f"{name}, its penalty apart{weight}"
        if penalty is None:
            title = f"{name}{weight}"
        else:
            term = term._replace(values=term.values - penalty.values)
        found.append(partial(_loss, of=term, title=title, unit=_unit(name, settings)))
        if penalty is not None:
            found.append(partial(_loss, of=penalty, title=f"penalty of {name}{weight}", unit="loss² per pixel²"))
    return found


def _term(name: str, settings: Settings) -> dict[str, Any]:
    """Objective and weight of the term that reports call ``name``, where the configuration says them."""
    fare, term = settings.get("fare"), settings.get("terms", {}).get(name)
    if fare is not None:
        return {"objective": "fare", "weight": fare.get("alpha") if name == "clean" else 1.0}
    return term if isinstance(term, dict) else {}


def _weight(name: str, settings: Settings) -> str:
    weight = _term(name, settings).get("weight")
    return "" if weight is None else f" (weight {weight})"


def _unit(name: str, settings: Settings) -> str:
    objective = str(_term(name, settings).get("objective", "loss"))
    return f"{objective} ({UNITS[objective]})" if objective in UNITS else objective


def _loss(axis: Axes, of: Series, title: str, unit: str) -> None:
    """Each report faint and their moving mean strong; of few reports each is a point."""
    color = style(0).color
    window = len(of.steps) // SHARE
    window += 1 - window % 2
    if window > 1:
        axis.plot(of.steps, of.values, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(of.steps, smoothed(of.values, window), color=color)
        drawn = f"strong: mean of {window} reports; faint: each, of one step"
    else:
        axis.plot(of.steps, of.values, color=color)
        drawn = "each report, of one step"
    axis.set_title(f"{fill(printable(title), WIDE)}\n{drawn}", fontsize="small", parse_math=False)
    _points(axis, of, color)
    _scale(axis, of, unit)
    _gaps(axis, [of], "reports")


def _scale(axis: Axes, of: Series, unit: str) -> None:
    """From 0, unless a loss may be negative or its greatest value would hide the others."""
    finite = of.values[of.values.isfinite()]
    axis.grid(alpha=0.3)
    if len(finite) and finite.min() > 0 and finite.max() > FLATTENED * finite.median():
        axis.set_yscale("log")
        unit += ", logarithmic"
    elif not len(finite) or finite.min() >= 0:
        from_zero(axis)
    axis.set_ylabel(printable(unit), parse_math=False)


def _points(axis: Axes, of: Series, color: str) -> None:
    """What no line joins to a neighbour, or all where they are few."""
    gap = torch.ones(1, dtype=torch.bool)
    absent = torch.cat([gap, ~of.values.isfinite(), gap])
    alone = ~absent[1:-1] & ((absent[:-2] & absent[2:]) | (len(of.steps) < FEW))
    axis.plot(of.steps[alone], of.values[alone], "o", color=color, markersize=3)


def _gaps(axis: Axes, of: list[Series], what: str) -> None:
    """A cross at the bottom for each value that was not finite, which the legend counts."""
    spoilt = [steps[~values.isfinite()] for steps, values in of]
    total, count = sum(len(values) for _, values in of), sum(map(len, spoilt))
    if count:
        label = f"not finite: {count:,} of {total:,} {what}"
        bottom = axis.get_xaxis_transform()
        axis.plot(torch.cat(spoilt), [0.03] * count, "x", color="black", transform=bottom, label=label, clip_on=False)


def _learning_rate(lines: Lines) -> list[Panel]:
    rate = series(lines, "lr")

    def draw(axis: Axes) -> None:
        axis.plot(rate.steps, rate.values, color=style(0).color)
        _points(axis, rate, style(0).color)
        axis.set_ylabel("learning rate")
        from_zero(axis)

    return [] if rate is None else [draw]


def _accuracies(lines: Lines, settings: Settings, classes: int | None) -> list[Panel]:
    """All in one panel, a marker an evaluation; dashed, what the encoder had before the first step."""
    found = {called: one for key, called in ACCURACIES.items() if (one := series(lines, key)) is not None}
    before = _before(settings)

    def draw(axis: Axes) -> None:
        for number, (called, of) in enumerate(found.items()):
            look, shares = style(number), 100 * of.values
            axis.plot(of.steps, shares, color=look.color, marker=look.marker, markersize=4, label=called)
            first = float(of.values[0])
            if of.steps[0] == 0 and math.isfinite(first):
                label = f"{called}, {before}: {percent(first)}"
                axis.axhline(100 * first, color=look.color, linestyle="--", label=label)
        if classes:
            guess = f"a guess among {classes:,} classes: {percent(1 / classes)}"
            axis.axhline(100 / classes, color="gray", linestyle=":", label=guess)
        axis.set_ylabel("accuracy (%)" if len(found) > 1 else f"{next(iter(found))} accuracy (%)")
        if "robust" in found and (attack := settings.get("robust", {}).get("attack")):
            axis.set_title(fill(f"robust: under {attack_text(attack)}{_images(lines)}", WIDE), fontsize="small")
        from_zero(axis)
        _gaps(axis, list(found.values()), "evaluations")

    return [draw] if found else []


def _images(lines: Lines) -> str:
    """That the robust accuracies are of, where the run says it."""
    counts = [line["robust_images"] for line in lines if "robust_images" in line]
    return f", {counts[-1]:,.0f} images" if counts else ""


def _before(settings: Settings) -> str:
    """What the encoder was before the first step."""
    if "fare" in settings:
        return "the source encoder"
    if settings.get("model", {}).get("weights") is not None:
        return "the weights it began from"
    return "untrained" if "terms" in settings else "before training"


def _steps(lines: Lines) -> str:
    """``step (780 are 20 epochs)``."""
    reports = [line for line in lines if line.get("epoch")]
    return f"step ({reports[-1]['step']:,} are {reports[-1]['epoch']:g} epochs)" if reports else "step"


__all__ = ["curves", "figure"]
