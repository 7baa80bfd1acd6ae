"""Names of precisions, and which of them a device is good at."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def decide(precision: Precision, device: torch.device) -> Precision:
    """``auto`` becomes bf16 where ``device`` multiplies it natively, and fp32 elsewhere; another name stays."""
    if precision != "auto":
        return precision
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else _cpu_multiplies_bf16()
    return "bf16" if native else "fp32"


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What autocast computes in; ``None`` for fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def _cpu_multiplies_bf16() -> bool:
    """Without these instructions bf16 on a CPU is emulated, and far slower than fp32."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})
