"""What a CUDA graph makes of an attack and of a step: the same, and how much sooner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.attacks import AttackConfig, image_keys, make_attack
from fasttrain.benchmarks.loop import wait_for
from fasttrain.benchmarks.truth.cases import Kind, StepCase, make
from fasttrain.benchmarks.truth.row import Row
from fasttrain.benchmarks.truth.steps import measure
from fasttrain.errors import UsageError
from fasttrain.models.folding import fold_batchnorm

REPEATS = 10


def graph(device: torch.device, kinds: Iterable[Kind], rounds: int) -> Iterator[Row]:
    """An attack captured by hand; and each kind of step without and with ``train.cuda_graph``."""
    if device.type == "cpu":
        yield Row("graphs", "need a GPU")
        return
    found = captured_attack(StepCase("fare"), device)
    data = {"eager": found.eager, "replay": found.replay}
    same = f"{1000 * found.eager:.1f} ms eager, {1000 * found.replay:.1f} replayed, {found.differs:.1e} apart"
    yield Row("APGD-10", same, found.differs == 0, data)
    for kind in kinds:
        try:
            eager, replayed = (
                measure(make(StepCase(kind), device, cuda_graph=mode), device, rounds) for mode in ("off", "on")
            )
        except UsageError as error:  # it cannot be recorded
            yield Row(f"step, {kind}", str(error), False)
            continue
        before, after = 1000 * eager["seconds"], 1000 * replayed["seconds"]
        says = f"{before:.1f} ms eager, {after:.1f} replayed, {before / after:.2f} times as fast"
        yield Row(f"step, {kind}", says, None, {"eager": eager, "replay": replayed})


class Captured(NamedTuple):
    """A function eager and replayed."""

    eager: float  # seconds
    replay: float
    differs: float  # the largest difference of what the two give


def captured_attack(case: StepCase, device: torch.device) -> Captured:
    """APGD on the folded network, as FARE runs it."""
    made = make(case, device)
    encoder = made.module.encoder.to(memory_format=torch.channels_last)
    images, keys = made.batch.images[0], image_keys(0, 1, made.batch.index)
    attack, dtype = make_attack(AttackConfig()), torch.bfloat16
    with torch.no_grad(), torch.autocast("cuda", dtype, cache_enabled=False):
        folded = fold_batchnorm(encoder)
        targets = folded(images).features + 0.1

    def run() -> Tensor:
        with torch.autocast("cuda", dtype, cache_enabled=False):
            return attack(lambda x: (folded(x).features - targets).square().sum(1), images, keys)

    return captured(run, device)


def captured(run: Callable[[], Tensor], device: torch.device) -> Captured:
    eager, expected = _seconds(run, device), run().clone()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    wait_for(device)
    differs = (found - expected).abs().max().item()
    return Captured(eager, _seconds(graph.replay, device), differs)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    for _ in range(2):
        run()
    wait_for(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        run()
    wait_for(device)
    return (time.perf_counter() - began) / REPEATS


__all__ = ["Captured", "captured", "captured_attack", "graph"]
