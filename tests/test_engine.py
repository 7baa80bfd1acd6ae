"""Two ranks equal one, whatever the ZeRO stage; DeepSpeed's dictionary says what ours does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from fasttrain import checkpoint, distributed, engine
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.nonfinite import Gate
from fasttrain.objectives import PenaltyConfig, TermConfig, build_objective
from fasttrain.optim import OptimizerConfig, build_optimizer
from fasttrain.precision import LossScale
from fasttrain.run import RunConfig
from fasttrain.step import Term, TrainStep
from tests.ranks import run_ranks

STEPS, GLOBAL, SIDE = 3, 8, 16


PENALTY = PenaltyConfig(weight=0.5)
DIFFERENCE = PenaltyConfig(weight=0.5, method="finite_difference")
TERMS = {
    "nt_xent": TermConfig(objective="nt_xent", temperature=0.5),
    "sup_con": TermConfig(objective="sup_con", temperature=0.5),
    "simsiam": TermConfig(objective="simsiam"),
    "cross_entropy": TermConfig(objective="cross_entropy"),
    "nt_xent, penalty": TermConfig(objective="nt_xent", temperature=0.5, penalty=PENALTY),
    "nt_xent, difference": TermConfig(objective="nt_xent", temperature=0.5, penalty=DIFFERENCE),
    "cross_entropy, penalty": TermConfig(objective="cross_entropy", penalty=PENALTY),
}


class Case(NamedTuple):
    """One way to take the same optimiser steps."""

    stage: int
    accumulation: int = 1
    optimizer: str = "lars"
    objective: str = "nt_xent"
    clip: float = 0.0
    precision: str = "fp32"
    lr: float = 0.1
    defers: bool = False  # as on a GPU: the optimiser reads whether the gradient is finite, the host does not


def build(case: Case):
    torch.manual_seed(0)
    head = HeadConfig(width=16, out=8, predictor=4 if case.objective == "simsiam" else 0)
    encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.25, head=head, classes=3))
    for module in encoder.modules():  # at ReLU's kink rounding decides the gradient; a smooth network shows real errors
        if hasattr(module, "relu"):
            module.relu = torch.nn.SiLU()
    module = TrainStep(encoder, [Term("loss", build_objective(TERMS[case.objective]))])
    settings = OptimizerConfig(
        name=case.optimizer, lr=case.lr, lr_scaling="none", trust_coefficient=0.01, weight_decay=1e-2
    )
    optimizer = build_optimizer(settings, module, case.stage, torch.device("cpu"))
    train = engine.TrainConfig(
        batch=GLOBAL, accumulation=case.accumulation, zero_stage=case.stage, clip=case.clip, precision=case.precision
    )
    return engine.initialize(module, optimizer, train), train


def global_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(2, GLOBAL, 3, SIDE, SIDE, generator=generator)
    return Batch(images, torch.randint(0, 3, (GLOBAL,), generator=generator), torch.arange(GLOBAL))


def micro_batches(step: int, accumulation: int):
    """This rank's parts: micro-batches are consecutive in the global order, a rank's part is contiguous in each."""
    world, rank = distributed.world_size(), distributed.rank()
    whole, size = global_batch(step), GLOBAL // accumulation
    for micro in range(accumulation):
        begin = micro * size + rank * size // world
        part = slice(begin, begin + size // world)
        yield Batch(whole.images[:, part], whole.labels[part], whole.index[part])


def take_steps(trainer, case: Case, start: int, stop: int) -> None:
    trainer.train()
    # BatchNorm sees micro-batches, so only with fixed statistics is the split exact.
    if case.objective.startswith("cross_entropy"):
        trainer.module.eval()
    gate = Gate(trainer, case.clip, scaled=case.precision == "fp16", defers=case.defers)
    for step in range(start, stop):
        for batch in micro_batches(step, case.accumulation):
            loss, _ = trainer(batch)
            trainer.backward(loss)
            gate.step()


def weights(trainer) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in trainer.module.state_dict().items() if v.is_floating_point()}


def trained(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    distributed.initialize("cpu")
    results = []
    for case in cases:
        trainer, _ = build(case)
        take_steps(trainer, case, 0, STEPS)
        results.append(weights(trainer))
    return results


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Over all tensors, |a - b| relative to the tensor's norm, or to 0.1 where that is smaller (biases begin at 0)."""
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp_min(0.1)) for k in b)


CASES = [
    *[Case(stage) for stage in (0, 1, 2)],
    *[Case(stage, accumulation=2, objective="cross_entropy") for stage in (0, 1, 2)],
    Case(2, optimizer="adamw"),
    Case(1, optimizer="sgd", clip=0.05),
    Case(1, objective="sup_con"),
    Case(2, objective="simsiam"),
    *[Case(stage, objective="nt_xent, penalty") for stage in (0, 1, 2)],
    Case(2, accumulation=2, objective="cross_entropy, penalty"),
    Case(1, objective="nt_xent, difference"),
    Case(0, clip=0.05, defers=True),
    Case(2, clip=0.05, defers=True),
]


def test_two_ranks_and_any_stage_take_the_steps_of_one_process():
    """LARS, AdamW and SGD in fp32: parameters and BatchNorm statistics after 3 steps, to 1e-4 of each tensor's norm."""
    plain = {c: Case(0, 1, c.optimizer, c.objective, c.clip) for c in CASES}
    distinct = list(dict.fromkeys(plain.values()))
    alone = dict(zip(distinct, run_ranks(1, trained, distinct)[0], strict=True))
    for results in run_ranks(2, trained, CASES):
        for case, result in zip(CASES, results, strict=True):
            # Adam divides rounding errors by a tiny sqrt(v); a penalty's gradient is a second derivative
            hard = case.optimizer == "adamw" or TERMS[case.objective].penalty.weight > 0
            tolerance = 5e-3 if hard else 1e-4
            assert largest_difference(result, alone[plain[case]]) < tolerance, case


def bare_run(folder: str) -> SimpleNamespace:
    """What a saver asks of a run."""
    return SimpleNamespace(checkpoints=Path(folder), config=RunConfig(), say=print)


def interrupted(folder: str, cases: tuple[Case, Case]) -> dict[str, torch.Tensor]:
    distributed.initialize("cpu")
    trainer, _ = build(cases[0])
    take_steps(trainer, cases[0], 0, 2)
    saver = checkpoint.Saver(bare_run(folder), trainer, lambda: {"config": {}})
    saver.save(2)
    saver.finish()
    torch.manual_seed(99)
    again, _ = build(cases[1])
    checkpoint.restore(checkpoint.read(Path(folder) / "step-00000002"), again)
    take_steps(again, cases[1], 2, STEPS)
    return weights(again)


@pytest.mark.parametrize(
    ("stages", "optimizer"), [((0, 0), "adamw"), ((2, 2), "adamw"), ((1, 0), "adamw"), ((1, 0), "sgd")]
)
def test_a_run_saved_and_loaded_is_the_uninterrupted_one(tmp_path, stages, optimizer):
    """Bit for bit at one stage; at another, to rounding, which Adam divides by a tiny sqrt(v) and then times lr."""
    lr = 0.02 if optimizer == "adamw" else 0.1
    cases = tuple(Case(stage, optimizer=optimizer, lr=lr) for stage in stages)
    whole, _ = trained_in_ranks(cases[1])
    for rank in run_ranks(2, interrupted, str(tmp_path), cases):
        if stages[0] == stages[1]:
            assert all(torch.equal(rank[k], whole[k]) for k in whole)
        else:
            assert largest_difference(rank, whole) < {"adamw": 1e-3, "sgd": 1e-4}[optimizer]


def trained_in_ranks(case: Case) -> list[dict[str, torch.Tensor]]:
    return [results[0] for results in run_ranks(2, trained, [case])]


def scaled(stage: int) -> tuple[dict[str, torch.Tensor], list[float], bool]:
    """Weights after the steps in fp16; the scale before and after a step that overflows; whether that was skipped."""
    distributed.initialize("cpu")
    case = Case(stage, optimizer="sgd", clip=0.5, precision="fp16")
    trainer, _ = build(case)
    scale = LossScale(trainer)
    scale.load({"scale": 256.0, "good_steps": 0})
    for step in range(STEPS):
        take_steps(trainer, case, step, step + 1)
        scale.update()
    result = weights(trainer)
    scale.load({"scale": 2.0**60, "good_steps": 0})
    scales, before = [scale.scale], [p.detach().clone() for p in trainer.module.parameters()]
    take_steps(trainer, case, STEPS, STEPS + 1)
    scale.update()
    skipped = all(torch.equal(a, b) for a, b in zip(before, trainer.module.parameters(), strict=True))
    return result, [*scales, scale.scale], skipped


def test_fp16_trains_like_fp32_and_skips_an_overflow_on_all_ranks():
    (plain,) = run_ranks(1, trained, [Case(0, optimizer="sgd", clip=0.5)])[0]
    for stage in (0, 1):
        for result, (before, after), skipped in run_ranks(2, scaled, stage):
            assert largest_difference(result, plain) < 0.05
            assert skipped and after == before / 2


def test_settings_follow_from_ours_alone(tmp_path):
    settings = engine.deepspeed_settings(engine.TrainConfig(batch=64, accumulation=4, zero_stage=1), world=2)
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_clipping"] == 0.0  # DeepSpeed clips at 1.0 when the key is absent
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"zero_optimization": {"overlap_comm": False}}))
    merged = engine.deepspeed_settings(engine.TrainConfig(zero_stage=2, deepspeed=str(extra)), world=1)
    assert merged["zero_optimization"] == {"overlap_comm": False, "stage": 2}


@pytest.mark.parametrize("extra", [{"gradient_clipping": 1.0}, {"zero_optimization": {"stage": 1}}, {"bf16": {}}])
def test_a_json_that_repeats_our_numbers_is_refused(tmp_path, extra):
    path = tmp_path / "extra.json"
    path.write_text(json.dumps(extra))
    with pytest.raises(UsageError, match="owns: remove it there"):
        engine.deepspeed_settings(engine.TrainConfig(deepspeed=str(path)), world=1)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UsageError, match=r"train.batch=10 .* multiple of 4"):
        engine.TrainConfig(batch=10, accumulation=2).micro_batch(world=2)


def test_stage_three_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="double backward"):
        engine.TrainConfig(zero_stage=3)
