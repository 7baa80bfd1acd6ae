"""Pictures of tables; nothing here computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fasttrain.run import read_metrics

PANELS = (("loss", "loss"), ("lr", "learning rate"), ("knn_top1", "kNN accuracy"))


def curves(run_dir: Path, panels: Sequence[tuple[str, str]] = PANELS) -> Path:
    """``curves.png`` of a run: each panel's (metric, title) against the step, from its ``metrics.jsonl``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = read_metrics(run_dir / "metrics.jsonl")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        axis.plot(
            *(zip(*points, strict=True) if points else ((), ())), marker="o" if len(points) < 40 else None, markersize=3
        )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(run_dir / "curves.png", dpi=120)
    pyplot.close(figure)
    return run_dir / "curves.png"
