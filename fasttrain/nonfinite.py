"""A step whose loss or gradient is not finite: nothing of it is kept but the evidence.

All ranks decide together. A loss that is not finite on any of them makes the gradient NaN on all; DeepSpeed averages
gradients before the step, so one norm settles the rest. What is undone: weights, optimiser state and buffers
(BatchNorm's running statistics, an adversary's count of its calls) are bit for bit as they were before the step. What
is not: the step counts, its images are used up, and the random state has moved on.

On a GPU the norm is not read where it is found, which would make the host wait for the backward pass of every step: a
:class:`Gate` there lets the optimiser move nothing from the first gradient on that is not finite, the host learns of it
with the next step's loss, and takes that step again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.checkpoint.state import random_state, set_random_state
from fasttrain.errors import UsageError
from fasttrain.run import Run

STEP, WEIGHTS, RANDOM = "step.json", "weights.safetensors", "random.safetensors"
"Files of a bundle: what the step was, and the weights and each rank's random state before it."


class Gate:
    """Takes optimiser steps while gradients are finite; after one that is not, none moves anything until :meth:`open`.

    ``shut`` is where the gradients are: 0, or 1 from a gradient on whose norm is not finite. Where the optimiser reads
    such a flag itself (:class:`~fasttrain.optim.LARS`, torch's fused ones, on a GPU), nothing waits for it, and the
    gate ``defers``: whoever takes steps looks at ``shut`` later. Elsewhere the flag is read before the step. In fp16
    overflows are the loss scale's affair, and the gate stays open.

    Gradients are clipped here, too: c = min(1, clip / (norm + 1e-6)). DeepSpeed's own clipping reads the norm on the
    host; so does its ZeRO optimiser, which is told not to where the gate defers.

    Args:
        engine: DeepSpeed's.
        clip: largest norm of the gradient, 0 for no limit. Under ZeRO without deferring DeepSpeed clips.
        scaled: the loss is scaled (fp16).
        defers: ``None``: on a GPU.
    """

    def __init__(self, engine, clip: float = 0.0, scaled: bool = False, defers: bool | None = None) -> None:
        self._engine, self._clip, self._scaled = engine, clip, scaled
        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self._zero = engine.optimizer if hasattr(engine.optimizer, "overflow") else None
        optimizer = engine.optimizer if self._zero is None else self._zero.optimizer
        device = self._parameters[0].device
        self.shut = torch.zeros((), device=device)
        able = getattr(optimizer, "_step_supports_amp_scaling", False) and not scaled
        if self._zero is not None:  # of a DeepSpeed that can be told not to look
            told = all(hasattr(self._zero, name) for name in ("check_grad_overflow", "compute_grad_norm"))
            able = able and told and not self._zero.cpu_offload
        self.defers = able and (device.type == "cuda" if defers is None else defers)
        if self.defers:
            optimizer.found_inf = self.shut
            if self._zero is not None:
                self._zero.check_grad_overflow = self._zero.compute_grad_norm = False
                self._zero.clip_grad = 0.0

    def step(self) -> None:
        """``engine.step()``."""
        engine = self._engine
        if engine.is_gradient_accumulation_boundary() and not self._judge():
            engine.zero_grad()
            engine.micro_steps += 1
            engine.global_steps += 1
            engine.global_samples += engine.train_batch_size()
            return
        engine.step()
        if self._zero is not None and not self.defers and not self._scaled:
            self.shut.fill_(float(self._zero.overflow))

    def is_shut(self) -> bool:
        """Read on the host, which waits for the backward pass."""
        return bool(self.shut)

    def open(self) -> None:
        """Let the next steps through."""
        self.shut.zero_()

    def _judge(self) -> bool:
        """Look at the gradient, and clip it; whether the optimiser is to be called."""
        if self._zero is not None:
            if self.defers:
                self._look_at(
                    [g for part in self._zero.averaged_gradients.values() for g in part or () if g is not None]
                )
            return True
        _lay_out(self._parameters)
        gradients = [p.grad for p in self._parameters]
        if self._scaled:
            if self._clip:
                self._engine.torch_autocast_z0_gradscaler.unscale_(self._engine.optimizer)
                self._clipped(gradients, torch.nn.utils.get_total_norm(gradients))
            return True
        self._look_at(gradients)
        return self.defers or not self.is_shut()

    def _look_at(self, gradients: list[Tensor]) -> None:
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(self.shut)
        if self._zero is not None and distributed.world_size() > 1:  # each rank has its own part of the gradient
            square = norm.square()
            dist.all_reduce(square)
            norm = square.sqrt()
        torch.maximum(self.shut, 1 - norm.isfinite().float(), out=self.shut)
        self._clipped(gradients, norm)

    def _clipped(self, gradients: list[Tensor], norm: Tensor) -> None:
        if self._clip and gradients:
            torch._foreach_mul_(gradients, (self._clip / (norm + 1e-6)).clamp(max=1.0))


def _lay_out(parameters: Iterable[Tensor]) -> None:
    """Give each parameter a gradient (0 where no loss reached it), in its own memory format.

    CUDA's fused optimisers refuse others, and DeepSpeed's zeros are contiguous.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        elif any(a != b and n > 1 for a, b, n in zip(p.grad.stride(), p.stride(), p.shape, strict=True)):
            p.grad = torch.empty_like(p).copy_(p.grad)


class Taken(NamedTuple):
    """An optimiser step that was taken."""

    step: int
    seen: list[Tensor]  # of each micro-batch, the positions in the data set
    losses: list[Tensor]  # and this rank's loss


class _Begun(NamedTuple):
    """What a step may have to be put back to."""

    step: int
    random: dict[str, Tensor]
    buffers: list[list[Tensor]]


class Guard:
    """Keeps what the last two steps may have to be put back to, and decides by ``train.on_non_finite``.

    Args:
        config: the run's whole configuration.
        data: fingerprint of the training images.
        skipped: steps that were skipped before.
    """

    def __init__(self, run: Run, engine, config: Any, data: str, skipped: int) -> None:
        self._run, self._engine, self._config, self._data = run, engine, config, data
        self.skipped = skipped
        self._buffers = _by_kind(engine.module)
        self._begun: list[_Begun] = []

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Before a step, which may be taken again."""
        self._begun = [begun for begun in self._begun if begun.step < step]
        spare = self._begun.pop(0).buffers if len(self._begun) == 2 else None
        if spare is None:
            spare = [[torch.empty_like(buffer) for buffer in buffers] for buffers in self._buffers]
        for saved, buffers in zip(spare, self._buffers, strict=True):
            torch._foreach_copy_(saved, buffers)
        self._begun.append(_Begun(step, random_state(), spare))

    @torch.no_grad()
    def reject(self, taken: Taken, what: str) -> None:
        """Undo one of the last two steps and keep the evidence; return to go on without it. All ranks together.

        Where a later one was begun it is to be taken again, and its random state is restored.

        Args:
            what: "its loss is nan", say.

        Raises:
            UsageError: the policy is to stop, or ``train.max_skipped`` steps were skipped before.
        """
        begun, *later = [begun for begun in self._begun if begun.step >= taken.step]
        for saved, buffers in zip(begun.buffers, self._buffers, strict=True):
            torch._foreach_copy_(buffers, saved)
        self.skipped += 1
        train, optimizer = self._config.train, self._config.optimizer
        evidence = self._record(begun, taken, what)
        for begun in later:
            set_random_state(begun.random)
        if train.on_non_finite == "skip" and self.skipped <= train.max_skipped:
            self._run.say(f"WARNING: {what}: skipped, the {self.skipped}. of {train.max_skipped} allowed; {evidence}")
            return
        warmup = "optimizer.warmup_steps" if optimizer.warmup_steps else "optimizer.warmup_epochs"
        limit = f" ({self.skipped - 1} were skipped before)" if train.on_non_finite == "skip" else ""
        raise UsageError(
            f"{what}: training stopped before the update{limit}; {evidence}; lower optimizer.lr, lengthen {warmup} or "
            "use train.precision=fp32",
            everywhere=True,
        )

    def _record(self, begun: _Begun, taken: Taken, what: str) -> str:
        """Write the bundle, and say where it is."""
        folder = self._run.dir / f"not-finite-step-{taken.step:08d}"
        ranks = distributed.all_gather_object(
            {"index": [index.tolist() for index in taken.seen], "loss": [float(loss) for loss in taken.losses]}
        )
        random = distributed.all_gather_bytes(safetensors.torch.save(begun.random))
        report = {
            "step": taken.step,
            "what": what,
            "data": self._data,
            "schema": type(self._config).__name__,
            "config": self._config.model_dump(mode="json"),
            "ranks": ranks,
        }

        def write() -> str:
            try:
                folder.mkdir(exist_ok=True)
                (folder / STEP).write_text(json.dumps(report))
                weights = {
                    k: v.detach().cpu().clone().contiguous() for k, v in self._engine.module.state_dict().items()
                }
                safetensors.torch.save_file(weights, str(folder / WEIGHTS))
                states = {f"{r:05d}/{k}": v for r, x in enumerate(random) for k, v in safetensors.torch.load(x).items()}
                safetensors.torch.save_file(states, str(folder / RANDOM))
            except (OSError, safetensors.SafetensorError) as error:
                return f"the evidence cannot be written to {folder} ({error})"
            return f"to see where it comes from: python launch/replay.py {folder}"

        return distributed.on_rank_zero(write)


def read_bundle(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What the step was; the weights before it; each rank's random state, "<rank>/<name>".

    Raises:
        UsageError: there is no bundle in ``folder``, or not all of one.
    """
    try:
        step = json.loads((folder / STEP).read_text())
        for key, kind in {"step": int, "what": str, "data": str, "schema": str, "config": dict, "ranks": list}.items():
            if not isinstance(step[key], kind):
                raise ValueError(f"'{key}' in {STEP} is {step[key]!r}"[:200])
        if not step["ranks"] or not all(isinstance(part, list) for rank in step["ranks"] for part in rank["index"]):
            raise ValueError(f"'ranks' in {STEP} have no lists of images")
        weights, random = (safetensors.torch.load((folder / name).read_bytes()) for name in (WEIGHTS, RANDOM))
        missing = {f"{rank:05d}/random.cpu" for rank in range(len(step["ranks"]))} - random.keys()
        if missing:
            raise ValueError(f"{RANDOM} lacks {min(missing)}")
        return step, weights, random
    except KeyError as error:
        reason = f"{STEP} lacks {error}"
    except (OSError, ValueError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
    raise UsageError(f"bundle={folder} cannot be read ({reason}): give a run's not-finite-step-… folder, whole")


def unusable(state: dict[str, Tensor]) -> str | None:
    """The first of these weights and buffers that makes features NaN, and how; None where all are usable."""
    for name, tensor in state.items():
        count = int((~tensor.isfinite()).sum())
        if count:
            return f"{name} is not finite ({count:,} of {tensor.numel():,} values)"
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f"{name}, a variance, is negative ({int((tensor < 0).sum()):,} of {tensor.numel():,} values)"
    return None


def _by_kind(module: nn.Module) -> list[list[Tensor]]:
    """Its buffers by dtype and device, as one fused copy takes them."""
    kinds: dict[Any, list[Tensor]] = defaultdict(list)
    for buffer in module.buffers():
        kinds[buffer.dtype, buffer.device].append(buffer)
    return list(kinds.values())


__all__ = ["RANDOM", "STEP", "WEIGHTS", "Gate", "Guard", "Taken", "read_bundle", "unusable"]
