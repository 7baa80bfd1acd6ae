"""Optimiser steps that wait for nothing: what a GPU's gate lets through, and what becomes of a step that it stops."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fasttrain import distributed, engine
from fasttrain.attacks import AttackConfig
from fasttrain.attacks.structured import StructuredConfig
from fasttrain.data import Batch
from fasttrain.models.reference import keep_in_evaluation
from fasttrain.nonfinite import Gate, Guard
from fasttrain.objectives import Reference, build_objective, build_one_sided, fare, fare_one_sided
from fasttrain.objectives.terms import LayersConfig, PenaltyConfig, TermConfig
from fasttrain.optim import LARS, OptimizerConfig, build_optimizer
from fasttrain.run import RunConfig
from fasttrain.step import Term, TrainStep
from fasttrain.views import adversarial, structured
from tests.launches import as_on_a_gpu
from tests.ranks import run_ranks
from tests.test_failures import BAD, GLOBAL, STEPS, Settings, fit, poisoned, settings, step_of

NEVER = 10**9
NT_XENT = TermConfig(objective="nt_xent", temperature=0.5)


def fused(config: OptimizerConfig, module, stage: int, device: torch.device):
    """The optimiser that a GPU gets, here too."""
    if config.name == "lars":
        return build_optimizer(config, module, stage, device)
    of = functools.partial(torch.optim.AdamW, betas=config.betas) if config.name == "adamw" else torch.optim.SGD
    return of([p for p in module.parameters() if p.requires_grad], lr=config.lr, fused=True)


@pytest.fixture
def gate_of_a_gpu(monkeypatch):
    monkeypatch.setattr(engine, "Gate", functools.partial(Gate, defers=True))
    monkeypatch.setattr(engine, "build_optimizer", fused)


def with_poison(encoder) -> Term:
    """With a random start and a count of calls, which have to be put back too."""
    attack = adversarial(AttackConfig(name="pgd", steps=1), build_one_sided(NT_XENT), 0)
    return Term("loss", poisoned("gradient"), 1.0, attack)


@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
def test_what_is_found_a_step_late_ends_as_what_is_found_at_once(tmp_path, gate_of_a_gpu, optimizer):
    found = []
    for every in (1, STEPS):  # a step that is reported is settled
        folder = tmp_path / str(every)
        config = Settings(
            run=RunConfig(dir=str(folder), log_every=every, save_every=STEPS),
            optimizer=OptimizerConfig(name=optimizer, lr=0.01, warmup_epochs=0),
            train=engine.TrainConfig(batch=GLOBAL, steps=STEPS, precision="fp32", on_non_finite="skip"),
        )
        finished, images, state = fit(config, with_poison)
        (bundle,) = folder.glob("not-finite-*")
        found.append(
            (state, (bundle / "weights.safetensors").read_bytes(), (bundle / "random.safetensors").read_bytes())
        )
        report = json.loads((bundle / "step.json").read_text())
        assert finished and report["step"] == BAD and report["ranks"][0]["index"] == [images.seen[BAD]]
    (at_once, *evidence), (late, *later) = found
    assert all(torch.equal(at_once[name], late[name]) for name in at_once) and evidence == later
    assert (
        images.seen[: BAD + 2] + images.seen[BAD + 1 :] != images.seen and images.seen.count(images.seen[BAD + 1]) == 2
    )


def late_on_ranks(folder: str) -> list[torch.Tensor]:
    engine.Gate, engine.build_optimizer = functools.partial(Gate, defers=True), fused
    distributed.initialize("cpu")
    found = []
    for stage in (0, 2):
        run = {"log_every": STEPS, "save_every": STEPS}
        config = settings(Path(folder) / str(stage), {"zero_stage": stage, "on_non_finite": "skip", "clip": 0.1})
        config = config.model_copy(update={"run": config.run.model_copy(update=run)})
        finished, _, state = fit(config, Term("loss", poisoned("gradient")))
        assert finished and len(list(Path(config.run.dir).glob("not-finite-step-00000002"))) == 1
        found.append(torch.cat([v.flatten() for v in state.values() if v.is_floating_point()]))
    return found


def test_ranks_and_zero_stages_stop_the_same_step(tmp_path):
    for whole, sharded in run_ranks(2, late_on_ranks, str(tmp_path)):
        assert whole.isfinite().all()
        torch.testing.assert_close(sharded, whole, rtol=1e-3, atol=1e-4)


def test_lars_in_one_fused_kernel_is_lars():
    torch.manual_seed(0)
    shapes = [(8, 3, 3, 3), (5, 4), (7,)]
    start, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))

    def steps(scale: float | None, found: list[float] | None) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = LARS([{"params": weights[:2], "adapt": True}, {"params": weights[2:], "adapt": False}], 0.3)
        for step in range(3):
            for p, g in zip(weights, gradients, strict=True):
                p.grad = (step + 1) * g * (scale or 1)
            if scale is not None:
                optimizer.grad_scale = torch.tensor(scale)
            if found is not None:
                optimizer.found_inf = torch.tensor(found[step])
                if found[step]:
                    weights[0].grad[0] = torch.nan
            optimizer.step()
        return [p.detach() for p in weights] + [state["momentum_buffer"] for state in optimizer.state.values()]

    plain = steps(None, None)
    for found in (steps(None, [0.0] * 3), steps(1024.0, [0.0] * 3), steps(1024.0, None)):
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-7)
    still = steps(None, [1.0] * 3)
    assert all(torch.equal(a, b) for a, b in zip(still[:3], start, strict=True)) and not any(b.any() for b in still[3:])


def bare(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> SimpleNamespace:
    """What a gate asks of DeepSpeed's engine."""
    return SimpleNamespace(
        module=module, optimizer=optimizer, is_gradient_accumulation_boundary=lambda: True, step=optimizer.step
    )


@pytest.mark.parametrize("defers", [False, True])
def test_gradients_are_clipped_and_completed(defers):
    torch.manual_seed(0)
    module = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 1)]).to(
        memory_format=torch.channels_last
    )
    used, unused = module[0].weight, module[1].weight
    gate = Gate(bare(module, torch.optim.SGD(module.parameters(), lr=1.0, fused=True)), clip=0.5, defers=defers)
    used.grad, before = torch.randn(4, 3, 3, 3).contiguous(), used.detach().clone()
    expected = 0.5 * used.grad / used.grad.norm()
    gate.step()
    torch.testing.assert_close(before - used.detach(), expected, rtol=1e-4, atol=1e-6)
    assert used.grad.stride() == used.stride() and unused.grad.stride() == unused.stride() and not unused.grad.any()
    assert not gate.is_shut()


def simclr(view: Callable | None = None, **given: Any) -> Callable:
    """SimCLR's term of an encoder, on a view of it."""
    config = NT_XENT.model_copy(update=given)
    return lambda encoder: Term("loss", build_objective(config), 1.0, *([view(encoder)] if view else []))


FAMILIES = ("colour_space", "rotation", "translation", "colour_jitter")
TERMS = {
    "plain": simclr(),
    "penalty": simclr(penalty=PenaltyConfig(weight=0.1)),
    "layers": simclr(layers=LayersConfig(alpha=(1, 1, 0, 0))),
    "apgd": simclr(lambda _: adversarial(AttackConfig(steps=2), build_one_sided(NT_XENT), 0)),
    "structured": simclr(lambda e: structured(StructuredConfig(transformations=FAMILIES), e.backbone.num_features)),
}
LOOPS = [
    ("plain", {}, "lars"),
    ("plain", {"clip": 1.0}, "adamw"),
    ("plain", {"clip": 1.0, "zero_stage": 1}, "sgd"),
    ("plain", {"zero_stage": 2}, "lars"),
    ("plain", {"accumulation": 2}, "sgd"),
    ("penalty", {}, "lars"),
    ("layers", {}, "sgd"),
    ("apgd", {}, "lars"),
    ("structured", {}, "adamw"),
    ("fare", {}, "adamw"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "train", "optimizer"), LOOPS)
def test_the_host_waits_for_nothing_but_the_verdict(tmp_path, monkeypatch, kind, train, optimizer):
    """The real loop, between reports, under a mode that sees each operation for whose result the host would wait."""
    distributed.initialize("cpu")
    read, reads = engine.Verdict._read, []

    def unwatched(verdict: engine.Verdict, position: int) -> float:
        reads.append(position)
        with _disable_current_modes():
            return read(verdict, position)

    monkeypatch.setattr(engine.Verdict, "_read", unwatched)
    monkeypatch.setattr(engine, "Gate", functools.partial(Gate, defers=True))
    config = engine.TrainConfig(batch=4, precision="bf16", **train)
    module = fare_step() if kind == "fare" else step_of(TERMS[kind], layer_heads=kind == "layers")
    images = torch.rand(1 if kind == "fare" else 2, 4 // config.accumulation, 8, 8, 3).permute(0, 1, 4, 2, 3)
    index = torch.arange(images.shape[1])
    batch = Batch(images, index % 3, index)
    wrapped = engine.initialize(
        module, fused(OptimizerConfig(name=optimizer), module, config.zero_stage, images.device), config
    )
    with ExitStack() as watching:
        seen = []

        def progress(done: int) -> None:
            if done == 2:
                seen.append(watching.enter_context(as_on_a_gpu()))
            elif done == 5:
                watching.close()

        rare = SimpleNamespace(log_every=NEVER, save_every=NEVER)
        run = SimpleNamespace(config=rare, progress=progress, report=lambda *_: None, say=print, dir=tmp_path)
        saver = SimpleNamespace(failed=False, save=lambda done: None, finish=lambda: None, timings=dict)
        loader = SimpleNamespace(iterate=lambda start: iter(lambda: batch, None), bad=SimpleNamespace(agree=lambda: 0))
        guard = Guard(run, wrapped, SimpleNamespace(train=config), "data", 0)
        engine.train(wrapped, loader, config, engine.Plan(6, 6, lambda step: 0.01), 0, run, saver, guard)
    (watch,) = seen
    assert not watch.waits and watch.launches["aten::convolution"] > 0 and reads


def fare_step() -> TrainStep:
    encoder = keep_in_evaluation(step_of(TERMS["plain"]).encoder)
    attack = adversarial(AttackConfig(steps=2), fare_one_sided(), 0)
    return TrainStep(
        encoder, [Term("adversarial", fare(), view=attack), Term("clean", fare(), 0.1)], Reference(encoder)
    )
