"""A batch in micro-batches, by gradient caching, is the unsplit batch: loss, gradient, weights."""

from __future__ import annotations

from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fasttrain import checkpoint, distributed, engine, gradient_cache
from fasttrain.attacks import AttackConfig
from fasttrain.cuda_graph import Usual
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import BatchNorm2d, Encoded, Encoder, HeadConfig, ModelConfig
from fasttrain.nonfinite import Gate
from fasttrain.objectives import (
    cross_entropy,
    cross_entropy_one_sided,
    fare,
    gradient_penalty,
    info_nce,
    layer_by_layer,
    layer_by_layer_penalty,
    nt_xent,
    simsiam,
    sup_con,
)
from fasttrain.optim import OptimizerConfig, build_optimizer
from fasttrain.precision import LossScale
from fasttrain.step import Term, TrainStep
from fasttrain.views import adversarial
from tests.ranks import run_ranks
from tests.test_engine import bare_run
from tests.test_launch import metrics, pretrain_here

ATTACK = AttackConfig(steps=2)
LOCAL = partial(BatchNorm2d, sync=False)
VIEWS, GLOBAL, SIDE, CLASSES, STEPS = 2, 8, 6, 3, 3


class Smooth(nn.Module):
    """Images -> stages, features, projections, predictions, logits, and a head on each stage; smooth, with any norm.

    Odd but for its norm, so that random images have embeddings in all directions and the losses large gradients.
    """

    def __init__(self, norm=nn.Identity, dropout: float = 0.0) -> None:
        super().__init__()
        channels = (3, 4, 5, 6, 7)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), norm(b), nn.Dropout(dropout))
            for a, b in pairwise(channels)
        )
        self.heads = nn.ModuleList(nn.Linear(c, 5, bias=False) for c in channels[1:])
        self.predictor, self.fc = nn.Linear(5, 5), nn.Linear(7, CLASSES)

    def forward(self, images: Tensor) -> Encoded:
        stages, x = [], 4 * images - 2
        for block in self.blocks:
            x = torch.sin(3 * block(x))
            stages.append(x)
        layers = []
        for stage, head in zip(stages, self.heads, strict=True):
            features = stage.mean((2, 3))
            z = head(features)
            layers.append(Encoded(images, (), features, z, None, self.predictor(z)))
        last = layers[-1]._replace(stages=tuple(stages), logits=self.fc(layers[-1].features), encoder=self)
        return last._replace(layers=tuple(layers))


TERMS = {
    "nt_xent": lambda count: [Term("a", nt_xent(0.5))],
    "sup_con": lambda count: [Term("a", sup_con(0.5))],
    "sum": lambda count: [
        Term("a", nt_xent(0.5)),
        Term("b", cross_entropy(), 0.3),
        Term("c", sup_con(0.2), 2.0),
        Term("d", simsiam(), 0.7),
    ],
    "layers": lambda count: [Term("a", layer_by_layer(nt_xent(0.5), (0, 0.1, 0.5, 1)))],
    "nt_xent, penalty": lambda count: [Term("a", gradient_penalty(nt_xent(0.5), 0.1), 0.5)],
    "sup_con, penalty": lambda count: [Term("a", gradient_penalty(sup_con(0.5), 0.1)), Term("b", nt_xent(0.5))],
    "layers, penalty": lambda count: [
        Term("a", layer_by_layer_penalty(nt_xent(0.5), (0, 0.1, 0.5, 1), (0.1, 0, 0.1, 0.1))),
        Term("b", gradient_penalty(cross_entropy(), 1.0), 0.3),
    ],
    "attacked cross-entropy": lambda count: [
        Term("a", nt_xent(0.5)),
        Term("b", cross_entropy(), 0.3, adversarial(ATTACK, cross_entropy_one_sided(), 0, 0, count)),
    ],
}


class Bare:
    """What :func:`gradient_cache.forwards` needs of a DeepSpeed engine."""

    def __init__(self, module: TrainStep) -> None:
        self.module = module

    def __call__(self, *inputs):
        return self.module(*inputs)


def build(name: str, count: int = 1, norm=nn.Identity, dropout: float = 0.0) -> TrainStep:
    torch.manual_seed(0)
    return TrainStep(Smooth(norm, dropout), TERMS[name](count))


def global_batch(step: int, dtype: torch.dtype = torch.float32) -> Batch:
    draw = torch.Generator().manual_seed(step)
    images = torch.rand(VIEWS, GLOBAL, 3, SIDE, SIDE, generator=draw, dtype=torch.float64).to(dtype)
    return Batch(images, torch.randint(0, CLASSES, (GLOBAL,), generator=draw), torch.arange(GLOBAL))


def micro_batches(whole: Batch, count: int) -> list[Batch]:
    """This rank's: micro-batches are consecutive in the global order, a rank's part is contiguous in each."""
    world, rank, size = distributed.world_size(), distributed.rank(), GLOBAL // count
    starts = [micro * size + rank * size // world for micro in range(count)]
    parts = [slice(start, start + size // world) for start in starts]
    return [Batch(whole.images[:, part], whole.labels[part], whole.index[part]) for part in parts]


def gradients(module: TrainStep) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def cached(name: str, count: int, norm=nn.Identity) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Loss, terms and gradient in float64 of one batch in ``count`` micro-batches; the means that DeepSpeed takes."""
    module = build(name, count, norm).double()
    values, terms = [], []
    parts = micro_batches(global_batch(0, torch.float64), count)
    for forward in gradient_cache.forwards(Bare(module), parts, None):
        forward.loss.backward()
        values.append(forward.value)
        terms.append(distributed.mean(forward.terms))
    found = gradients(module)
    for value in [mean := torch.stack(values).mean(), *found.values()]:
        if distributed.world_size() > 1:
            dist.all_reduce(value)
        value /= distributed.world_size()
    return float(mean), terms[-1], {name: g / count for name, g in found.items()}


def unsplit(name: str) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    module = build(name).double()
    loss, terms = module(global_batch(0, torch.float64))
    loss.backward()
    return loss.item(), {name: value.item() for name, value in terms.items()}, gradients(module)


def of_groups(count: int) -> tuple[float, dict[str, Tensor]]:
    """NT-Xent of the whole batch in float64 where BatchNorm sees one of ``count`` groups of images at a time."""
    module, whole = build("nt_xent", norm=LOCAL).double(), global_batch(0, torch.float64)
    groups = [module.encoder(images.flatten(0, 1)).projections for images in whole.images.chunk(count, 1)]
    z = torch.cat([group.unflatten(0, (VIEWS, -1)) for group in groups], 1).flatten(0, 1)
    loss = nt_xent(0.5)(Encoded(None, (), None, z, None), whole)
    loss.backward()
    return loss.item(), gradients(module)


def in_ranks(cases: list[tuple]) -> list:
    return [cached(*case) for case in cases]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("world, counts", [(1, (1, 2, 4)), (2, (2,))])
def test_loss_and_gradient_are_those_of_the_unsplit_batch(world, counts):
    """Float64, to 1e-11; the penalties are about as large as the losses."""
    cases = [(name, count) for name in TERMS for count in counts]
    normed = [("nt_xent", count, LOCAL) for count in counts]
    every = in_ranks(cases + normed) if world == 1 else run_ranks(world, in_ranks, cases + normed, timeout=300)
    for results in [every] if world == 1 else every:
        for (name, _), (loss, terms, gradient) in zip(cases, results, strict=False):
            expected_loss, expected_terms, expected = unsplit(name)
            assert loss == pytest.approx(expected_loss, rel=1e-11), name
            same(gradient, expected)
            if name not in ("layers, penalty", "attacked cross-entropy"):  # a term of theirs is a micro-batch's
                assert terms == pytest.approx(expected_terms, rel=1e-5), name
        for (_, count, _), (loss, _, gradient) in zip(normed, results[len(cases) :], strict=True):
            expected_loss, expected = of_groups(world * count)
            assert loss == pytest.approx(expected_loss, rel=1e-11)
            same(gradient, expected)


def test_running_statistics_see_each_micro_batch_once():
    split, plain = build("nt_xent, penalty", norm=LOCAL), build("nt_xent, penalty", norm=LOCAL)
    parts = micro_batches(global_batch(0), 4)
    list(gradient_cache.forwards(Bare(split), parts, None))
    for part in parts:
        plain(part)
    for (key, found), expected in zip(split.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected), key


class Case(NamedTuple):
    """One way to take the same optimiser steps."""

    terms: str
    accumulation: int = 1
    stage: int = 0
    precision: str = "fp32"
    clip: float = 0.0
    loss_over: str = "batch"
    batchnorm: bool = False
    dropout: float = 0.0


def initialized(case: Case):
    distributed.initialize("cpu")
    module = build(case.terms, case.accumulation, LOCAL if case.batchnorm else nn.Identity, case.dropout)
    settings = OptimizerConfig(name="sgd", lr=1e-3, lr_scaling="none", weight_decay=1e-2)
    train = engine.TrainConfig(
        batch=GLOBAL,
        accumulation=case.accumulation,
        loss_over=case.loss_over,
        zero_stage=case.stage,
        precision=case.precision,
        clip=case.clip,
    )
    optimizer = build_optimizer(settings, module, case.stage, torch.device("cpu"))
    return engine.initialize(module, optimizer, train), train


def take_steps(trainer, train: engine.TrainConfig, start: int, stop: int) -> None:
    trainer.train()
    passes, gate = Usual(trainer), Gate(trainer, train.clip, scaled=train.precision == "fp16")
    for step in range(start, stop):
        batches = micro_batches(global_batch(step), train.accumulation)
        for forward in engine.forwards(trainer, passes, iter(batches), train, engine.Meter(GLOBAL)):
            passes.backward(forward.loss)
            gate.step()


def state(trainer) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in trainer.module.state_dict().items()}


def trained(cases: list[Case]) -> list[dict[str, Tensor]]:
    results = []
    for case in cases:
        trainer, train = initialized(case)
        if case.precision == "fp16":
            LossScale(trainer).load({"scale": 256.0, "good_steps": 0})
        take_steps(trainer, train, 0, STEPS)
        results.append(state(trainer))
    return results


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over the weights, the norm of the difference relative to the weight's, or to 0.1 where that is smaller."""
    keys = [k for k in b if b[k].is_floating_point() and "running" not in k]
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp_min(0.1)) for k in keys)


SPLIT = [
    *[Case(terms, 2, stage) for terms in ("nt_xent", "sup_con", "sum") for stage in (0, 2)],
    Case("sum", 4, 1, clip=20.0),
    Case("nt_xent, penalty", 2),
    Case("nt_xent, penalty", 2, 2),
]


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_ranks_and_stages_take_the_steps_of_the_unsplit_batch(world):
    """SGD with momentum in fp32 under DeepSpeed: weights after 3 steps, to 1e-6 of each tensor's norm."""
    whole = {case: case._replace(accumulation=1, stage=0) for case in SPLIT}
    alone = {case: trained([case])[0] for case in dict.fromkeys(whole.values())}
    for results in run_ranks(2, trained, SPLIT, timeout=300) if world == 2 else [trained(SPLIT)]:
        for case, result in zip(SPLIT, results, strict=True):
            assert largest_difference(result, alone[whole[case]]) < 1e-6, case


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("bf16", 1e-3), ("fp16", 3e-4)])
def test_in_low_precision_too_and_far_from_the_micro_batches_own_loss(precision, tolerance):
    cases = [Case("sup_con", 2, 0, precision, 20.0, loss_over) for loss_over in ("batch", "micro_batch")]
    split, other = trained(cases)
    (unsplit,) = trained([cases[0]._replace(accumulation=1)])
    assert largest_difference(split, unsplit) < tolerance < 0.01 < largest_difference(other, unsplit)


def interrupted(folder: str, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """After all steps, without and with a save, new objects and a load in between."""
    torch.manual_seed(7)
    trainer, train = initialized(case)
    take_steps(trainer, train, 0, 1)
    saver = checkpoint.Saver(bare_run(folder), trainer, lambda: {"config": {}})
    saver.save(1)
    saver.finish()
    take_steps(trainer, train, 1, STEPS)
    torch.manual_seed(99)
    again, _ = initialized(case)
    checkpoint.restore(checkpoint.read(Path(folder) / "step-00000001"), again)
    take_steps(again, train, 1, STEPS)
    return state(trainer), state(again)


def test_a_run_saved_and_loaded_is_the_uninterrupted_one(tmp_path):
    """Bit for bit, dropout and running statistics included."""
    case = Case("sum", 2, batchnorm=True, dropout=0.3)
    for whole, resumed in run_ranks(2, interrupted, str(tmp_path), case, timeout=300):
        assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_all_passes_draw_the_same_random_numbers():
    """With dropout: the gradient of both micro-batches encoded once, with their graphs, and their joint loss."""
    module = build("nt_xent", dropout=0.5).double()
    parts = micro_batches(global_batch(0, torch.float64), 2)
    torch.manual_seed(3)
    for forward in gradient_cache.forwards(Bare(module), parts, None):
        (forward.loss / 2).backward()
    drawn = torch.rand(1)

    plain = build("nt_xent", dropout=0.5).double()
    torch.manual_seed(3)
    z = [plain.encoder(part.images.flatten(0, 1)).projections.unflatten(0, (VIEWS, -1)) for part in parts]
    encoded = Encoded(None, (), None, torch.cat(z, 1).flatten(0, 1), None)
    loss = nt_xent(0.5)(encoded, global_batch(0))
    loss.backward()
    assert float(forward.value) == pytest.approx(loss.item(), rel=1e-12)
    for key, value in gradients(plain).items():
        torch.testing.assert_close(gradients(module)[key], value, rtol=1e-10, atol=1e-12)
    assert torch.equal(drawn, torch.rand(1))


def most_memory(name: str, images: int, count: int) -> int:
    """Bytes allocated at most at one time, beyond what there was, by ``images`` in ``count`` micro-batches."""
    labels = torch.arange(images) % CLASSES
    whole = Batch(torch.rand(VIEWS, images, 3, 16, 16), labels, labels)
    parts = zip(whole.images.chunk(count, 1), labels.chunk(count), labels.chunk(count), strict=True)
    module, batches = build(name), [Batch(*part) for part in parts]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for forward in gradient_cache.forwards(Bare(module), batches, None):
            forward.loss.backward()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("name", ["nt_xent", "nt_xent, penalty"])
def test_memory_grows_with_the_micro_batch_alone(name):
    micro_batch, split, unsplit = most_memory(name, 4, 1), most_memory(name, 16, 4), most_memory(name, 16, 1)
    assert split < 1.2 * micro_batch < 0.5 * unsplit


def encoder(**options) -> Encoder:
    return Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.0625, head=HeadConfig(width=8, out=4), **options))


def test_batchnorm_over_the_ranks_is_refused():
    with pytest.raises(UsageError, match=r"model\.sync_bn=false"):
        gradient_cache.check_batchnorm(encoder())
    with pytest.raises(UsageError, match="BatchNorm 0"):
        gradient_cache.check_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    gradient_cache.check_batchnorm(encoder(sync_bn=False))
    gradient_cache.check_batchnorm(encoder().eval())


@pytest.mark.parametrize(
    "terms, complaint",
    [
        ([Term("a", cross_entropy())], "no term compares"),
        ([Term("a", gradient_penalty(nt_xent(0.5), 1.0, "finite_difference"))], "no term compares"),
        (
            [Term("a", nt_xent(0.5)), Term("b", nt_xent(0.5), 1.0, adversarial(ATTACK, info_nce(0.5), 0))],
            "term b knows its micro-batch's loss",
        ),
        (
            [Term("a", nt_xent(0.5)), Term("b", gradient_penalty(sup_con(0.5), 1.0, "finite_difference"))],
            "term b knows its micro-batch's loss",
        ),
    ],
)
def test_terms_that_would_see_their_micro_batch_alone_are_refused(terms, complaint):
    module = TrainStep(Smooth(), terms)
    with pytest.raises(UsageError, match=complaint):
        list(gradient_cache.forwards(Bare(module), micro_batches(global_batch(0), 2), None))


def test_a_frozen_reference_is_asked_about_each_micro_batch():
    """FARE's clean term beside a contrastive one: targets are joined as embeddings are."""

    def module() -> TrainStep:
        torch.manual_seed(0)
        other, learner = Smooth().double(), Smooth().double()
        reference = torch.no_grad()(lambda batch: batch._replace(targets=other(batch.images.flatten(0, 1)).features))
        return TrainStep(learner, [Term("a", nt_xent(0.5)), Term("b", fare(), 2.0)], reference)

    split, whole = module(), module()
    for forward in gradient_cache.forwards(Bare(split), micro_batches(global_batch(0, torch.float64), 4), None):
        (forward.loss / 4).backward()
    loss, terms = whole(global_batch(0, torch.float64))
    loss.backward()
    assert float(forward.value) == pytest.approx(loss.item())
    for key, value in terms.items():
        torch.testing.assert_close(forward.terms[key], value)
    for key, value in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[key], value, rtol=1e-10, atol=1e-12)


def test_a_run_logs_the_whole_batch_loss(images, tmp_path):
    """NT-Xent of the same embeddings grows with the images that it compares: 8 here, in micro-batches 2."""
    common = [f"data.root={images}", "evaluate.every_epochs=0", "train.accumulation=4", "train.steps=1"]
    first = {}
    for loss_over in ("micro_batch", "batch"):
        folder = tmp_path / loss_over
        pretrain_here(*common, "model.sync_bn=false", f"train.loss_over={loss_over}", f"run.dir={folder}")
        first[loss_over] = metrics(folder)[0]["loss"]
    assert first["batch"] > first["micro_batch"] + 1
    with pytest.raises(UsageError, match=r"sync_bn=false .* or train.loss_over=micro_batch"):
        pretrain_here(*common, "train.loss_over=batch", f"run.dir={tmp_path / 'refused'}")
