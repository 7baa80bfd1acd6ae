"""TRADES against its formula, against a step written by hand, and over ranks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain import distributed, engine
from fasttrain.attacks import Linf, attacked, image_keys
from fasttrain.config import resolve
from fasttrain.data import Batch
from fasttrain.errors import UsageError
from fasttrain.models import Encoded, Encoder, ModelConfig
from fasttrain.objectives import TermConfig, build_objective, build_one_sided, check_term, encode, trades
from fasttrain.optim import OptimizerConfig, build_optimizer
from fasttrain.views import ViewedTermConfig, build_view
from tests.ranks import run_ranks
from tests.test_views import EPS, IMAGES, gradients, largest_difference, make_batch, make_encoder, step_of

PGD = {"name": "pgd", "steps": 3}


def term(**values: Any) -> ViewedTermConfig:
    view = {"kind": "attack", "attack": PGD} | values.pop("view", {})
    return resolve(ViewedTermConfig, {"objective": "trades", "view": view} | values)


def encoded(logits: Tensor | None) -> Encoded:
    return Encoded(images=None, stages=(), features=None, projections=None, logits=logits)


def batch_of(labels: Tensor, views: int = 2) -> Batch:
    return Batch(torch.zeros(views, len(labels), 3, 1, 1), labels, torch.arange(len(labels)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([2, 0, 3, 3, 1])


def by_hand(
    clean: list[float], attacked: list[float], label: int, beta: float
) -> tuple[float, list[float], list[float]]:
    """An image's loss, and its gradient by the clean and by the attacked logits, by loops over the classes."""
    p, q = ([math.exp(z) / sum(math.exp(other) for other in logits) for z in logits] for logits in (clean, attacked))
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    loss = -math.log(p[label]) + beta * divergence
    of_clean = [
        a - (c == label) + beta * a * (math.log(a / b) - divergence) for c, (a, b) in enumerate(zip(p, q, strict=True))
    ]
    return loss, of_clean, [beta * (b - a) for a, b in zip(p, q, strict=True)]


def test_the_loss_and_its_gradient_are_the_formula_image_by_image():
    clean, moved = random(5, 4), random(5, 4, seed=1)
    expected = [by_hand(x.tolist(), z.tolist(), int(y), 2.5) for x, z, y in zip(clean, moved, LABELS, strict=True)]
    logits = torch.cat([clean, moved]).requires_grad_()
    losses = trades(2.5)(encoded(logits), batch_of(LABELS))
    torch.testing.assert_close(losses.tolist(), [loss for loss, _, _ in expected])
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    rows = [row for _, row, _ in expected] + [row for _, _, row in expected]
    torch.testing.assert_close(gradient.tolist(), rows)
    assert torch.autograd.gradgradcheck(lambda x: trades(2.5)(encoded(x), batch_of(LABELS)), logits)


def test_an_attack_raises_the_divergence_alone_whose_gradient_at_the_image_is_0():
    clean, moved = random(5, 4), random(5, 4, seed=1).requires_grad_()
    loss = build_one_sided(TermConfig(objective="trades", beta=3))(encoded(clean), batch_of(LABELS))
    whole, plain = (trades(beta)(encoded(torch.cat([clean, moved])), batch_of(LABELS)) for beta in (1.0, 1e-12))
    torch.testing.assert_close(loss(encoded(moved)), whole - plain)
    same = clean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(encoded(same)).sum(), same)
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_any_precision_give_float32(dtype):
    logits = torch.cat([random(5, 4), random(5, 4, seed=1)]).to(dtype)
    losses = trades()(encoded(logits), batch_of(LABELS))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.double(), trades(6.0)(encoded(logits.double()), batch_of(LABELS)), rtol=1e-5, atol=1e-6
    )


def test_the_attacked_images_come_beside_the_clean_ones():
    encoder, batch = make_encoder(), make_batch(views=1)
    before = copy.deepcopy(encoder.state_dict())
    seen = build_view(term(), encoder, seed=0)(encoder, batch)
    assert seen.images.shape[:2] == (2, IMAGES) and torch.equal(seen.images[0], batch.images[0])
    assert seen.images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert EPS / 2 < (seen.images[1] - batch.images[0]).abs().max() <= EPS + 1e-6
    with torch.no_grad():
        network = attacked(encoder)
        loss = build_one_sided(term())(network(batch.images[0]), batch)
        assert (loss(network(seen.images[1])) > 1e-4).all()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not gradients(encoder)


@pytest.mark.parametrize("beta", [None, 2.0])
def test_a_step_is_the_one_of_plain_pytorch(beta):
    """Loss, gradients, running statistics: attacked in evaluation mode, then x and x' each with its statistics."""
    batch = make_batch(views=1)
    step = step_of(term(beta=beta), make_encoder())
    loss, values = step(batch)
    (3 * loss).backward()

    plain, images = make_encoder(), batch.images[0]
    moved = build_view(term(), make_encoder(), seed=0)(plain, batch).images[1]
    clean, other = plain(images).logits, plain(moved).logits
    divergence = F.kl_div(other.log_softmax(1), clean.softmax(1), reduction="sum") / IMAGES
    expected = F.cross_entropy(clean, batch.labels) + (beta or 6) * divergence
    (3 * expected).backward()

    torch.testing.assert_close(loss, expected)
    assert torch.equal(values["term"], loss.detach())
    ours, theirs = gradients(step.encoder), gradients(plain)
    assert ours.keys() == theirs.keys() and "backbone.conv1.weight" in ours
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(step.encoder.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert plain.state_dict()["backbone.bn1.num_batches_tracked"] == 2


def test_the_attack_of_a_step_is_plain_pytorchs():
    """PGD on the divergence from the same start, by a loop over the encoder in evaluation mode."""
    encoder, batch = make_encoder(smooth=True), make_batch(views=1)
    x, twin = batch.images[0], copy.deepcopy(encoder).eval()
    moved = build_view(term(), encoder, seed=3)(encoder, batch).images[1]
    z, clean = Linf(EPS).start(x, image_keys(3, 0, batch.index)), twin(x).logits.detach()
    for _ in range(3):
        z.requires_grad_()
        divergence = F.kl_div(twin(z).logits.log_softmax(1), clean.softmax(1), reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, z)
        z = z.detach() + 2.5 * EPS / 3 * gradient.sign()
        z = z.clamp(x - EPS, x + EPS).clamp(0, 1)
    assert ((z - moved).abs() < 1e-5).double().mean() > 0.99  # where rounding decides a sign, a whole step differs


def test_a_penalty_is_of_both_images():
    """L + λ/2 (‖∂ℓ/∂x‖² + ‖∂ℓ/∂x'‖²) / 2, x' held where the attack left it."""
    step, batch = step_of(term(penalty={"weight": 40.0}), make_encoder(smooth=True)), make_batch(views=1)
    loss, values = step(batch)
    plain = make_encoder(smooth=True)
    both = build_view(term(), plain, seed=0)(plain, batch).images.detach().requires_grad_()
    logits = torch.cat([plain(images).logits for images in both])
    losses = trades()(encoded(logits), batch)
    (gradient,) = torch.autograd.grad(losses.sum(), both, create_graph=True)
    penalty = 40 / 2 * gradient.square().sum((2, 3, 4)).mean()
    torch.testing.assert_close(values["penalty/term"], penalty, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss, losses.mean() + penalty, rtol=1e-4, atol=0)
    loss.backward()
    (losses.mean() + penalty).backward()
    for p, q in zip(step.encoder.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=2e-4)


def test_layers_have_the_loss_each_with_its_head():
    encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.125, classes=3, layer_heads=True))
    seen = make_batch()
    of = build_objective(resolve(TermConfig, {"objective": "trades", "layers": {"alpha": [0.5, 0, 0, 1]}}))
    whole = encode(encoder, seen.images.flatten(0, 1), [of])
    parts = [encode(encoder, images, [lambda encoded, batch: None]) for images in seen.images]
    logits = [torch.cat([part.layers[k].logits for part in parts]) for k in (0, 3)]
    expected = 0.5 * trades()(encoded(logits[0]), seen) + trades()(encoded(logits[1]), seen)
    torch.testing.assert_close(of(whole, seen), expected)


def trained(stage: int) -> dict[str, Tensor]:
    """Weights and buffers after two steps, at that ZeRO stage."""
    distributed.initialize("cpu")
    world, rank = distributed.world_size(), distributed.rank()
    part = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    # in L2: a sign turns rounding near 0 into a whole step
    step = step_of(term(view={"attack": PGD | {"norm": "l2", "eps_255": 127.5}}), make_encoder(smooth=True))
    settings = OptimizerConfig(name="sgd", lr=0.05, lr_scaling="none", warmup_epochs=0)
    optimizer = build_optimizer(settings, step, stage, torch.device("cpu"))
    train = engine.TrainConfig(batch=IMAGES, zero_stage=stage, precision="fp32")
    trainer = engine.initialize(step, optimizer, train)
    trainer.train()
    for number in range(2):
        whole = make_batch(number, views=1)
        loss, _ = trainer(Batch(whole.images[:, part], whole.labels[part], whole.index[part]))
        trainer.backward(loss)
        trainer.step()
    return {name: value.detach().clone() for name, value in trainer.module.state_dict().items()}


def test_two_ranks_under_zero_take_the_steps_of_one_process():
    """Weights and running statistics, each view's over all ranks, to 1e-4 of each tensor's norm."""
    alone = trained(0)
    assert alone["encoder.backbone.bn1.num_batches_tracked"] == 4
    for result in run_ranks(2, trained, 2, timeout=120):
        assert largest_difference(result, alone) < 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "cross_entropy", "beta": 6}, "beta=6.0: cross_entropy has none, remove it"),
        ({"temperature": 0.5}, "temperature=0.5: trades has none"),
        ({"beta": 0}, "beta=0: should be greater than 0"),
        (
            {"view": {"kind": "clean", "attack": {}}},
            "objective=trades compares .* view.kind=clean: set view.kind=attack",
        ),
        ({"view": {"attack": {"name": "fgsm"}}}, r"view\.attack\.name=fgsm would start at the image.* use"),
        ({"view": {"attack": {"name": "pgd", "random_start": False}}}, r"pgd with view\.attack\.random_start=true"),
        ({"view": {"index": 1}}, r"view\.index=1: trades is of one view, set view\.index=0"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(values, message):
    with pytest.raises(UsageError, match=message) as caught:
        term(**values)
    assert "\n" not in str(caught.value)


def test_what_a_run_lacks_is_named_at_its_start():
    heads = resolve(ModelConfig, {"arch": "resnet18", "classes": 4})
    check_term(term(), heads, 1, 4, 64)
    for model, views, classes, message in [
        (heads, 2, 4, r"augment\.views=2: trades compares an image with its attacked self, set augment\.views=1"),
        (heads, 1, 5, r"set model\.classes=5"),
        (heads.model_copy(update={"classes": 0}), 1, 4, r"model\.classes=0: trades needs it"),
        (heads, 1, 1, "trades tells classes apart"),
    ]:
        with pytest.raises(UsageError, match=message):
            check_term(term(), model, views, classes, 64)
    with pytest.raises(UsageError, match=r"set model\.classes"):
        trades()(encoded(None), batch_of(LABELS))
    with pytest.raises(UsageError, match=r"the batch has 1 view\(s\), not those two: set view.kind=attack"):
        trades()(encoded(random(5, 4)), batch_of(LABELS, views=1))
