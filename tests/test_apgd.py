"""APGD against the published algorithm, written out image by image, and against torchattacks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttrain.attacks import L2, Linf, apgd, pgd
from fasttrain.attacks.apgd import checkpoint_windows
from fasttrain.attacks.losses import cross_entropy, dlr, margin, squared_distance
from fasttrain.errors import UsageError
from fasttrain_kernels.apgd import apgd_step, initial_state
from tests.test_attacks import against, classifier, norms, pictures

THREATS = {"linf": Linf(12 / 255), "l2": L2(0.5)}


def published(loss_of_image, image: np.ndarray, start: np.ndarray, eps: float, norm: str, steps: int):
    """Croce & Hein's code for one image in NumPy: (iterates, best iterate, best loss, number of halvings)."""

    def ball(y: np.ndarray) -> np.ndarray:
        if norm == "linf":
            return np.clip(np.minimum(np.maximum(y, image - eps), image + eps), 0, 1)
        change = y - image
        length = np.sqrt((change**2).sum())
        return np.clip(image + change / (length + 1e-12) * min(eps, length), 0, 1)

    def direction(gradient: np.ndarray) -> np.ndarray:
        return np.sign(gradient) if norm == "linf" else gradient / (np.sqrt((gradient**2).sum()) + 1e-12)

    window, shortest, decrease = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    x = old = best = start
    best_loss, gradient = loss_of_image(x)
    best_gradient, iterates = gradient, [x]
    history = np.zeros(steps)
    step_size, since, best_at_check, reduced, halvings = 2 * eps, 0, best_loss, True, 0
    for i in range(steps):
        momentum, old = x - old, x
        a = 0.75 if i > 0 else 1.0
        z = ball(x + step_size * direction(gradient))
        x = ball(x + a * (z - x) + (1 - a) * momentum)
        iterates.append(x)
        history[i], gradient = loss_of_image(x)
        if history[i] > best_loss:
            best, best_loss, best_gradient = x, history[i], gradient
        since += 1
        if since == window:
            rises = sum(history[i - k] > history[i - k - 1] for k in range(window))  # index -1 is the last, still 0
            reduce = rises <= 0.75 * window or (not reduced and best_at_check >= best_loss)
            reduced, best_at_check = reduce, best_loss
            if reduce:
                step_size, x, gradient, halvings = step_size / 2, best, best_gradient, halvings + 1
            since, window = 0, max(window - decrease, shortest)
    return np.stack(iterates), best, best_loss, halvings


def _recorded(loss, seen: list[Tensor]):
    def recording(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return loss(x)

    return recording


def _of_one_image(loss, position: int):
    """The batch's loss as a function of the image there alone, with its gradient, in NumPy."""

    def value(image: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(image)[None].requires_grad_()
        y = loss(x, position)
        y.backward()
        return y.item(), x.grad[0].numpy()

    return value


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50])
@pytest.mark.parametrize("objective", ["cross_entropy", "dlr", "embedding"])
@pytest.mark.parametrize("norm", THREATS)
def test_every_iterate_is_the_published_one(norm, objective, steps):
    model, (images, labels), threat = classifier(), pictures(6), THREATS[norm]
    with torch.no_grad():
        clean = model(images)

    def loss(x: Tensor, where: int | slice = slice(None)) -> Tensor:
        where = slice(where, where + 1) if isinstance(where, int) else where
        if objective == "embedding":
            return squared_distance(model(x), clean[where])
        return (cross_entropy if objective == "cross_entropy" else dlr)(model(x), labels[where])

    keys, seen, halved = torch.arange(6) + 40, [], 0
    found = apgd(threat, steps)(_recorded(loss, seen), images, keys)
    start = threat.start(images, keys)
    for i in range(6):
        iterates, best, best_loss, halvings = published(
            _of_one_image(loss, i), images[i].numpy(), start[i].numpy(), threat.eps, norm, steps
        )
        assert np.abs(torch.stack(seen)[:, i].numpy() - iterates).max() < 1e-8
        assert np.abs(found[i].numpy() - best).max() < 1e-8
        assert loss(found[i : i + 1], i).item() == pytest.approx(best_loss, rel=1e-9)
        halved += halvings
    assert halved > 0 or steps <= 2


@pytest.mark.parametrize("steps", [*range(1, 60), 100, 1000])
def test_checkpoints(steps):
    """The positions at which the published counters meet."""
    k, shortest, decrease = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    counter, expected = 0, [0] * (steps + 1)
    for i in range(steps):
        counter += 1
        if counter == k:
            expected[i + 1], counter, k = k, 0, max(k - decrease, shortest)
    assert checkpoint_windows(steps) == expected[:-1]  # what a check after the last step decides moves nothing


def test_checkpoints_of_a_hundred_steps():
    windows = checkpoint_windows(100)
    assert [i for i, window in enumerate(windows) if window] == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("norm", THREATS)
def test_loss_is_at_least_that_of_pgd(norm):
    model, (images, labels), threat = classifier(), pictures(32), THREATS[norm]
    with torch.no_grad():
        reference = model(images)
    for loss in (against(model, labels, cross_entropy), lambda x: squared_distance(model(x), reference)):
        ours = loss(apgd(threat, 20)(loss, images)).detach()
        for size in (None, threat.eps / 4):
            assert ours.mean() >= loss(pgd(threat, 20, size)(loss, images)).mean() - 1e-3 * ours.mean()


@pytest.mark.parametrize("norm", THREATS)
def test_returns_the_best_of_all_that_it_saw(norm):
    model, (images, labels), seen = classifier(), pictures(8), []
    loss = against(model, labels, dlr)
    found = apgd(THREATS[norm], 15, restarts=3)(_recorded(loss, seen), images)
    assert len(seen) == 3 * 16
    best = torch.stack([loss(x) for x in seen]).amax(0)
    assert torch.allclose(loss(found), best)


def test_needs_a_start_off_the_image_for_the_embedding_distance():
    """At the clean image the distance's gradient is 0; the random start gets away from there."""
    model, (images, _) = classifier(), pictures(4)
    with torch.no_grad():
        reference = model(images)
    loss = lambda x: squared_distance(model(x), reference)  # noqa: E731
    stuck = pgd(Linf(8 / 255), 5, random_start=False)(loss, images)
    assert loss(stuck).max() < 1e-20 and torch.allclose(stuck, images)
    assert loss(apgd(Linf(8 / 255), 10)(loss, images)).min() > 1e-2


def test_an_image_whose_loss_is_nan_spoils_no_other():
    model, (images, labels) = classifier(), pictures(4)
    loss = against(model, labels)
    spoilt = lambda x: loss(x) + torch.tensor([0.0, torch.nan, 0.0, 0.0])  # noqa: E731
    found, expected = (apgd(Linf(8 / 255), 10)(f, images) for f in (spoilt, loss))
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])
    assert found.isfinite().all() and norms(found - images, "linf").max() < 8.001 / 255


def test_bfloat16_autocast_costs_little_loss():
    model, (images, _) = classifier(torch.float32), pictures(32, torch.float32)
    with torch.no_grad():
        reference = model(images)
    loss = lambda x: squared_distance(model(x), reference)  # noqa: E731
    full = loss(apgd(Linf(8 / 255), 10)(loss, images)).mean()
    with torch.autocast("cpu", torch.bfloat16):
        x = apgd(Linf(8 / 255), 10)(loss, images)
    assert x.dtype == torch.float32 and loss(x).mean() > 0.95 * full


@pytest.mark.parametrize("values", [{"steps": 0}, {"steps": 5, "restarts": 0}])
def test_refuses(values):
    with pytest.raises(UsageError, match="at least 1"):
        apgd(Linf(0.1), **values)


def test_step_changes_nothing_in_place_and_checks_shapes():
    images, _ = pictures(3)
    state = initial_state(images.clone(), 0.1)
    kept = [tensor.clone() for tensor in state]
    step = apgd_step(state, torch.ones(3).double(), torch.randn_like(images), images, 0.05, "linf", window=1)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert [a.shape for a in step] == [a.shape for a in state] and [a.dtype for a in step] == [a.dtype for a in state]
    with pytest.raises(ValueError, match="one loss an image"):
        apgd_step(state, torch.ones(()), torch.randn_like(images), images, 0.05, "linf")
    with pytest.raises(ValueError, match="norm='l1'"):
        apgd_step(state, torch.ones(3), torch.randn_like(images), images, 0.05, "l1")


# --- torchattacks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SharedStart(Linf):
    """A ball whose random start is given, to be that of another implementation."""

    given: Tensor | None = None

    def start(self, images: Tensor, keys: Tensor) -> Tensor:
        return self.given


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize(("name", "loss"), [("ce", cross_entropy), ("dlr", dlr)])
@pytest.mark.parametrize("steps", [10, 40])
def test_equals_torchattacks(steps, name, loss, norm):
    torchattacks = pytest.importorskip("torchattacks", reason="needs torchattacks (pip install --no-deps torchattacks)")
    model, (images, labels), eps = classifier(), pictures(16), THREATS[norm].eps
    their = torchattacks.APGD(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, steps=steps, loss=name)
    torch.manual_seed(0)
    best, _, best_loss, _ = their.attack_single_run(images, labels)

    torch.manual_seed(0)
    noise = (2 * torch.rand(images.shape) - 1) if norm == "linf" else torch.randn(images.shape)
    size = norms(noise, norm).view(-1, 1, 1, 1)
    start = (images + eps * noise / size).clamp(0, 1)
    if norm == "linf":
        threat = _SharedStart(eps, start)
    else:
        threat = type("_SharedStartL2", (L2,), {"start": lambda self, images, keys: start})(eps)
    ours = apgd(threat, steps)(against(model, labels, loss), images)
    assert torch.allclose(ours, best, atol=1e-6)
    assert torch.allclose(against(model, labels, loss)(ours), best_loss, rtol=1e-6)


def test_robust_accuracy_equals_that_of_torchattacks():
    torchattacks = pytest.importorskip("torchattacks", reason="needs torchattacks (pip install --no-deps torchattacks)")
    model, (images, labels) = classifier(torch.float32), pictures(128, torch.float32)
    for eps in (0.02, 0.04, 0.06):
        theirs = torchattacks.APGD(model, eps=eps, steps=20)(images, labels)
        ours = apgd(Linf(eps), 20)(against(model, labels, cross_entropy), images)
        right = [(margin(model(x), labels) <= 0).float().mean().item() for x in (theirs, ours)]
        assert abs(right[0] - right[1]) <= 2 / 128, (eps, right)
