"""Names of precisions, which of them a device is good at, and the loss scale that fp16 needs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from fasttrain.errors import UsageError

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]


def decide(precision: Precision, device: torch.device) -> Precision:
    """``auto`` becomes bf16 where ``device`` multiplies it natively, and fp32 elsewhere; another name stays.

    fp32 is IEEE's: PyTorch's default on a GPU is TF32 for convolutions, with 11 bits of a factor where float32 has 24.
    Here ``tf32`` asks for that, of convolutions, matrix products and contrastive losses, and nothing else does.

    Raises:
        UsageError: tf32 on a CPU.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("precision=tf32: a CPU has no TF32; use fp32", everywhere=True)
    allow_tf32(precision == "tf32")
    if precision != "auto":
        return precision
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else _cpu_multiplies_bf16()
    return "bf16" if native else "fp32"


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 convolutions and products to TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What autocast computes in; ``None`` for fp32 and tf32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


class LossScale:
    """Dynamic loss scale of fp16 autocast: halved when a gradient overflows, doubled after ``patience`` good steps.

    At stage 0 DeepSpeed's own ``GradScaler`` is right and is used as it is. Under ZeRO 1 and 2 DeepSpeed runs a
    ``GradScaler`` once a parameter group and a rank, so groups and ranks can disagree about a skipped step; there the
    scale is ours and the decision falls on the global gradient norm, which all ranks share.
    """

    def __init__(self, engine, patience: int = 2000) -> None:
        self._engine, self.patience = engine, patience
        self.good_steps = 0
        self._zero = engine.optimizer if hasattr(engine.optimizer, "override_loss_scale") else None
        if self._zero is not None:
            self._zero.torch_autocast_gradscaler = None
            self._set(2.0**16)

    def _set(self, scale: float) -> None:
        # override_loss_scale logs each change; the attribute is what it sets
        self._zero.custom_loss_scaler, self._zero.external_loss_scale = True, scale

    @property
    def scale(self) -> float:
        scaler = self._engine.torch_autocast_z0_gradscaler
        return float(self._zero.loss_scale) if self._zero is not None else float(scaler.get_scale())

    def update(self) -> None:
        """After an optimiser step: follow its overflow."""
        if self._zero is None:
            return
        self.good_steps = 0 if self._zero.overflow else self.good_steps + 1
        if self._zero.overflow:
            self._set(max(1.0, self.scale / 2))
        elif self.good_steps == self.patience:
            self.good_steps = 0
            self._set(self.scale * 2)

    def state(self) -> dict[str, float]:
        if self._zero is not None:
            return {"scale": self.scale, "good_steps": self.good_steps}
        state = self._engine.torch_autocast_z0_gradscaler.state_dict()
        return {"scale": self.scale, "good_steps": state["_growth_tracker"]}

    def load(self, state: dict[str, float]) -> None:
        if self._zero is not None:
            self.good_steps = int(state["good_steps"])
            self._set(float(state["scale"]))
            return
        scaler = self._engine.torch_autocast_z0_gradscaler
        scaler.load_state_dict(
            {**scaler.state_dict(), "scale": float(state["scale"]), "_growth_tracker": int(state["good_steps"])}
        )


def _cpu_multiplies_bf16() -> bool:
    """Without these instructions bf16 on a CPU is emulated, and far slower than fp32."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})
