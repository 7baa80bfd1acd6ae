"""Where the host waits for the device in the training loop."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from fasttrain.benchmarks.loop import Repeated, Watched, run_loop
from fasttrain.benchmarks.truth.cases import Kind, StepCase, make
from fasttrain.benchmarks.truth.row import Row

WARM, WATCHED = 4, 5
"steps before, and steps that are looked at"


def waits(device: torch.device, kinds: Iterable[Kind]) -> Iterator[Row]:
    """Times a step and places, by torch's debug mode of synchronising operations and by what is called by name."""
    for kind in kinds:
        found = waits_of(StepCase(kind, images=128).on(device), device)
        yield Row(kind, f"{sum(found.values()):.1f} waits a step", None, {"waits": dict(found)})
        for place, times in sorted(found.items(), key=lambda item: -item[1]):
            yield Row(kind, f"{times:.1f} a step: {place}")


def waits_of(case: StepCase, device: torch.device) -> dict[str, float]:
    """Times a step by place, in the loop's own thread."""
    made, found = make(case, device), Counter[str]()

    def script(loop: Watched) -> Iterator[int]:
        yield WARM
        with watched(found):
            yield WATCHED

    run_loop(made.module, made.config, Repeated(made.batch), script, device)
    return {place: times / WATCHED for place, times in found.items()}


@contextmanager
def watched(found: Counter[str]) -> Iterator[None]:
    """Count waits by place into ``found``."""

    def counted(owner: object, name: str):
        real = getattr(owner, name)

        def call(*given, **more):
            found[f"{name}() of {getattr(owner, '__name__', owner)}, {_place()}"] += 1
            with _quiet():  # it is a wait of the debug mode too
                return real(*given, **more)

        return mock.patch.object(owner, name, call)

    def warned(message, category, filename, lineno, *rest) -> None:
        found[f"{str(message).split('.')[0][:80]}, {_place()}"] += 1

    with (
        counted(torch.cuda, "synchronize"),
        counted(torch.cuda.Event, "synchronize"),
        counted(torch.cuda.Stream, "synchronize"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always")
        warnings.showwarning = warned
        _debug("warn")
        try:
            yield
        finally:
            _debug("default")


@contextmanager
def _quiet() -> Iterator[None]:
    _debug("default")
    try:
        yield
    finally:
        _debug("warn")


def _debug(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def _place() -> str:
    """The two innermost lines of fasttrain's or DeepSpeed's on the stack."""
    stack = traceback.extract_stack()
    lines = [f"{Path(f.filename).name}:{f.lineno}" for f in stack if _is_ours(f.filename)]
    return " < ".join(lines[:-3:-1]) or "elsewhere"


def _is_ours(file: str) -> bool:
    return file != __file__ and any(f"{part}/" in file for part in ("fasttrain", "fasttrain_kernels", "deepspeed"))


__all__ = ["waits", "waits_of", "watched"]
