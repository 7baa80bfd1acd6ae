"""Which checkpoints stay."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

from fasttrain.checkpoint import files
from fasttrain.run import RunConfig, is_number, replace_file

METRICS = "metrics.json"
"What evaluations found at a checkpoint's step, beside its files: it comes later than they do."


def prune(folder: Path, newest: Path, config: RunConfig) -> None:
    """Remove all but the last ``keep``, every ``keep_every``-th and the best; ``newest`` is one of the last.

    Those of later steps are what a damaged end of the run left when it went on from an earlier one: they go.
    """
    paths = [path for path in files.steps(folder) if path.name <= newest.name]
    stay = set(paths[: config.keep])
    if config.keep_every:
        stay |= {path for path in paths if _step(path) % config.keep_every == 0}
    if best := best_of(folder, config):
        stay.add(best[1])
    for path in files.steps(folder):
        if path not in stay:
            with suppress(OSError):  # a folder that lets nothing go will say so when it takes nothing in
                files.remove(path)


def mark(folder: Path, step: int, metrics: dict[str, float], config: RunConfig) -> None:
    """Write ``metrics`` beside the checkpoint of ``step``, if there is one, and remove what is now not the best.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / f"step-{step:08d}"
    if path.is_dir():
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        replace_file(path / METRICS, json.dumps(finite))
        prune(folder, path, config)


def best_of(folder: Path, config: RunConfig) -> tuple[float, Path] | None:
    """The best finite value of the metric ``keep_best`` among the checkpoints' own, and the oldest that has it."""
    if config.keep_best is None:
        return None
    scores = []
    for path in reversed(files.steps(folder)):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            value = json.loads((path / METRICS).read_text())[config.best_metric]
            if is_number(value) and math.isfinite(value):
                scores.append((value, path))
    chosen = max if config.best_is_highest else min
    return chosen(scores, key=lambda score: score[0], default=None)


def lacks_best(folder: Path, config: RunConfig) -> bool:
    """Whether ``keep_best`` asks for a checkpoint, and none has a value to choose it by."""
    return config.keep_best is not None and best_of(folder, config) is None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
