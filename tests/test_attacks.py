"""Threat models, noise, losses, FGSM, PGD and PLB; what every attack promises. APGD's own steps are in test_apgd.py."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.attacks import L2, AttackConfig, Linf, PLBConfig, apgd, attacked, fgsm, image_keys, make_attack, pgd, plb
from fasttrain.attacks.losses import cross_entropy, dlr, dlr_targeted, margin, squared_distance
from fasttrain.attacks.noise import normal, uniform
from fasttrain.attacks.plb import prox_l2, prox_linf
from fasttrain.config import resolve
from fasttrain.errors import UsageError
from fasttrain.models import BatchNorm2d, Encoder, HeadConfig, ModelConfig

SIDE, CLASSES = 8, 4
ATTACKS = {
    "fgsm-linf": fgsm(Linf(8 / 255)),
    "fgsm-l2": fgsm(L2(0.3)),
    "pgd-linf": pgd(Linf(8 / 255), 5, 3 / 255),
    "pgd-l2": pgd(L2(0.3), 5, restarts=2),
    "apgd-linf": apgd(Linf(8 / 255), 10),
    "apgd-l2": apgd(L2(0.3), 10, restarts=2),
    "plb-linf": plb(PLBConfig(steps=30)),
    "plb-l2": plb(PLBConfig(norm="l2", steps=30)),
}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), BatchNorm2d(16)
        self.fc = nn.Linear(16 * SIDE * SIDE // 4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images - 0.5)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().flatten(1))


def pictures(n: int, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    """Noisy copies of one coarse picture a class, many of their pixels at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(CLASSES, 3, 2, 2, generator=generator, dtype=torch.double)
    labels = torch.arange(n) % CLASSES
    picture = F.interpolate(coarse, SIDE, mode="bilinear")[labels]
    noise = 0.25 * torch.randn(n, 3, SIDE, SIDE, generator=generator, dtype=torch.double)
    return (picture + noise).clamp(0, 1).to(dtype), labels


@cache
def _trained() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, (images, labels) = Classifier().double(), pictures(128)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    return model.state_dict()


def classifier(dtype: torch.dtype = torch.double) -> Classifier:
    """A small trained network in evaluation mode, right on nearly all of :func:`pictures`."""
    model = Classifier().double()
    model.load_state_dict(_trained())
    return model.eval().to(dtype)


def against(model: nn.Module, labels: Tensor, loss=margin):
    return lambda images: loss(model(images), labels)


def norms(change: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(change.flatten(1), math.inf if norm == "linf" else 2, dim=1)


def test_the_classifier_is_worth_attacking():
    images, labels = pictures(32)
    assert (classifier()(images).argmax(1) == labels).double().mean() > 0.9


# --- noise ------------------------------------------------------------------------------------------------------------


def _splitmix64(state: int):
    """The generator of Steele, Lea & Flood 2014 in Python's integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        yield z ^ z >> 31


def _mixed(key: int) -> int:
    return next(_splitmix64(key - 0x9E3779B97F4A7C15))


def test_uniform_is_splitmix64():
    keys = torch.tensor([0, 1, -5, 2**62])
    found = uniform(keys, torch.empty(4, 3, 2, 2))
    for key, row in zip(keys.tolist(), found.flatten(1), strict=True):
        words = _splitmix64(_mixed(key))
        assert row.tolist() == [(next(words) >> 40) / 2**24 for _ in range(12)]


def test_splitmix64_known_answer():
    words = _splitmix64(1234567)  # the first outputs for this seed, as published with the reference implementation
    assert [next(words) for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_has_its_distribution():
    scipy_stats = pytest.importorskip("scipy.stats")
    like, keys = torch.empty(20, 3, 16, 16), image_keys(3, 7, torch.arange(20))
    assert scipy_stats.kstest(uniform(keys, like).flatten().numpy(), "uniform").pvalue > 0.01
    assert scipy_stats.kstest(normal(keys, like).flatten().numpy(), "norm").pvalue > 0.01
    rows = normal(keys, like).flatten(1)
    assert np.abs(np.corrcoef(rows) - np.eye(20)).max() < 0.15


def test_keys_are_of_the_image_alone():
    keys = image_keys(1, 2, torch.tensor([5, 9, 2]))
    assert torch.equal(image_keys(1, 2, torch.tensor([9])), keys[1:2])
    several = [image_keys(seed, step, torch.arange(50)) for seed in (0, 1, -1) for step in (0, 1, 2)]
    assert len(torch.cat(several).unique()) == 450


# --- threat models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.7)], ids=["linf", "l2"])
def test_starts_lie_on_the_surface_where_the_pixel_range_allows(threat):
    grey = torch.full((4, 3, SIDE, SIDE), 0.5)
    start = threat.start(grey, torch.arange(4))
    assert torch.allclose(norms(start - grey, threat.norm), torch.tensor(threat.eps), rtol=1e-5)
    assert len({tuple(row.tolist()) for row in start.flatten(1)}) == 4
    white = torch.ones(4, 3, SIDE, SIDE)
    start = threat.start(white, torch.arange(4))
    assert start.min() >= 0 and start.max() <= 1
    assert norms(start - white, threat.norm).max() <= threat.eps * (1 + 1e-6)


def test_projections():
    centre, x = torch.rand(5, 3, SIDE, SIDE).double(), torch.randn(5, 3, SIDE, SIDE).double()
    expected = np.clip(np.clip(x.numpy(), centre.numpy() - 0.1, centre.numpy() + 0.1), 0, 1)
    assert np.array_equal(Linf(0.1).project(x, centre).numpy(), expected)
    for image, point, found in zip(centre, x, L2(0.5).project(x, centre), strict=True):
        change = (point - image).numpy()
        nearest = image.numpy() + change * min(1, 0.5 / np.sqrt((change**2).sum()))
        assert np.allclose(found.numpy(), nearest.clip(0, 1), atol=1e-10)
    inside = centre + 1e-3 * x
    for threat in (Linf(0.1), L2(0.5)):
        assert torch.allclose(threat.project(inside, centre), inside.clamp(0, 1), atol=1e-12)
        assert torch.allclose(type(threat)(0.0).project(x, centre), centre)


def test_steps_are_the_steepest_of_their_length():
    x, gradient = torch.rand(2, 3, SIDE, SIDE).double(), torch.randn(2, 3, SIDE, SIDE).double()
    for threat, dual in ((Linf(0.1), 1), (L2(0.1), 2)):
        move = threat.step(x, gradient, 0.2) - x
        assert torch.allclose(norms(move, threat.norm), torch.tensor(0.2).double())
        gain = (move * gradient).flatten(1).sum(1)
        assert torch.allclose(gain, 0.2 * torch.linalg.vector_norm(gradient.flatten(1), dual, dim=1))
    assert torch.equal(L2(0.1).step(x, torch.zeros_like(x), 0.2), x)


@pytest.mark.parametrize("make", [lambda: Linf(8), lambda: Linf(-0.1), lambda: L2(math.inf), lambda: L2(math.nan)])
def test_radii_out_of_range(make):
    with pytest.raises(UsageError, match="eps="):
        make()


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_against_their_equations():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 6)), rng.integers(0, 6, 40)
    targets = (labels + 1 + rng.integers(0, 5, 40)) % 6
    expected = {name: [] for name in ("cross_entropy", "margin", "dlr", "dlr_targeted")}
    for z, y, t in zip(logits, labels, targets, strict=True):
        others = max(z[i] for i in range(6) if i != y)
        down = sorted(z, reverse=True)
        expected["cross_entropy"].append(np.log(np.exp(z).sum()) - z[y])
        expected["margin"].append(others - z[y])
        expected["dlr"].append(-(z[y] - others) / (down[0] - down[2]))
        expected["dlr_targeted"].append(-(z[y] - z[t]) / (down[0] - (down[2] + down[3]) / 2))
    z, y, t = (torch.from_numpy(a) for a in (logits, labels, targets))
    found = {"cross_entropy": cross_entropy(z, y), "margin": margin(z, y), "dlr": dlr(z, y)}
    found["dlr_targeted"] = dlr_targeted(z, y, t)
    for name, values in expected.items():
        assert np.allclose(found[name].numpy(), values, rtol=1e-9), name
    wrong = z.argmax(1) != y
    assert torch.equal(margin(z, y) > 0, wrong) and torch.equal(dlr(z, y) > 0, wrong)
    a, b = rng.normal(size=(2, 5, 7))
    distance = squared_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert np.allclose(distance.numpy(), [np.linalg.norm(u - v) ** 2 for u, v in zip(a, b, strict=True)])


def test_losses_are_float32_for_half_precision():
    logits, labels = torch.randn(4, 5).bfloat16(), torch.arange(4)
    for loss in (cross_entropy, margin, dlr, squared_distance):
        assert loss(logits, logits.flip(0) if loss is squared_distance else labels).dtype == torch.float32


def test_dlr_needs_classes():
    with pytest.raises(UsageError, match="3 classes"):
        dlr(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UsageError, match="4 classes"):
        dlr_targeted(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long))


# --- what every attack promises ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ATTACKS)
def test_stays_in_the_ball_and_in_range(name, dtype):
    images, labels = pictures(8, dtype)
    x = ATTACKS[name](against(classifier(dtype), labels), images)
    assert x.shape == images.shape and x.dtype == dtype and not x.requires_grad
    assert x.min() >= 0 and x.max() <= 1
    if not name.startswith("plb"):
        norm, eps = ("linf", 8 / 255) if name.endswith("linf") else ("l2", 0.3)
        assert norms(x - images, norm).max() <= eps * (1 + 1e-6)
        assert (against(classifier(dtype), labels)(x) > against(classifier(dtype), labels)(images)).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_does_not_see_its_batch(name):
    images, labels = pictures(6)
    keys = image_keys(0, 3, torch.tensor([11, 4, 8, 90, 2, 5]))
    whole = ATTACKS[name](against(classifier(), labels), images, keys)
    again = ATTACKS[name](against(classifier(), labels), images, keys)
    assert torch.equal(whole, again)
    for part in ([0], [5, 2], [1, 3, 4]):
        found = ATTACKS[name](against(classifier(), labels[part]), images[part], keys[part])
        assert torch.allclose(found, whole[part], atol=1e-9)


@pytest.mark.parametrize("name", ["pgd-linf", "pgd-l2", "apgd-linf", "apgd-l2"])
def test_keys_make_the_start(name):
    images, labels = pictures(4)
    loss = against(classifier(), labels)
    one, other = (ATTACKS[name](loss, images, image_keys(0, step, torch.arange(4))) for step in (0, 1))
    assert not torch.allclose(one, other, atol=1e-4)
    assert torch.equal(ATTACKS[name](loss, images), ATTACKS[name](loss, images, torch.arange(4)))


@pytest.mark.parametrize(
    ("name", "gradients", "forwards"),
    [
        ("fgsm-linf", 1, 0),
        ("pgd-linf", 5, 0),
        ("pgd-l2", 10, 2),
        ("apgd-linf", 10, 1),
        ("apgd-l2", 20, 2),
        ("plb-l2", 30, 1),
    ],
)
def test_number_of_evaluations_is_fixed(name, gradients, forwards):
    seen = []

    def loss(images: Tensor) -> Tensor:
        seen.append(images.requires_grad and torch.is_grad_enabled())
        return margin(model(images), labels)

    model, (images, labels) = classifier(), pictures(4)
    for wrong in (labels, (labels + 1) % CLASSES):  # nothing misclassified, all misclassified
        seen.clear()
        labels = wrong
        ATTACKS[name](loss, images)
        assert (sum(seen), len(seen)) == (gradients, gradients + forwards)


class _Watch(TorchDispatchMode):
    """Counts gradients of weights, and refuses what would wait for a GPU."""

    weight_gradients, image_gradients = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        assert not name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.item")), (
            name
        )
        if name.startswith("aten.index.Tensor"):
            assert all(index is None or index.dtype != torch.bool for index in arguments[1])
        if name.startswith(("aten.convolution_backward", "aten.native_batch_norm_backward")):
            self.image_gradients += arguments[-1][0]
            self.weight_gradients += arguments[-1][1]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ATTACKS)
def test_asks_for_gradients_of_the_images_alone_and_never_waits(name):
    model, (images, labels) = classifier(), pictures(4)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    with _Watch() as watch:
        ATTACKS[name](against(model, labels), images)
    assert watch.image_gradients > 0 and watch.weight_gradients == 0
    assert all(p.grad is None for p in model.parameters() if p is not model.fc.weight)
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ATTACKS)
def test_never_waits_for_a_gpu(name):
    images, labels = (tensor.cuda() for tensor in pictures(4, torch.float32))
    loss = against(classifier(torch.float32).cuda(), labels)
    ATTACKS[name](loss, images)  # the first call of a kernel may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        ATTACKS[name](loss, images, image_keys(0, 1, torch.arange(4, device="cuda")))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_losses_never_wait():
    images, labels = pictures(4)
    model = classifier()
    targeted = lambda logits, labels: dlr_targeted(logits, labels, (labels + 1) % CLASSES)  # noqa: E731
    with _Watch():
        for loss in (cross_entropy, dlr, targeted, lambda logits, _: squared_distance(logits, logits.detach() + 1)):
            ATTACKS["apgd-linf"](against(model, labels, loss), images)


def test_the_watch_sees_weight_gradients():
    images, labels = pictures(4)
    with _Watch() as watch:
        against(classifier(), labels)(images).sum().backward()
    assert watch.weight_gradients > 0


@pytest.mark.parametrize("name", ATTACKS)
def test_leaves_running_statistics_alone(name):
    model, (images, labels) = classifier().train(), pictures(4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ATTACKS[name](against(model, labels), images)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ATTACKS)
def test_works_without_gradients_and_keeps_channels_last(name):
    images, labels = pictures(4, torch.float32)
    model = classifier(torch.float32).to(memory_format=torch.channels_last)
    layouts = []

    def loss(x: Tensor) -> Tensor:
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return margin(model(x), labels)

    with torch.no_grad():
        x = ATTACKS[name](loss, images.contiguous(memory_format=torch.channels_last))
    assert all(layouts) and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x, ATTACKS[name](against(model, labels), images), atol=1e-3) or "plb" in name


@pytest.mark.parametrize("name", ATTACKS)
def test_a_training_pass_after_it_under_autocast_is_whole(name):
    """Autocast keeps the casts of weights: those of a pass without a graph would leave the weights no gradient."""
    model, (images, labels) = classifier(torch.float32), pictures(4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = ATTACKS[name](against(model, labels), images)
        cross_entropy(model(x), labels).mean().backward()
    assert x.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.conv2.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ATTACKS)
def test_one_loss_an_image(name):
    images, labels = pictures(4)
    with pytest.raises(UsageError, match=r"give one loss an image, \[4\]"):
        ATTACKS[name](lambda x: F.cross_entropy(classifier()(x), labels), images)


def test_no_images():
    images, labels = pictures(4)
    for name in ("fgsm-linf", "pgd-l2", "apgd-linf", "apgd-l2"):
        assert ATTACKS[name](against(classifier(), labels[:0]), images[:0]).shape == (0, 3, SIDE, SIDE)


# --- FGSM and PGD -----------------------------------------------------------------------------------------------------


def _gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), labels, reduction="sum").backward()
    return x.grad


def test_fgsm_is_one_clamped_step():
    model, (images, labels) = classifier(), pictures(8)
    gradient = _gradient(model, images, labels)
    loss = against(model, labels, cross_entropy)
    assert torch.allclose(fgsm(Linf(0.1))(loss, images), (images + 0.1 * gradient.sign()).clamp(0, 1))
    unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(fgsm(L2(0.5))(loss, images), (images + 0.5 * unit).clamp(0, 1))


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.4)], ids=["linf", "l2"])
def test_pgd_against_a_loop(threat):
    model, (images, labels) = classifier(), pictures(8)
    x = threat.start(images, torch.arange(8))
    for _ in range(4):
        gradient = _gradient(model, x, labels)
        if threat.norm == "linf":
            x = torch.min(torch.max(x + 0.02 * gradient.sign(), images - 0.05), images + 0.05).clamp(0, 1)
        else:
            x = x + 0.02 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            length = (x - images).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            x = torch.where(length > 0.4, images + (x - images) * 0.4 / length, x).clamp(0, 1)
    assert torch.allclose(pgd(threat, 4, 0.02)(against(model, labels, cross_entropy), images), x, atol=1e-9)


def test_restarts_raise_the_loss():
    model, (images, labels) = classifier(), pictures(16)
    loss = against(model, labels)
    one, three = (loss(pgd(Linf(0.05), 2, 0.05, restarts=n)(loss, images)).detach() for n in (1, 3))
    assert (three >= one).all() and (three > one).any()


@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_and_fgsm_equal_torchattacks(steps):
    torchattacks = pytest.importorskip("torchattacks", reason="needs torchattacks (pip install --no-deps torchattacks)")
    model, (images, labels) = classifier(torch.float32), pictures(16, torch.float32)
    loss = against(model, labels, cross_entropy)
    theirs = torchattacks.PGD(model, 8 / 255, 2 / 255, steps, random_start=False)(images, labels)
    assert torch.allclose(pgd(Linf(8 / 255), steps, 2 / 255, random_start=False)(loss, images), theirs, atol=1e-6)
    # theirs is the gradient of a mean, small enough for the constant that they add to its norm to be felt
    theirs = torchattacks.PGDL2(model, 0.5, 0.2, steps, False, eps_for_division=1e-30)(images, labels)
    assert torch.allclose(pgd(L2(0.5), steps, 0.2, random_start=False)(loss, images), theirs, atol=1e-5)
    assert torch.allclose(fgsm(Linf(8 / 255))(loss, images), torchattacks.FGSM(model, 8 / 255)(images, labels))


def test_pgd_refuses():
    with pytest.raises(UsageError, match="steps=0"):
        pgd(Linf(0.1), 0)
    with pytest.raises(UsageError, match="random_start"):
        pgd(Linf(0.1), 5, restarts=2, random_start=False)


# --- PLB --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prox", "order"), [(prox_linf, np.inf), (prox_l2, 2)], ids=["linf", "l2"])
@pytest.mark.parametrize("mu", [1e-3, 0.3, 2.0, 50.0])
def test_proximal_operators_minimise(prox, order, mu):
    """Against SciPy on a smooth form of the problem, and against random points; μ = 50 is inside the dual ball."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 8))
    rows[2, :4] = rows[2, 0]  # ties
    found = prox(torch.from_numpy(rows).view(3, 2, 2, 2), mu).view(3, 8).numpy()

    def value(u: np.ndarray, d: np.ndarray) -> float:
        return np.linalg.norm(u, order) + ((u - d) ** 2).sum() / (2 * mu)

    for d, u in zip(rows, found, strict=True):
        # with t = ‖u‖ as a variable of its own the problem is smooth
        inside = (
            (lambda v: np.concatenate([v[8] - v[:8], v[8] + v[:8]]))
            if order == np.inf
            else (lambda v: v[8] ** 2 - (v[:8] ** 2).sum())
        )
        solved = optimize.minimize(
            lambda v, d=d: v[8] + ((v[:8] - d) ** 2).sum() / (2 * mu),
            np.append(0.9 * d, np.abs(d).sum()),
            constraints=[{"type": "ineq", "fun": inside}, {"type": "ineq", "fun": lambda v: v[8]}],
            options={"maxiter": 1000, "ftol": 1e-14},
        )
        assert value(u, d) <= value(solved.x[:8], d) + 1e-9
        assert value(u, d) > solved.fun - 1e-4 * max(1, abs(solved.fun))
        for _ in range(200):
            assert value(u, d) <= value(u + rng.normal(size=8) * 10 ** rng.uniform(-6, 0), d) + 1e-12
    if mu == 50.0:
        assert not found.any()


def test_prox_linf_is_moreaus_decomposition():
    """d − prox(d) lies in the L1 ball of radius μ, on its surface where d lies outside."""
    d = torch.randn(50, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    for mu in (0.01, 5.0, 60.0):
        rest = (d - prox_linf(d, mu)).abs().flatten(1).sum(1)
        assert torch.allclose(rest, d.abs().flatten(1).sum(1).clamp(max=mu))


@pytest.mark.parametrize(("norm", "threat", "shrink"), [("linf", Linf, 0.3), ("l2", L2, 0.1)])
def test_plb_finds_nearer_adversaries_than_pgd(norm, threat, shrink):
    model, (images, labels) = classifier(), pictures(16)
    loss = against(model, labels)
    right = loss(images) < 0
    x = plb(PLBConfig(norm=norm, steps=300, inner=10, shrink=shrink))(loss, images)
    assert (loss(x) > 0).all()
    assert torch.equal(x[~right], images[~right])
    found = norms(x - images, norm)
    radii = np.geomspace(0.005, 1, 25) if norm == "linf" else np.geomspace(0.05, 10, 25)
    fooled = torch.stack([loss(pgd(threat(r), 40)(loss, images)) > 0 for r in radii])
    by_pgd = torch.from_numpy(radii)[fooled.int().argmax(0)]  # to within the grid's 1.25
    assert fooled.any(0).all()
    assert (found[right] < by_pgd[right]).double().mean() > 0.9
    assert found[right].median() < by_pgd[right].median()


def test_plb_returns_the_image_where_nothing_succeeds():
    images, _ = pictures(4)
    x = plb(PLBConfig(steps=20))(lambda x: x.flatten(1).mean(1) - 2, images)
    assert torch.equal(x, images)


def test_plb_on_a_half_space():
    """The distance to a hyperplane is known: |w·x + b| / ‖w‖ in the dual norm."""
    generator = torch.Generator().manual_seed(0)
    images = 0.5 + 0.01 * torch.randn(4, 3, 4, 4, generator=generator).double()
    w = torch.randn(3, 4, 4, generator=generator).double()
    offset = (images * w).flatten(1).sum(1).max() + 1
    gap = offset - (images * w).flatten(1).sum(1)
    for norm, dual, shrink in (("linf", 1, 0.1), ("l2", 2, 0.05)):
        config = PLBConfig(norm=norm, steps=600, inner=20, shrink=shrink)
        x = plb(config)(lambda x: (x * w).flatten(1).sum(1) - offset, images)
        nearest = gap / torch.linalg.vector_norm(w, dual)
        ratio = norms(x - images, norm) / nearest
        assert ratio.min() >= 1 and ratio.max() < 1.05, (norm, ratio)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_configuration_makes_the_attack():
    model, (images, labels) = classifier(), pictures(4)
    loss = against(model, labels, cross_entropy)
    for config, attack in (
        ({}, apgd(Linf(8 / 255), 10)),
        ({"norm": "l2", "eps_255": 127.5, "steps": 5, "restarts": 2}, apgd(L2(0.5), 5, restarts=2)),
        ({"name": "fgsm", "eps_255": 4}, fgsm(Linf(4 / 255))),
        ({"name": "pgd", "step_255": 2}, pgd(Linf(8 / 255), 10, 2 / 255)),
        ({"name": "pgd", "random_start": False}, pgd(Linf(8 / 255), 10, 2 / 255, random_start=False)),
    ):
        assert torch.allclose(make_attack(resolve(AttackConfig, config))(loss, images), attack(loss, images))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "fgsm", "steps": 3}, "fgsm does not use it"),
        ({"step_255": 2.0}, "apgd does not use it"),
        ({"random_start": False}, "apgd does not use it"),
        ({"name": "pgd", "restarts": 2, "random_start": False}, "all be one"),
        ({"eps_255": 300}, "at most 255"),
        ({"eps_255": -1}, "greater than or equal to 0"),
        ({"name": "cw"}, "'fgsm', 'pgd' or 'apgd'"),
    ],
)
def test_configuration_refuses(values, message):
    with pytest.raises(UsageError, match=message):
        resolve(AttackConfig, values)


def test_attacked_encoder():
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(arch="resnet18", stem="cifar", width=0.125, head=HeadConfig(layers=0))).double()
    images = torch.rand(4, 3, 16, 16).double()
    assert attacked(encoder, "train") is encoder
    found = attacked(encoder)(images).features
    assert torch.allclose(found, encoder.eval()(images).features)
    with pytest.raises(UsageError, match="batchnorm=train"):
        attacked(encoder, "train")
