"""A step whose loss or gradient is not finite: nothing of it is kept but the evidence.

All ranks decide together. A loss that is not finite on any of them makes the gradient NaN on all; DeepSpeed averages
gradients before the step, so one norm settles the rest. What is undone: weights, optimiser state and buffers
(BatchNorm's running statistics, an adversary's count of its calls) are bit for bit as they were before the step. What
is not: the step counts, its images are used up, and the random state has moved on.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.checkpoint.state import random_state
from fasttrain.errors import UsageError
from fasttrain.run import Run

STEP, WEIGHTS, RANDOM = "step.json", "weights.safetensors", "random.safetensors"
"Files of a bundle: what the step was, and the weights and each rank's random state before it."


def step_if_finite(engine) -> bool:
    """``engine.step()``; False where the gradient was not finite, and then no weight or optimiser state has moved.

    DeepSpeed's ZeRO optimisers and fp16's loss scaler look at the gradient themselves. Without them its norm is read
    here, which waits for the backward pass.
    """
    if not engine.is_gradient_accumulation_boundary() or engine.torch_autocast_z0_gradscaler is not None:
        engine.step()
        return True
    if hasattr(engine.optimizer, "overflow"):
        engine.step()
        return not engine.optimizer.overflow
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if torch.nn.utils.get_total_norm(gradients).isfinite():
        engine.step()
        return True
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()
    return False


class Guard:
    """Keeps what a step may have to be put back to, and decides by ``train.on_non_finite``.

    Args:
        config: the run's whole configuration.
        data: fingerprint of the training images.
        skipped: steps that were skipped before.
    """

    def __init__(self, run: Run, engine, config: Any, data: str, skipped: int) -> None:
        self._run, self._engine, self._config, self._data = run, engine, config, data
        self.skipped = skipped
        self._buffers = _by_kind(engine.module)
        self._before = [[buffer.clone() for buffer in buffers] for buffers in self._buffers]

    def begin(self) -> None:
        """Before a step."""
        self._random = random_state()
        with torch.no_grad():
            for saved, buffers in zip(self._before, self._buffers, strict=True):
                torch._foreach_copy_(saved, buffers)

    def reject(self, step: int, what: str, seen: list[Tensor], losses: list[Tensor]) -> None:
        """Undo the step and keep the evidence; return to go on without it. All ranks together.

        Args:
            what: "its loss is nan", say.
            seen, losses: of each micro-batch, the positions in the data set and this rank's loss.

        Raises:
            UsageError: the policy is to stop, or ``train.max_skipped`` steps were skipped before.
        """
        with torch.no_grad():
            for saved, buffers in zip(self._before, self._buffers, strict=True):
                torch._foreach_copy_(buffers, saved)
        self.skipped += 1
        train, optimizer = self._config.train, self._config.optimizer
        evidence = self._record(step, what, seen, losses)
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

    def _record(self, step: int, what: str, seen: list[Tensor], losses: list[Tensor]) -> str:
        """Write the bundle, and say where it is."""
        folder = self._run.dir / f"not-finite-step-{step:08d}"
        ranks = distributed.all_gather_object(
            {"index": [index.tolist() for index in seen], "loss": [float(loss) for loss in losses]}
        )
        random = distributed.all_gather_bytes(safetensors.torch.save(self._random))
        report = {
            "step": step,
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


__all__ = ["RANDOM", "STEP", "WEIGHTS", "Guard", "read_bundle", "step_if_finite", "unusable"]
