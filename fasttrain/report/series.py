"""What runs reported over their steps, thinned so that a page stays small and no extreme is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fasttrain.report.collect import Found

POINTS, FEWEST = 300, 40
"Of a series at most, and at least where there are many."
BUDGET = 200_000
"Points of a whole page."
SHARE = 20
"Of a series one in so many reports is the window of the moving mean."
NO_CURVE = ("step", "epoch", "robust_images")
FIRST = ("loss", "knn_top1", "clean_top1", "robust_top1")
LABELS = {
    "knn_top1": "kNN accuracy (%)",
    "clean_top1": "clean accuracy (%)",
    "robust_top1": "robust accuracy (%)",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "data_wait": "time spent waiting for data (%)",
    "save_seconds": "time to write a checkpoint (s)",
    "save_stall_seconds": "time training waited for a checkpoint (s)",
}


def curves(found: Found) -> dict[str, Any]:
    """As JSON has it: ``metrics`` (key, label, is it smoothed), ``runs`` (name, and of each metric the points).

    A series is ``{"x": steps, "y": values}``, with ``"s"`` the moving mean of the whole series at these steps; a value
    that was not finite is null. ``points`` is how many a series has at most.
    """
    keys = {key: None for run in found.runs for line in run.metrics for key in line if key not in NO_CURVE}
    ordered = [key for key in FIRST if key in keys] + [key for key in keys if key not in FIRST]
    count = sum(any(key in line for line in run.metrics) for run in found.runs for key in ordered)
    points = max(FEWEST, min(POINTS, BUDGET // max(count, 1)))
    runs = []
    for run in found.runs:
        series = {}
        for key in ordered:
            steps = [line["step"] for line in run.metrics if key in line]
            values = [line[key] * (100 if is_share(key) else 1) for line in run.metrics if key in line]
            if steps:
                series[key] = _thinned(steps, values, points, is_loss(key))
        if series:
            runs.append({"name": found.name(run.path), "series": series})
    metrics = [{"key": key, "label": label(key), "smooth": is_loss(key)} for key in ordered]
    return {"metrics": metrics, "runs": runs, "points": points}


def label(key: str) -> str:
    """What a metric is called beside an axis, with its unit."""
    return LABELS.get(key, f"{key} (%)" if is_share(key) else key.replace("/", ": ", 1))


def is_share(key: str) -> bool:
    """Whether it is a share of one, which the page shows in percent."""
    return key.endswith(("_top1", "_top5")) or key == "data_wait"


def is_loss(key: str) -> bool:
    """Whether it is of one batch, and so rough."""
    return key == "loss" or key.startswith(("loss/", "penalty/", "view/"))


def _thinned(steps: list[int], values: list[float], points: int, smooth: bool) -> dict[str, list[Any]]:
    chosen = extremes(values, points)
    series = {"x": [steps[i] for i in chosen], "y": [_short(values[i]) for i in chosen]}
    if smooth:
        means = moving_mean(values, max(1, len(values) // SHARE))
        series["s"] = [_short(means[i]) for i in chosen]
    return series


def extremes(values: Sequence[float], points: int) -> list[int]:
    """Places of at most ``points`` values: of each equal piece the lowest and the highest, and the very ends.

    What is not finite counts as highest, so that it shows.
    """
    if len(values) <= points:
        return list(range(len(values)))
    pieces = max(1, points // 2 - 1)
    bounds = [len(values) * i // pieces for i in range(pieces + 1)]
    ranks = [value if math.isfinite(value) else math.inf for value in values]
    chosen = {0, len(values) - 1}
    for low, high in pairwise(bounds):
        chosen |= {min(range(low, high), key=ranks.__getitem__), max(range(low, high), key=ranks.__getitem__)}
    return sorted(chosen)


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Of each value and those around it, at the ends of fewer; NaN where any of them is not finite."""
    half, means = window // 2, []
    sums, lost = [0.0], [0]
    for value in values:
        good = math.isfinite(value)
        sums.append(sums[-1] + (value if good else 0.0))
        lost.append(lost[-1] + (not good))
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        means.append(math.nan if lost[high] > lost[low] else (sums[high] - sums[low]) / (high - low))
    return means


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


__all__ = ["curves", "extremes", "is_loss", "is_share", "label", "moving_mean"]
