"""Pictures of a run; nothing here computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fasttrain.figures import panels as panels_of
from fasttrain.figures import png
from fasttrain.output import write_output
from fasttrain.run import read_metrics

PANELS = (("loss", "loss"), ("lr", "learning rate"), ("knn_top1", "kNN accuracy"))


def curves(run_dir: Path, panels: Sequence[tuple[str, str]] = PANELS) -> Path:
    """``curves.png`` of a run: each panel's (metric, title) against the step, from its ``metrics.jsonl``.

    Raises:
        UsageError: it cannot be written.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl")
    figure, axes = panels_of(1, len(panels), 4, 3.2)
    for axis, (key, title) in zip(axes[0], panels, strict=True):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        axis.plot(
            *(zip(*points, strict=True) if points else ((), ())), marker="o" if len(points) < 40 else None, markersize=3
        )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    path = run_dir / "curves.png"
    write_output(path, png(figure), "free space and run the same command again")
    return path
