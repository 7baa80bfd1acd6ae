"""The table of runs: how their settings differ, what they reached, how far and how fast they went."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any, NamedTuple

from fasttrain.accuracies import attack_text, wilson
from fasttrain.config import flatten
from fasttrain.printable import printable
from fasttrain.report.collect import Found, RunFound, mapping

ACCURACIES = {"knn_top1": "kNN %", "clean_top1": "clean %", "robust_top1": "robust %"}
SETTINGS = 8
"Columns of settings that are shown at once; the others by a click."
SECTIONS = ("script", "source", "terms", "fare", "attack", "run.seed", "optimizer", "data", "model", "train")
"Settings, or sections of them, that runs are told apart by: they come first."
NOT_TOLD = ("run.dir",)
"Settings that differ between any two runs and say nothing."


class Cell(NamedTuple):
    """A value as it is shown and as it sorts; None: it is missing, and sorts last."""

    text: str = ""
    order: float | str | None = None


MISSING = Cell()


class Column(NamedTuple):
    """Of the table."""

    label: str
    cells: list[Cell]
    kind: str = "result"  # or "setting", or "extra": a setting that is shown by a click


def table(found: Found) -> list[Column]:
    """The columns, but for those without any value; the first names the runs."""
    runs = found.runs
    names = Column("run", [word(found.name(run.path)) for run in runs])
    told = [Column(key, list(map(word, values)), "setting") for key, values in differing(runs).items()]
    told = [column._replace(kind="extra") if i >= SETTINGS else column for i, column in enumerate(told)]
    reached = []
    for key, label in ACCURACIES.items():
        values = [[100 * value for value in finite(run, key)] for run in runs]
        reached.append(Column(label, [_share(run, key, v) for run, v in zip(runs, values, strict=True)]))
        if any(v and max(v) != v[-1] for v in values):
            reached.append(Column(f"best {label}", [number(max(v), ".1f") if v else MISSING for v in values]))
    reached.append(Column("robust under", [_attack(run) for run in runs]))
    losses = [finite(run, "loss") for run in runs]
    reached.append(Column("loss", [number(v[-1], ".4g") if v else MISSING for v in losses]))
    reached.append(Column("lowest loss", [number(min(v), ".4g") if v else MISSING for v in losses]))
    states = [state(run) for run in runs]
    machines = [run.environment.get("machine") for run in runs]
    ended = [
        Column("steps", [_steps(run) for run in runs]),
        Column("time in steps", [_time(run) for run in runs]),
        Column("images/s", [_speed(run) for run in runs]),
        Column("state", [word(one) for one in states]),
        Column("machine", [word(one) if one else MISSING for one in machines]),
    ]
    there = [column for column in reached + ended if any(cell is not MISSING for cell in column.cells)]
    return [names, *told, *there] if runs else []


def differing(runs: Sequence[RunFound]) -> dict[str, list[Any]]:
    """Dotted keys of settings whose values differ between those of ``runs`` that have them, with each one's value.

    The names of their terms are a setting too; where each run has one term, these are compared whatever they are
    called. A key that some lack and of which the others have the same value tells nothing that the script, the terms or
    a version do not tell. A run that lacks a key has None. Those of :data:`SECTIONS` come first.
    """
    terms = [mapping(run.settings.get("terms")) for run in runs]
    alone = all(len(one) < 2 for one in terms)
    told = []
    for run, named in zip(runs, terms, strict=True):
        parts = {"*": next(iter(named.values()), {})} if alone and named else named
        names = " + ".join(map(str, named)) or None
        told.append({"script": _script(run), "terms": names, **flatten({**run.settings, "terms": parts})})
    keys = dict.fromkeys(key for one in told for key in one if key not in NOT_TOLD)
    keys = sorted(keys, key=_rank)
    values = {key: [one.get(key) for one in told] for key in keys}
    return {key: each for key, each in values.items() if _differ([one[key] for one in told if key in one])}


def _rank(key: str) -> int:
    """Of a setting, where it stands among the others."""
    return next((i for i, first in enumerate(SECTIONS) if f"{key}.".startswith(f"{first}.")), len(SECTIONS))


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)


def _script(run: RunFound) -> str | None:
    words = str(run.environment.get("command") or "").split()
    return PurePath(words[0]).stem if words else None


def state(run: RunFound) -> str:
    """Done, unfinished, or for a run of before there was an environment.json what its weights tell."""
    if run.environment.get("done"):
        return "done"
    if not run.environment and run.weights_step is not None:
        return "done (weights are there)"
    return "unfinished" if run.environment else "not said"


def finite(run: RunFound, key: str) -> list[float]:
    """Of what a run reported as ``key``, what can be compared."""
    return [line[key] for line in run.metrics if key in line and math.isfinite(line[key])]


def _share(run: RunFound, key: str, percents: list[float]) -> Cell:
    """The last of ``percents``; a robust one with its interval, where the run says of how many images it is."""
    if not percents:
        return MISSING
    images = finite(run, "robust_images") if key == "robust_top1" else []
    if not images:
        return number(percents[-1], ".1f")
    low, high = wilson(round(percents[-1] / 100 * images[-1]), int(images[-1]))
    return Cell(f"{percents[-1]:.1f} ({100 * low:.1f} to {100 * high:.1f})", percents[-1])


def _attack(run: RunFound) -> Cell:
    """What its robust accuracy is of."""
    if not finite(run, "robust_top1"):
        return MISSING
    try:
        told = attack_text(mapping(run.settings.get("robust"))["attack"])
    except (LookupError, TypeError, ValueError):
        return MISSING
    images = finite(run, "robust_images")
    return word(f"{told}, {images[-1]:,.0f} images" if images else told)


def _steps(run: RunFound) -> Cell:
    done = max([line["step"] for line in run.metrics] + [run.weights_step or 0])
    total, about = _total(run, done)
    return Cell(f"{done:,}" if total in (None, done) else f"{done:,} / {about}{total:,}", done)


def _total(run: RunFound, done: int) -> tuple[int | None, str]:
    """Steps that a run shall have, and what to say before it; an epoch's are known by what was reported only."""
    if state(run).startswith("done"):
        return done, ""
    train = mapping(run.settings.get("train"))
    if isinstance(train.get("steps"), int):
        return train["steps"], ""
    last = next((line for line in reversed(run.metrics) if line.get("epoch", 0) > 0), None)
    if last is None or not isinstance(train.get("epochs"), int):
        return None, ""
    return round(train["epochs"] * last["step"] / last["epoch"]), "≈"


def _time(run: RunFound) -> Cell:
    """Seconds of the steps themselves, without evaluations; of a run that says no speed, from start to end."""
    batch = mapping(run.settings.get("train")).get("batch")
    seconds, before = 0.0, 0
    for line in run.metrics:
        if line.get("images_per_second", 0) > 0 and isinstance(batch, int):
            seconds += (line["step"] - before) * batch / line["images_per_second"]
            before = line["step"]
    seconds = seconds or _between(run.environment)
    return Cell(duration(seconds), seconds) if seconds else MISSING


def _between(environment: dict[str, Any]) -> float:
    """Seconds from a run's only start to its end."""
    try:
        started, done = (datetime.fromisoformat(environment[key]) for key in ("started", "done"))
        return 0.0 if environment.get("earlier") else (done - started).total_seconds()
    except (KeyError, TypeError, ValueError):
        return 0.0


def _speed(run: RunFound) -> Cell:
    rates = finite(run, "images_per_second")
    return number(statistics.median(rates), ",.0f") if rates else MISSING


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float, form: str) -> Cell:
    """A cell that sorts by its value."""
    return Cell(format(value, form), value)


def word(value: Any) -> Cell:
    """A cell of whatever a file says: numbers sort as such."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
        return Cell(printable(text), printable(text).casefold())
    return Cell(f"{value:g}" if isinstance(value, float) else str(value), value if abs(value) < math.inf else None)


__all__ = ["Cell", "Column", "differing", "duration", "finite", "number", "state", "table", "word"]
