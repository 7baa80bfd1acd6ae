"""Where a run goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain import distributed
from fasttrain.checkpoint import files
from fasttrain.checkpoint.files import Checkpoint
from fasttrain.checkpoint.state import check_fits, restore
from fasttrain.config import Config, differences, listed
from fasttrain.errors import UsageError
from fasttrain.run import Run

MAY_CHANGE = (
    "run.",
    "loader.",
    "evaluate.",
    "export.",
    "data.root",
    "data.by_content",
    "data.cache",
    "data.download",
    "train.device",
    "train.deterministic",
    "train.cuda_graph",
    "train.zero_stage",
    "train.deepspeed",
    "train.on_non_finite",
    "train.max_skipped",
    "optimizer.implementation",
)
"Keys that a resumed run may give another value: they do not move the trajectory."
MAY_NOT = "run.seed"
LENGTH = ("train.epochs:", "train.steps:")
"Of a schedule that does not depend on its length these may change too."
KEYS = {"config": dict, "data": str, "skipped": int}
"What a run needs of its checkpoint's ``state.json``, beside what every one has."


class Start(NamedTuple):
    """Where training begins."""

    step: int = 0
    skipped: int = 0  # steps before it that were skipped since something was not finite


def resume(run: Run, engine, config: Config, data: str, steps: int, loss_scale=None) -> Start:
    """Put ``engine`` where the run's newest whole checkpoint left it; ``Start(0)`` when there is none.

    Rank 0 reads and checks, and sends the others the bytes it checked: the disk is read once, whatever the number of
    ranks, and nothing can change between the check and the use.

    Args:
        data: fingerprint of the training split, which must be the one that the checkpoint saw.
        steps: that the run is to have taken at its end, at least those of the checkpoint.

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
    ours, theirs = _script(config.model_dump()), _script(state["config"])
    if theirs != ours:
        raise UsageError(
            f"run.dir={run.dir} is the folder of a run of {theirs}, and this is {ours}: choose another with run.dir=…",
            everywhere=True,
        )
    if lines := contradictions(config, state):
        raise UsageError(
            f"run.dir={run.dir} was begun with other settings ({listed(lines)}): "
            "give the saved values, or choose another folder with run.dir=…" + _longer(run, config, lines),
            everywhere=True,
        )
    if steps < state["step"]:
        raise UsageError(
            f"run.dir={run.dir} has taken {state['step']} steps, and train.steps or train.epochs ask for {steps}: ask "
            "for no fewer, or choose another folder with run.dir=…",
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


def _script(config: dict[str, Any]) -> str:
    """The script whose configuration this is, by what its runs alone are told."""
    return "launch/finetune.py" if "fare" in config else "launch/pretrain.py"


def contradictions(config: Config, state: dict[str, Any]) -> list[str]:
    """Keys by which ``config`` would leave the trajectory of the checkpoint, each as ``key: saved -> asked``."""
    may_change = MAY_CHANGE if config.optimizer.depends_on_total else MAY_CHANGE + LENGTH
    return [
        line
        for line in differences(config, _completed(config, state["config"]))
        if not line.startswith(may_change) or line.startswith(f"{MAY_NOT}:")
    ]


def _completed(config: Config, saved: dict[str, Any]) -> dict[str, Any]:
    """``saved`` with the defaults of the settings that the version that wrote it did not have."""
    complete = dict(saved)
    for name, field in type(config).model_fields.items():
        section = getattr(config, name)
        if isinstance(section, Config) and isinstance(saved.get(name, {}), dict):
            complete[name] = _completed(section, saved.get(name, {}))
        elif name not in saved and not field.is_required():
            complete[name] = json.loads(json.dumps(field.get_default(call_default_factory=True)))
    return complete


def _longer(run: Run, config: Config, lines: list[str]) -> str:
    """How a run whose schedule ends with it is made longer, where that was asked for."""
    if not any(line.startswith(LENGTH) for line in lines):
        return ""
    start = "source" if "source" in type(config).model_fields else "model.weights"
    return (
        f"; with optimizer.schedule={config.optimizer.schedule} a run cannot be made longer, since the learning rates "
        f"of the steps it took follow from its length: start another from its weights, {start}={run.dir} run.dir=…"
    )


def _everywhere(found: Checkpoint | None) -> Checkpoint | None:
    """Rank 0's checkpoint on all ranks."""
    path = distributed.on_rank_zero(lambda: found and str(found.path))
    if path is None:
        return None
    parts = {name: distributed.broadcast_bytes(found.files[name] if found else b"") for name in files.FILES}
    return Checkpoint(Path(path), parts)
