"""Where a run goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain import distributed
from fasttrain.checkpoint import files
from fasttrain.checkpoint.files import Checkpoint
from fasttrain.checkpoint.state import check_fits, restore
from fasttrain.config import Config, differences
from fasttrain.errors import UsageError
from fasttrain.run import Run

MAY_CHANGE = (
    "run.",
    "loader.",
    "evaluate.",
    "data.root",
    "data.cache",
    "data.download",
    "train.device",
    "train.deterministic",
    "train.zero_stage",
    "train.deepspeed",
    "train.on_non_finite",
    "train.max_skipped",
    "optimizer.implementation",
)
"Keys that a resumed run may give another value: they do not move the trajectory."
MAY_NOT = "run.seed"
KEYS = {"config": dict, "data": str, "skipped": int}
"What a run needs of its checkpoint's ``state.json``, beside what every one has."


class Start(NamedTuple):
    """Where training begins."""

    step: int = 0
    skipped: int = 0  # steps before it that were skipped since something was not finite


def resume(run: Run, engine, config: Config, data: str, loss_scale=None) -> Start:
    """Put ``engine`` where the run's newest whole checkpoint left it; ``Start(0)`` when there is none.

    Rank 0 reads and checks, and sends the others the bytes it checked: the disk is read once, whatever the number of
    ranks, and nothing can change between the check and the use.

    Args:
        data: fingerprint of the training split, which must be the one that the checkpoint saw.

    Raises:
        UsageError: no checkpoint is whole, or the configuration or the data contradict it.
    """
    began = time.perf_counter()

    def check(found: Checkpoint) -> None:
        """Only of what was begun with the same settings; else those are the mistake, and found below."""
        files.require(found.state, KEYS | ({"loss_scale": dict} if loss_scale is not None else {}))
        if found.state["data"] == data and not contradictions(config, found.state):
            check_fits(found, engine)

    found, complaints = distributed.agree(
        lambda: files.find(run.checkpoints, check) if distributed.rank() == 0 else (None, [])
    )
    for line in complaints:
        run.say(f"WARNING: {line}")
    found = _everywhere(found)
    if found is None:
        return Start()
    read, state = time.perf_counter(), found.state
    if lines := contradictions(config, state):
        raise UsageError(
            f"run.dir={run.dir} was begun with other settings ({'; '.join(lines)}): "
            "give the saved values, or choose another folder with run.dir=…",
            everywhere=True,
        )
    if state["data"] != data:
        raise UsageError(
            f"run.dir={run.dir} was begun on other images (data fingerprint {state['data'][:12]}, now {data[:12]}): "
            "give the same data set and manifest, or choose another folder with run.dir=…",
            everywhere=True,
        )
    restore(found, engine)
    if loss_scale is not None:
        loss_scale.load(state["loss_scale"])
    ended = time.perf_counter()
    run.say(f"going on from {found.path} (read and checked in {read - began:.1f} s, in place in {ended - read:.1f} s)")
    return Start(state["step"], state["skipped"])


def contradictions(config: Config, state: dict[str, Any]) -> list[str]:
    """Keys by which ``config`` would leave the trajectory of the checkpoint, each as ``key: saved -> asked``."""
    return [
        line
        for line in differences(config, state["config"])
        if not line.startswith(MAY_CHANGE) or line.startswith(f"{MAY_NOT}:")
    ]


def _everywhere(found: Checkpoint | None) -> Checkpoint | None:
    """Rank 0's checkpoint on all ranks."""
    path = distributed.on_rank_zero(lambda: found and str(found.path))
    if path is None:
        return None
    parts = {name: distributed.broadcast_bytes(found.files[name] if found else b"") for name in files.FILES}
    return Checkpoint(Path(path), parts)
