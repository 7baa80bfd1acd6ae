"""What a training state is made of, whatever the number of ranks and the ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.checkpoint import files
from fasttrain.checkpoint.files import Checkpoint, Damaged


class Snapshot(NamedTuple):
    """A training state of its own on the host, whole and by name."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "<state>/<parameter>"
    scalars: dict[str, float]  # optimiser states that are one number for all parameters (Adam's step)
    ranks: dict[str, Tensor]  # "<rank>/<name>": random states, and buffers, which a rank may have of its own
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        """Until the copies from the GPU have arrived."""
        if self.copied is not None:
            self.copied.synchronize()


def snapshot(engine) -> Snapshot | None:
    """Copy what a checkpoint holds to rank 0's host (None on the others); all ranks together.

    From a GPU the copies go to pinned memory in the stream's order, so the next step waits for nothing on the host.
    """
    optimizer, scalars = _gather_optimizer(engine)
    ranks = distributed.all_gather_bytes(safetensors.torch.save(_rank_state(engine.module)))
    if distributed.rank() != 0:
        return None
    model = {name: _to_host(tensor) for name, tensor in engine.module.state_dict().items()}
    own = {
        f"{rank:05d}/{name}": tensor
        for rank, data in enumerate(ranks)
        for name, tensor in safetensors.torch.load(data).items()
    }
    copied = None
    if any(tensor.is_cuda for tensor in engine.module.parameters()):
        copied = torch.cuda.Event()
        copied.record()
    return Snapshot(model, optimizer, scalars, own, copied)


def check_fits(found: Checkpoint, engine) -> None:
    """Whether :func:`restore` can put a checkpoint into ``engine``, by the names and shapes of its tensors.

    Raises:
        Damaged: not; the first name that differs.
    """
    weights = {name: list(tensor.shape) for name, tensor in engine.module.state_dict().items()}
    trained = {name: list(p.shape) for name, p in engine.module.named_parameters() if p.requires_grad}
    optimizer, ranks = found.shapes(files.OPTIMIZER), found.shapes(files.RANKS)
    kinds = {name.partition("/")[0] for name in optimizer}
    _same(files.MODEL, found.shapes(files.MODEL), weights)
    _same(files.OPTIMIZER, optimizer, {f"{kind}/{name}": shape for kind in kinds for name, shape in trained.items()})
    random = {f"{rank:05d}/random.cpu": list(torch.get_rng_state().shape) for rank in range(found.state["world_size"])}
    own = {name: weights[buffer] for name in ranks if (buffer := name.partition("/")[2]) in weights}
    needed = own | random
    _same(files.RANKS, {name: shape for name, shape in ranks.items() if name in needed}, needed)


def _same(file: str, held: dict[str, list[int]], needed: dict[str, list[int]]) -> None:
    for name in sorted(held.keys() | needed.keys()):
        if held.get(name) != needed.get(name):
            raise Damaged(f"{file} has {name} as {held.get(name, 'nothing')}, not {needed.get(name, 'at all')}")


def restore(found: Checkpoint, engine) -> None:
    """Put a checkpoint's weights, optimiser state and, for as many ranks as wrote it, random states into ``engine``."""
    state = found.state
    engine.module.load_state_dict(found.tensors(files.MODEL))
    _scatter_optimizer(engine, found.tensors(files.OPTIMIZER), state["optimizer_scalars"])
    if state["world_size"] == distributed.world_size():
        mine = f"{distributed.rank():05d}/"
        own = {k.removeprefix(mine): v for k, v in found.tensors(files.RANKS).items() if k.startswith(mine)}
        set_random_state({name: own.pop(name) for name in list(own) if name.startswith("random.")})
        engine.module.load_state_dict(own, strict=False)
    else:  # another number of ranks: this one's random state is new, and a function of where it starts
        torch.manual_seed(hash((state["step"], distributed.rank())))
    engine.global_steps = state["step"]
    engine.global_samples = state["step"] * engine.train_batch_size()
    engine.micro_steps = state["step"] * engine.gradient_accumulation_steps()


def random_state() -> dict[str, Tensor]:
    """This rank's, of the host and of its GPU."""
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Go on from what :func:`random_state` returned; a GPU's is left alone where the state has none."""
    torch.set_rng_state(state["random.cpu"])
    if "random.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])


def _rank_state(module: nn.Module) -> dict[str, Tensor]:
    persistent = module.state_dict().keys()
    buffers = {k: _to_host(v) for k, v in module.named_buffers() if k in persistent}
    if any(buffer.is_cuda for buffer in module.buffers()):
        torch.cuda.current_stream().synchronize()  # once for all copies
    return random_state() | buffers


def _to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy; from a GPU it may still be on its way."""
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.clone(memory_format=torch.contiguous_format)
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor.contiguous(), non_blocking=True)


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
    first = distributed.rank() == 0
    gathered = {}
    for name, parameter, stepped, part, place in _shards(engine):
        for key in keys if sharded or first else ():
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if stepped is not None and key in inner.state[stepped]:
                # a channels-last weight's state is flattened in logical order where it has the weight's shape
                whole[part] = inner.state[stepped][key].reshape(-1)[place].float()
            if sharded:
                dist.all_reduce(whole)
            if first:
                whole = whole.view(parameter.shape)
                gathered[f"{key}/{name}"] = _to_host(whole) if whole.is_cuda else whole
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
