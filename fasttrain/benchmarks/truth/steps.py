"""What a step of the real loop takes, on batches that already lie on the device; and that every mode of it steps."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fasttrain.benchmarks.loop import Repeated, Watched, run_loop, wait_for
from fasttrain.benchmarks.profile import Profiler
from fasttrain.benchmarks.truth.cases import Kind, Made, StepCase, make
from fasttrain.benchmarks.truth.row import Row

CASES = [
    StepCase("plain"),
    StepCase("plain", images=512),
    StepCase("penalty"),
    StepCase("pgd-5"),
    StepCase("fare"),
    StepCase("plain", "resnet50", 224, 128),
    StepCase("penalty", "resnet50", 224, 48),
]
MODES: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "fp16, ZeRO 2": {"precision": "fp16", "zero_stage": 2},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 2, AdamW": {"zero_stage": 2, "optimizer": "adamw"},
    "clipping": {"clip": 1.0},
    "SGD": {"optimizer": "sgd"},
    "AdamW": {"optimizer": "adamw"},
    "accumulation": {"accumulation": 2},
}
ON_A_CPU = ("fp32", "ZeRO 2, AdamW", "accumulation")
"Those that are tried there, to see that all this runs."


def steps(device: torch.device, kinds: Iterable[Kind], rounds: int) -> Iterator[Row]:
    """Milliseconds and views a second; how long the device is busy and with what; kernels; memory."""
    for case in dict.fromkeys(case.on(device) for case in CASES):
        if case.kind in kinds:
            made = make(case, device)
            found = measure(made, device, rounds)
            yield Row(case.name, said(found), None, found)


def measure(made: Made, device: torch.device, rounds: int) -> dict[str, Any]:
    """The loop's time in windows of steps, and then what a few more steps launch."""
    warm, count, profiled = (6, 12, 3) if device.type == "cuda" else (1, 1, 1)
    windows: list[float] = []
    found: dict[str, Any] = {}

    def script(loop: Watched) -> Iterator[int]:
        yield warm
        for _ in range(rounds):
            wait_for(device)
            began = time.perf_counter()
            yield count
            wait_for(device)
            windows.append((time.perf_counter() - began) / count)
        profiler = Profiler(device)
        yield profiled
        wait_for(device)
        found.update(profiler.stop(profiled)._asdict())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ran = run_loop(made.module, made.config, Repeated(made.batch), script, device)
    seconds = statistics.median(windows)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    rate, remarks = made.views / seconds, [line for line in ran.said if "CUDA graphs" in line]
    rest = {"windows": windows, "peak": peak, "remarks": remarks}
    return {"seconds": seconds, "views_per_second": rate, **rest, **found}


def said(found: dict[str, Any]) -> str:
    """In words, the heaviest kernels in lines of their own."""
    memory = "" if found["peak"] is None else f", peak {found['peak'] / 2**30:.1f} GiB"
    lines = [
        f"{1000 * found['seconds']:.1f} ms, {found['views_per_second']:,.0f} views/s, device busy "
        f"{1000 * found['busy']:.1f} ms, {found['launches']:.0f} launches, {found['tiny']:.0f} of them under 4 us, "
        f"{1000 * found['layout']:.1f} ms of conversions of layout{memory}",
        *(f"  - {remark}" for remark in found["remarks"]),
        *(f"  - {1000 * seconds:.2f} ms in {times:.0f} x `{name}`" for name, seconds, times in found["heaviest"][:8]),
    ]
    return "\n".join(lines)


def modes(device: torch.device) -> Iterator[Row]:
    """Every precision, ZeRO stage and optimiser: its loss stays finite, and moves."""
    count = 24 if device.type == "cuda" else 2
    for name, options in MODES.items():
        if device.type == "cpu" and name not in ON_A_CPU:
            continue
        made = make(StepCase("penalty", images=64).on(device), device, **options)
        # fp16 halves its scale at every step until no gradient overflows
        taken = 2 * count if options.get("precision") == "fp16" else count
        try:
            ran = run_loop(made.module, made.config, Repeated(made.batch), lambda _, n=taken: iter([n]), device, 1)
        except Exception as error:
            yield Row(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False)
            continue
        losses = [line["loss"] for line in ran.metrics if "loss" in line]
        moved = len(losses) == taken and math.isfinite(losses[-1]) and losses[-1] != losses[0]
        yield Row(name, f"loss {losses[0]:.4g} to {losses[-1]:.4g} in {taken} steps", moved, {"losses": losses})


__all__ = ["CASES", "measure", "modes", "said", "steps"]
