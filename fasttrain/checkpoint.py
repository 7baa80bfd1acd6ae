"""Save, verify, resume; and the export of the backbone alone, which is another thing.

A checkpoint is a directory that either is whole or is not there. All ranks write under a temporary name; every file is
hashed into ``manifest.json`` and fsynced; the directory is renamed, and only then the pointer ``latest`` is replaced::

    checkpoints/
      latest                          the name of the newest checkpoint
      step-00000500/
        manifest.json                 size and SHA-256 of every other file
        state.json                    step, world size, configuration, data fingerprint, loss scale, versions
        model.safetensors             every weight and buffer, whole, under its name in the module
        optimizer.safetensors         every optimiser state, whole: "<state>/<parameter>"
        rank-00000.safetensors        a rank's random state and its own buffers

Weights and optimiser states are stored whole and by name, so any world size and ZeRO stage can read them. Nothing is
pickled, so reading one cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fasttrain
from fasttrain import distributed
from fasttrain.config import Config, differences
from fasttrain.errors import UsageError
from fasttrain.run import Run

T = TypeVar("T")

FORMAT = 1

MAY_CHANGE = (
    "run.",
    "loader.",
    "evaluate.",
    "data.root",
    "data.cache",
    "data.download",
    "train.device",
    "train.zero_stage",
    "train.deepspeed",
    "optimizer.implementation",
)
"Keys that a resumed run may give another value: they do not move the trajectory."


def save(folder: Path, engine, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` (the run's ``checkpoints``); all ranks call it together.

    Args:
        engine: the DeepSpeed engine whose weights, optimiser and random state are saved.
        state: further JSON values, among them ``config``.
        keep: how many of the newest checkpoints stay.

    Raises:
        UsageError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    name = f"step-{step:08d}"
    partial = folder / f".{name}.partial"
    model = {k: v.detach().cpu().contiguous() for k, v in engine.module.state_dict().items()}
    optimizer, scalars = _gather_optimizer(engine)
    first = distributed.rank() == 0

    @_failing_clearly(step, folder)
    def write() -> dict[str, dict[str, Any]]:
        partial.mkdir(parents=True, exist_ok=True)
        mine = {f"rank-{distributed.rank():05d}.safetensors": _rank_state(engine.module)}
        if first:
            mine |= {"model.safetensors": model, "optimizer.safetensors": optimizer}
        for file, tensors in mine.items():
            save_file(tensors, str(partial / file))
        if first:
            record = {
                **state,
                "format": FORMAT,
                "step": step,
                "world_size": distributed.world_size(),
                "optimizer_scalars": scalars,
                "versions": versions(),
            }
            (partial / "state.json").write_text(json.dumps(record, indent=1))
            mine["state.json"] = {}
        return {file: _seal(partial / file) for file in mine}

    if first:
        shutil.rmtree(partial, ignore_errors=True)
    if distributed.world_size() > 1:
        dist.barrier()
    manifest = {
        file: seal for part in distributed.all_gather_object(distributed.agree(write)) for file, seal in part.items()
    }

    @_failing_clearly(step, folder)
    def publish() -> None:
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _sync(partial / "manifest.json")
        _sync(partial)
        final = folder / name
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        pointer = folder / ".latest.partial"
        pointer.write_text(name)
        _sync(pointer)
        os.replace(pointer, folder / "latest")
        _sync(folder)
        for old in _checkpoints(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)

    distributed.on_rank_zero(publish)
    return folder / name


def _failing_clearly(step: int, folder: Path) -> Callable[[Callable[[], T]], Callable[[], T]]:
    """What fails to write raises :class:`UsageError`, which the ranks then share."""

    def decorate(work: Callable[[], T]) -> Callable[[], T]:
        def guarded() -> T:
            try:
                return work()
            except (OSError, SafetensorError) as error:
                raise UsageError(
                    f"the checkpoint of step {step} cannot be written to {folder} ({error}): free space or mend the "
                    "folder and run the same command again; the previous checkpoint is untouched"
                ) from error

        return guarded

    return decorate


def find(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in ``folder`` (None when it has none at all), and a line for each that is damaged.

    Every file's size and hash is checked before anything of it is used.

    Raises:
        UsageError: there are checkpoints and none is whole; a run never starts over silently.
    """
    complaints = []
    for path in _checkpoints(folder):
        damage = verify(path)
        if damage is None:
            return path, complaints
        complaints.append(f"checkpoint {path} is damaged and passed over: {damage}")
    if complaints:
        raise UsageError(
            f"no checkpoint in {folder} is whole ({complaints[0]}): restore one, or start over with another run.dir"
        )
    return None, []


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``, or None; every file's size and hash are compared."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for file, seal in manifest.items():
            if Path(file).name != file:
                return f"its manifest names a file outside it ({file})"
            if (size := (path / file).stat().st_size) != seal["size"]:
                return f"{file} has {size} bytes, not {seal['size']}"
            if _digest(path / file) != seal["sha256"]:
                return f"{file} does not match its SHA-256"
        needed = {"state.json", "model.safetensors", "optimizer.safetensors"} - manifest.keys()
        return f"its manifest lacks {', '.join(sorted(needed))}" if needed else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        UsageError: it was written in a format this version does not know.
    """
    state = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise UsageError(
            f"{path} has format {state['format']}, this version reads {FORMAT}: use the version that wrote it"
        )
    return state


def contradictions(config: Config, state: dict[str, Any]) -> list[str]:
    """Keys by which ``config`` would leave the trajectory of the checkpoint, each as ``key: saved -> asked``."""
    return [line for line in differences(config, state["config"]) if not line.startswith(MAY_CHANGE)]


def resume(run: Run, engine, config: Config, data: str, loss_scale=None) -> int:
    """Put ``engine`` where the run's newest whole checkpoint left it, and return its step; 0 when there is none.

    Args:
        data: fingerprint of the training split, which must be the one that the checkpoint saw.

    Raises:
        UsageError: no checkpoint is whole, or the configuration or the data contradict it.
    """
    path, complaints = distributed.on_rank_zero(lambda: find(run.checkpoints))
    for line in complaints:
        run.say(f"WARNING: {line}")
    if path is None:
        return 0
    state = read_state(path)
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
    restore(path, engine, state)
    if loss_scale is not None:
        loss_scale.load(state["loss_scale"])
    run.say(f"going on from {path}")
    return state["step"]


def restore(path: Path, engine, state: dict[str, Any]) -> None:
    """Put a verified checkpoint's weights, optimiser state and random state into ``engine``."""
    engine.module.load_state_dict(load_file(str(path / "model.safetensors")))
    _scatter_optimizer(engine, load_file(str(path / "optimizer.safetensors")), state["optimizer_scalars"])
    mine = path / f"rank-{distributed.rank():05d}.safetensors"
    if mine.exists() and state["world_size"] == distributed.world_size():
        tensors = load_file(str(mine))
        torch.set_rng_state(tensors.pop("random.cpu"))
        if (cuda := tensors.pop("random.cuda", None)) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)
        engine.module.load_state_dict(tensors, strict=False)
    else:  # another number of ranks: this one's random state is new, and a function of where it starts
        torch.manual_seed(hash((state["step"], distributed.rank())))
    engine.global_steps = state["step"]
    engine.global_samples = state["step"] * engine.train_batch_size()
    engine.micro_steps = state["step"] * engine.gradient_accumulation_steps()


def versions() -> dict[str, str]:
    """Versions that a run depends on."""
    import deepspeed

    return {
        "fasttrain": fasttrain.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step-*"), key=lambda path: path.name, reverse=True)


def _rank_state(module: nn.Module) -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    persistent = module.state_dict().keys()
    return state | {k: v.detach().cpu().clone() for k, v in module.named_buffers() if k in persistent}


def _shards(engine) -> Iterator[tuple[str, nn.Parameter, Tensor | None, slice, slice]]:
    """(name, parameter, the tensor the optimiser steps, part of the flat parameter, where it lies in that tensor).

    Without ZeRO the optimiser steps the parameter itself. Under ZeRO 1 and 2 it steps a flat fp32 partition of which a
    parameter is a fragment, or has no part on this rank (None).
    """
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if not hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
            whole = slice(0, parameter.numel())
            yield name, parameter, parameter, whole, whole
            continue
        fragment = parameter._hp_mapping
        if fragment is None:
            yield name, parameter, None, slice(0), slice(0)
            continue
        here, there = fragment.lp_fragment_address, fragment.hp_fragment_address
        stepped = engine.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
        yield (
            name,
            parameter,
            stepped,
            slice(here.start, here.start + here.numel),
            slice(there.start, there.start + there.numel),
        )


def _gather_optimizer(engine) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Optimiser states, whole, on rank 0's host (empty elsewhere); and those that are one number (Adam's step)."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    sample = {k: v for state in inner.state.values() for k, v in state.items()}
    keys = sorted(k for k, v in sample.items() if torch.is_tensor(v) and v.ndim > 0)
    scalars = {k: float(v) for k, v in sample.items() if k not in keys and v is not None}
    scalars |= {k: float(inner.param_groups[0][k]) for k in ("step",) if k in inner.param_groups[0]}
    sharded = hasattr(engine.optimizer, "single_partition_of_fp32_groups") and distributed.world_size() > 1
    gathered = {}
    for name, parameter, stepped, part, place in _shards(engine):
        for key in keys:
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if stepped is not None and key in inner.state[stepped]:
                # a channels-last weight's state is flattened in logical order where it has the weight's shape
                whole[part] = inner.state[stepped][key].reshape(-1)[place].float()
            if sharded:
                dist.all_reduce(whole)
            if distributed.rank() == 0:
                gathered[f"{key}/{name}"] = whole.view(parameter.shape).cpu()
    return gathered, scalars


def _scatter_optimizer(engine, tensors: dict[str, Tensor], scalars: dict[str, float]) -> None:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    keys = sorted({name.partition("/")[0] for name in tensors})
    states: dict[Tensor, dict[str, Any]] = {}
    for name, parameter, stepped, part, place in _shards(engine):
        if stepped is None:
            continue
        for key in keys:
            whole = tensors[f"{key}/{name}"].reshape(-1).to(parameter.device)
            state = states.setdefault(stepped, {})
            if stepped is parameter:
                state[key] = torch.empty_like(parameter).copy_(whole.view(parameter.shape))
            else:
                state.setdefault(key, torch.zeros_like(stepped))[place] = whole[part]
    position = {p: i for i, p in enumerate(p for group in inner.param_groups for p in group["params"])}
    inner.load_state_dict(
        {
            "state": {
                position[p]: state | {k: torch.tensor(v, dtype=torch.float32) for k, v in scalars.items()}
                for p, state in states.items()
            },
            "param_groups": inner.state_dict()["param_groups"],
        }
    )
    if hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()


def _seal(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
