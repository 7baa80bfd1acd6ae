"""Pictures of tables; nothing here computes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from fasttrain.output import write_output
from fasttrain.run import read_metrics

PANELS = (("loss", "loss"), ("lr", "learning rate"), ("knn_top1", "kNN accuracy"))


def curves(run_dir: Path, panels: Sequence[tuple[str, str]] = PANELS) -> Path:
    """``curves.png`` of a run: each panel's (metric, title) against the step, from its ``metrics.jsonl``.

    Raises:
        UsageError: it cannot be written.
    """
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
    picture, path = io.BytesIO(), run_dir / "curves.png"
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    write_output(path, picture.getvalue(), "free space and run the same command again")
    return path
