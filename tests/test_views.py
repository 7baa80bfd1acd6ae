"""Adversarial views: attacked ones, and those that an adversary learns to make."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fasttrain import checkpoint, distributed, engine
from fasttrain.attacks import AttackConfig, attacked
from fasttrain.attacks.structured import StructuredConfig
from fasttrain.config import resolve
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoder, HeadConfig, ModelConfig
from fasttrain.nonfinite import Gate
from fasttrain.objectives import build_objective, build_one_sided
from fasttrain.optim import OptimizerConfig, build_optimizer
from fasttrain.step import Term, TrainStep
from fasttrain.views import ViewConfig, ViewedTermConfig, adversarial, build_view, clean, structured
from tests.ranks import run_ranks
from tests.test_engine import bare_run

SIDE, IMAGES = 16, 8
EPS = 8 / 255
PGD = {"name": "pgd", "steps": 3}


def make_encoder(smooth: bool = False, width: float = 0.125) -> Encoder:
    torch.manual_seed(0)
    head = HeadConfig(layers=2, width=16, out=8, predictor=8)
    encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", width=width, head=head, classes=3))
    for module in encoder.modules():  # as after some training: no BatchNorm the identity
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
        if smooth and hasattr(module, "relu"):  # at ReLU's kink rounding decides the gradient
            module.relu = nn.SiLU()
    return encoder


def make_batch(seed: int = 0, views: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(views, IMAGES, SIDE, SIDE, 3, generator=generator).movedim(-1, 2)
    labels = torch.randint(0, 3, (IMAGES,), generator=generator)
    return Batch(images, labels, 100 + torch.arange(IMAGES))


def term(objective: str, **view) -> ViewedTermConfig:
    return resolve(ViewedTermConfig, {"objective": objective, "view": view})


def step_of(config: ViewedTermConfig, encoder: Encoder, seed: int = 0) -> TrainStep:
    return TrainStep(encoder, [Term("term", build_objective(config), view=build_view(config, encoder, seed))])


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# attacked views


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("objective", ["nt_xent", "simsiam", "cross_entropy"])
def test_the_attacked_view_is_in_the_ball_and_raises_its_loss(objective, batchnorm):
    encoder, batch = make_encoder(), make_batch()
    config = term(objective, kind="attack", index=1, attack={**PGD, "batchnorm": batchnorm})
    before = copy.deepcopy(encoder.state_dict())
    seen = build_view(config, encoder, seed=0)(encoder, batch)

    moved = seen.images[1] - batch.images[1]
    assert torch.equal(seen.images[0], batch.images[0])
    assert EPS / 2 < moved.abs().max() <= EPS + 1e-6
    assert seen.images.min() >= 0 and seen.images.max() <= 1
    assert not seen.images.requires_grad and seen.images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    model = attacked(encoder, batchnorm)
    with torch.no_grad():
        loss = build_one_sided(config)(model(batch.images[0]), batch)
        raised = loss(model(seen.images[1])) - loss(model(batch.images[1]))
    assert raised.mean() > 0.01
    if batchnorm == "eval":  # in the other mode images see each other
        assert (raised > 0).all()
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not gradients(encoder)


def test_the_other_view_is_encoded_once_and_a_single_view_needs_none():
    encoder, batch, seen = make_encoder().eval(), make_batch(), []

    def against(fixed, batch):
        seen.append(fixed)
        return lambda encoded: (encoded.features - batch.targets).square().sum(1)

    batch = batch._replace(targets=attacked(encoder)(batch.images[0]).features)
    view = adversarial(AttackConfig(**PGD), against, seed=0)
    view(encoder, batch)
    alone = view(encoder, batch._replace(images=batch.images[:1]))
    assert len(seen) == 2 and len(seen[0].features) == IMAGES and seen[1] is None
    moved = (encoder(alone.images[0]).features - batch.targets).square().sum(1)
    assert (moved > 1e-4).all()


def test_starts_follow_from_seed_call_and_image_alone():
    encoder, batch = make_encoder(), make_batch()
    config = term("simsiam", kind="attack", attack={"name": "pgd", "steps": 1, "step_255": 1e-3})

    def images(calls: int, seed: int = 0, order: torch.Tensor | None = None) -> torch.Tensor:
        view, order = build_view(config, encoder, seed), torch.arange(IMAGES) if order is None else order
        shuffled = Batch(batch.images[:, order], batch.labels[order], batch.index[order])
        view.load_state_dict({"calls": torch.tensor(calls)})
        seen = view(encoder, shuffled).images[0]
        assert view.calls == calls + 1
        return seen[order.argsort()]

    first = images(5)
    assert torch.equal(first, images(5))
    torch.testing.assert_close(images(5, order=torch.randperm(IMAGES)), first, rtol=0, atol=1e-4)
    assert (images(6) - first).abs().max() > EPS and (images(5, seed=1) - first).abs().max() > EPS


@pytest.mark.parametrize("attack", [{"name": "fgsm"}, PGD, PGD | {"name": "apgd"}])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_attack_that_meets_what_is_not_finite_makes_no_view(attack, what):
    """Once, of one image: the signs of NaN are 0, so that the attack itself goes on as if nothing had happened."""
    encoder, batch, calls = make_encoder(), make_batch(), []

    def against(fixed, batch):
        def losses(encoded):
            calls.append(0)
            found = encoded.projections.square().sum(1)
            if len(calls) == 1 and what == "loss":
                return found * torch.nan
            if len(calls) == 1 and found.requires_grad:
                found.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), torch.nan))
            return found

        return losses

    view = adversarial(AttackConfig(**attack), against, 0)
    assert view(encoder, batch).images[0].isnan().all()
    assert view(encoder, batch).images.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_the_encoder_s_gradient_is_that_of_training_on_the_attacked_images(batchnorm, autocast):
    """Under autocast too, whose cache of cast weights must not outlive the attack."""
    config = term("simsiam", kind="attack", attack={**PGD, "restarts": 2, "batchnorm": batchnorm})
    batch, found = make_batch(), {}
    for name in ("view", "fixed"):
        encoder = make_encoder()
        view = build_view(config, encoder, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if name == "fixed":
                images = build_view(config, encoder, seed=0)(encoder, batch)
                view = lambda encoder, batch, images=images: images  # noqa: E731
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = TrainStep(encoder, [Term("term", build_objective(config), view=view)])(batch)
        loss.backward()
        found[name] = gradients(encoder), encoder.state_dict()
    (ours, state), (expected, expected_state) = found.values()
    assert ours.keys() == expected.keys() and "backbone.conv1.weight" in ours
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


# learned views


def by_hand(name: str, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The transformation in other words, of one image [3, H, W]; turning and shifting by a table of weights."""
    if name == "colour_space":
        return torch.stack([(numbers[3 * i : 3 * i + 3].softmax(0)[:, None, None] * images).sum(0) for i in range(3)])
    if name == "colour_jitter":
        most = torch.tensor([0.4, 0.4, 0.4, 0.1], dtype=images.dtype)
        b, c, s, h = most * numbers.tanh()
        weights = torch.tensor([0.2989, 0.587, 0.114]).to(images.dtype)[:, None, None]
        x = (images * (1 + b)).clamp(0, 1)
        x = ((1 + c) * x - c * (weights * x).sum(0).mean()).clamp(0, 1)
        x = ((1 + s) * x - s * (weights * x).sum(0)).clamp(0, 1)
        return hue_by_sectors(x, h)
    height, width = images.shape[1:]
    y = torch.arange(height, dtype=images.dtype)[:, None].expand(height, width) - (height - 1) / 2
    x = torch.arange(width, dtype=images.dtype).expand(height, width) - (width - 1) / 2
    if name == "rotation":
        angle = torch.pi / 180 * 30 * numbers[0].tanh()
        x, y = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
    else:
        x, y = x - width / 8 * numbers[0].tanh(), y - height / 8 * numbers[1].tanh()
    x, y = x + (width - 1) / 2, y + (height - 1) / 2
    on_x = (1 - (x[..., None] - torch.arange(width)).abs()).clamp(min=0)  # [H, W, width]
    on_y = (1 - (y[..., None] - torch.arange(height)).abs()).clamp(min=0)
    return torch.einsum("hwj,hwi,cij->chw", on_x, on_y, images)


def hue_by_sectors(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """HSV, hue + turns, and back, by the six sectors."""
    (red, green, blue), value = x, x.amax(0)
    low = x.amin(0)
    chroma = torch.where(value > low, value - low, 1)
    sixths = torch.where(
        value == red,
        (green - blue) / chroma,
        torch.where(value == green, 2 + (blue - red) / chroma, 4 + (red - green) / chroma),
    )
    sixths = (sixths + 6 * turns) % 6
    sector = sixths.floor().detach()
    rise, fall = low + (value - low) * (sixths - sector), value - (value - low) * (sixths - sector)
    table = [
        (value, rise, low),
        (fall, value, low),
        (low, value, rise),
        (low, fall, value),
        (rise, low, value),
        (value, low, fall),
    ]
    out = torch.zeros_like(x)
    for k, colours in enumerate(table):
        out = torch.where(sector == k, torch.stack(colours), out)
    return out


@pytest.mark.parametrize("objective", ["nt_xent", "simsiam"])
@pytest.mark.parametrize("name", ["colour_space", "rotation", "translation", "colour_jitter"])
def test_the_adversary_climbs_and_the_encoder_descends_the_same_loss(name, objective):
    """In float64 against min max written by hand: the encoder's gradient is ∂L, the adversary's −∂L, exactly."""
    config = term(objective, kind="structured", structured={"transformations": [name]})
    encoder, batch = make_encoder(smooth=True).double(), make_batch()
    batch = batch._replace(images=batch.images.double())
    step = step_of(config, encoder).double()
    adversary = step.views["term"].layer
    with torch.no_grad():
        adversary.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    loss, values = step(batch)
    (2 * loss).backward()

    twin = copy.deepcopy(encoder)
    weight, bias = (p.detach().clone().requires_grad_() for p in (adversary.weight, adversary.bias))
    features = make_encoder(smooth=True).double().eval()(batch.images[0]).features.detach()
    changed = torch.stack(
        [by_hand(name, x, n) for x, n in zip(batch.images[0], features @ weight.T + bias, strict=True)]
    )
    encoded = twin(torch.cat([changed, batch.images[1]]))
    expected = 2 * build_objective(config)(encoded, batch).mean()
    expected.backward()

    torch.testing.assert_close(2 * loss, expected, rtol=1e-10, atol=0)
    assert weight.grad.abs().max() > 1e-6
    torch.testing.assert_close(adversary.weight.grad, -weight.grad, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(adversary.bias.grad, -bias.grad, rtol=1e-7, atol=1e-12)
    for p, q in zip(encoder.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-12)
    assert len(values) == 1 + len(bias) and not any(value.requires_grad for value in values.values())
    assert {key for key in values if key != "term"} == {f"view/term/{key}" for key in step.views["term"].scalars()}


def test_a_learned_view_under_a_penalty_raises_the_penalised_loss():
    """The adversary's gradient through the double backward, against finite differences of the penalised loss."""
    config = resolve(
        ViewedTermConfig,
        {
            "objective": "nt_xent",
            "penalty": {"weight": 30.0},
            "view": {"kind": "structured", "structured": {"transformations": ["rotation", "colour_space"]}},
        },
    )
    step = step_of(config, make_encoder(smooth=True).double().eval()).double()
    bias = step.views["term"].layer.bias
    batch = make_batch()
    batch = batch._replace(images=batch.images.double())
    with torch.no_grad():
        bias.add_(0.2)
    loss, _ = step(batch)
    loss.backward()
    found, h = bias.grad.clone(), 1e-5
    for k in (0, 1, 6):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[k] += sign * h
            values.append(step(batch)[0].detach())
            with torch.no_grad():
                bias[k] -= sign * h
        slope = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close(found[k], -slope, rtol=1e-5, atol=1e-10)


def test_a_learned_view_begins_as_the_clean_one_and_reports_its_constants():
    encoder, batch = make_encoder(), make_batch()
    config = StructuredConfig(transformations=("colour_space", "rotation", "translation", "colour_jitter"))
    view = structured(config, encoder.backbone.num_features)
    assert view.scalars() == {}
    seen = view(encoder, batch)
    means = batch.images[0].mean(1, keepdim=True)
    torch.testing.assert_close(seen.images[0], 0.85 * batch.images[0] + 0.15 * means, rtol=0, atol=1e-5)
    assert torch.equal(seen.images[1], batch.images[1])
    scalars = view.scalars()
    assert len(scalars) == 9 + 1 + 2 + 4
    torch.testing.assert_close(scalars["colour_space/c2_green"], torch.tensor(0.9))
    with torch.no_grad():
        view.layer.bias[9] = -0.5
    view(encoder, batch)
    torch.testing.assert_close(view.scalars()["rotation/degrees"], 30 * torch.tensor(0.5).tanh())


# training


class Case(NamedTuple):
    """One way to take the same optimiser steps."""

    kind: str
    objective: str
    stage: int = 0
    accumulation: int = 1
    optimizer: str = "lars"


def build(case: Case):
    # in L2: a sign turns rounding near 0 into a whole step
    attack = {**PGD, "norm": "l2", "eps_255": 127.5}
    options = {"attack": attack} if case.kind == "attack" else {"structured": {"lr_factor": 2.0}}
    config = term(case.objective, kind=case.kind, **options)
    if case.objective == "nt_xent":
        config = config.model_copy(update={"temperature": 0.5})
    step = step_of(config, make_encoder(smooth=True))
    settings = OptimizerConfig(
        name=case.optimizer, lr=0.05, lr_scaling="none", trust_coefficient=0.01, weight_decay=0.01, warmup_epochs=0
    )
    optimizer = build_optimizer(settings, step, case.stage, torch.device("cpu"))
    train = engine.TrainConfig(batch=IMAGES, accumulation=case.accumulation, zero_stage=case.stage, precision="fp32")
    return engine.initialize(step, optimizer, train)


def take_steps(trainer, case: Case, start: int, stop: int) -> dict[str, torch.Tensor]:
    """This rank's parts of ``stop - start`` global batches; then the weights and buffers."""
    trainer.train()
    if case.accumulation > 1:  # BatchNorm sees micro-batches, so only with fixed statistics is the split exact
        trainer.module.eval()
    world, rank, size = distributed.world_size(), distributed.rank(), IMAGES // case.accumulation
    gate = Gate(trainer)
    for number in range(start, stop):
        whole = make_batch(number)
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.05 * group.get("lr_factor", 1.0)
        for micro in range(case.accumulation):
            part = slice(micro * size + rank * size // world, micro * size + (rank + 1) * size // world)
            loss, _ = trainer(Batch(whole.images[:, part], whole.labels[part], whole.index[part]))
            trainer.backward(loss)
            gate.step()
    return {name: value.detach().clone() for name, value in trainer.module.state_dict().items()}


def trained(cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    distributed.initialize("cpu")
    return [take_steps(build(case), case, 0, 3) for case in cases]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Over all tensors, |a - b| relative to the tensor's norm, or to 0.1 where that is smaller."""
    return max(float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp_min(0.1)) for k in b)


CASES = [
    Case("attack", "nt_xent"),
    Case("attack", "simsiam", stage=2),
    Case("structured", "nt_xent", stage=1),
    Case("structured", "simsiam", optimizer="sgd"),
    Case("structured", "simsiam", stage=2),
    Case("structured", "simsiam", stage=1, accumulation=2, optimizer="sgd"),
]


def test_two_ranks_and_any_stage_take_the_steps_of_one_process():
    """Weights, adversary, statistics and call counts after 3 steps, to 1e-4 of each tensor's norm."""
    plain = {case: case._replace(stage=0) for case in CASES}
    distinct = list(dict.fromkeys(plain.values()))
    alone = dict(zip(distinct, run_ranks(1, trained, distinct, timeout=300)[0], strict=True))
    for results in run_ranks(2, trained, CASES, timeout=300):
        for case, result in zip(CASES, results, strict=True):
            expected = alone[plain[case]]
            assert largest_difference(result, expected) < 1e-4, case
            if case.kind == "attack":
                assert result["views.term.calls"] == 3
            else:
                assert expected["views.term.layer.weight"].abs().max() > 1e-4


RESUMED = [Case("attack", "simsiam"), Case("structured", "nt_xent", 2, 1, "adamw")]


def whole_and_resumed(folder: str) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    pairs = []
    for case, whole in zip(RESUMED, trained(RESUMED), strict=True):
        trainer = build(case)
        take_steps(trainer, case, 0, 2)
        saver = checkpoint.Saver(bare_run(str(Path(folder) / case.kind)), trainer, lambda: {"config": {}})
        saver.save(2)
        saver.finish()
        again = build(case)
        checkpoint.restore(checkpoint.read(Path(folder) / case.kind / "step-00000002"), again)
        pairs.append((whole, take_steps(again, case, 2, 3)))
    return pairs


def test_a_run_saved_and_loaded_is_the_uninterrupted_one(tmp_path):
    """Bit for bit: the call count, the adversary's weights and its momentum too."""
    for pairs in run_ranks(2, whole_and_resumed, str(tmp_path), timeout=300):
        for whole, resumed in pairs:
            assert whole.keys() == resumed.keys()
            assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("stage", [0, 1])
def test_an_adversary_is_a_group_of_its_own(optimizer, stage):
    """Neither decayed nor adapted; every parameter is in one group."""
    config = term("simsiam", kind="structured", structured={"lr_factor": 3.0})
    step = step_of(config, make_encoder())
    settings = OptimizerConfig(name=optimizer, lr=0.1, weight_decay=0.5)
    groups = build_optimizer(settings, step, stage, torch.device("cpu")).param_groups
    (own,) = [group for group in groups if "lr_factor" in group]
    assert {*own["params"]} == {*step.views.parameters()}
    assert own["lr_factor"] == 3.0 and own["weight_decay"] == 0 and not own.get("adapt", False)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({*listed}) and {*listed} == {*step.parameters()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"kind": "attack", "structured": {"degrees": 10, "transformations": ["rotation"]}},
            "set view.kind=structured",
        ),
        ({"attack": {"name": "pgd"}}, "attack is given: view.kind=clean does not use it"),
        ({"index": 1}, "index=1: view.kind=clean does not use it"),
        ({"kind": "attack", "index": 2}, "index"),
        ({"kind": "sharper"}, "kind"),
    ],
)
def test_configuration_refuses(values, message):
    with pytest.raises(UsageError, match=message):
        resolve(ViewConfig, values)


def test_a_penalty_by_differences_of_a_learned_view_is_refused():
    with pytest.raises(UsageError, match=r"use penalty\.method=double_backward"):
        resolve(
            ViewedTermConfig,
            {"penalty": {"weight": 1, "method": "finite_difference"}, "view": {"kind": "structured"}},
        )


def test_no_view_is_the_clean_one_and_a_view_that_is_not_there_is_named():
    encoder, batch = make_encoder(), make_batch(views=1)
    assert build_view(ViewedTermConfig(), encoder, 0) is clean
    with pytest.raises(UsageError, match=r"view.index=1: the batch has 1 views"):
        structured(StructuredConfig(), encoder.backbone.num_features, index=1)(encoder, batch)


def test_heads_train_after_an_attack_that_saw_them_train(monkeypatch):
    """What autocast cast inside the attack, where no graph is kept, is not what the objective's encoding meets."""
    cleared = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda clear=torch.clear_autocast_cache: cleared.append(clear()))
    encoder = make_encoder()
    step = step_of(term("nt_xent", kind="attack", attack=PGD | {"steps": 1, "batchnorm": "train"}), encoder)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = step(make_batch())
        assert cleared
    loss.backward()
    weights = [layer.weight for layer in encoder.head if isinstance(layer, nn.Linear)]
    assert weights and all(weight.grad is not None and weight.grad.any() for weight in weights)
