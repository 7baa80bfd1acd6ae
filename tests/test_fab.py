"""FAB against the published algorithm, written out image by image; its projections against a bisection."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttrain.attacks import L2, Linf
from fasttrain.attacks.fab import fab, projection
from fasttrain.attacks.search import Cases, Victim
from tests.launches import Watch
from tests.test_attacks import classifier, norms, pictures

THREATS = {"linf": Linf(30 / 255), "l2": L2(1.2)}


def standing_cases(model, n: int, dtype: torch.dtype = torch.double) -> Cases:
    """Pictures that are classified right, each with the likeliest other class for a target."""
    images, labels = pictures(n, dtype)
    with torch.no_grad():
        scores = model(images)
    others = scores.scatter(1, labels[:, None], -torch.inf).argmax(1)
    cases = Cases(images, labels, torch.arange(n), others)
    return Cases(*(x[scores.argmax(1) == labels] for x in cases))


# --- projections ------------------------------------------------------------------------------------------------------


def bisected(point: np.ndarray, w: np.ndarray, amount: float, norm: str) -> np.ndarray:
    """The shortest change with <w, change> = amount that stays in [0, 1], by halving where the multiplier may be."""
    w, amount = (w, amount) if amount >= 0 else (-w, -amount)

    def change(t: float) -> np.ndarray:
        d = t * (np.sign(w) if norm == "linf" else w / np.abs(w).max(initial=1e-300))
        return np.clip(d, -point, 1 - point)

    low, high = 0.0, 1.0
    while (w * change(high)).sum() < amount and high < 1e9:
        high *= 2
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (middle, high) if (w * change(middle)).sum() < amount else (low, middle)
    return change(high)


def hyperplanes(kind: str, n: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """(Points, many of their values at 0 or 1; w; amounts)."""
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(3, n, 3, 5, 4, generator=generator, dtype=torch.double)
    points, w = (0.5 + 0.5 * draw[0]).clamp(0, 1), draw[1]
    most = (w.abs() * torch.where(w > 0, 1 - points, points)).sum((1, 2, 3))
    amount = most * torch.linspace(0.02, 0.95, n, dtype=torch.double)
    if kind == "downwards":
        most = (w.abs() * torch.where(w < 0, 1 - points, points)).sum((1, 2, 3))
        amount = -most * torch.linspace(0.02, 0.95, n, dtype=torch.double)
    elif kind == "zeros":
        w = w * (draw[2] > 0)
        amount = amount * 0.3
    elif kind == "one value":
        w = w * (torch.arange(60).view(1, 3, 5, 4) == torch.arange(n).view(-1, 1, 1, 1))
        amount = 0.5 * (w.abs() * torch.where(w > 0, 1 - points, points)).sum((1, 2, 3))
    elif kind == "on it":
        amount = torch.zeros_like(amount)
    elif kind == "corner":
        points, amount = (points > 0.5).double(), amount * 0
        amount += 0.4 * (w.abs() * torch.where(w > 0, 1 - points, points)).sum((1, 2, 3))
    elif kind == "small":
        w, amount = w * 1e-15, amount * 1e-15
    elif kind == "equal":
        points, w = torch.full_like(points, 0.25), torch.sign(w)
        amount = 0.5 * torch.where(w > 0, 0.75, 0.25).sum((1, 2, 3))
    return points, w, amount


KINDS = ["upwards", "downwards", "zeros", "one value", "on it", "corner", "small", "equal"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", THREATS)
def test_projection_is_the_shortest_change(norm, kind):
    points, w, amount = hyperplanes(kind)
    change = projection(points, w, amount, norm)
    scale = w.abs().amax((1, 2, 3))
    assert ((points + change) >= -1e-12).all() and ((points + change) <= 1 + 1e-12).all()
    assert (((w * change).sum((1, 2, 3)) - amount).abs() <= 1e-8 * scale).all()
    for i in range(len(points)):
        best = bisected(points[i].numpy(), w[i].numpy(), float(amount[i]), norm)
        # L-inf: a value whose w is 0 may move or not, and stays
        found = change[i].numpy()
        assert np.abs(np.where(w[i].numpy() == 0, 0, best) - found).max() < 1e-8
    single = projection(points.float(), w.float(), amount.float(), norm)
    assert (single - change).abs().max() < 1e-4


@pytest.mark.parametrize("norm", THREATS)
def test_projection_on_what_cannot_be_reached(norm):
    """The corner that is nearest to it; where w is 0, the point itself; either way nothing but numbers."""
    points, w, amount = hyperplanes("upwards")
    w[0] = 0
    w[1, 0] = 0
    change = projection(points, w, 100 * amount + 1, norm)
    corner = torch.where(w > 0, 1 - points, torch.where(w < 0, -points, 0))
    assert torch.equal(change, corner)
    assert not change[0].any()


@pytest.mark.parametrize("norm", THREATS)
def test_projection_that_takes_nearly_all_falls_a_little_short_at_most(norm):
    points, w, _ = hyperplanes("upwards")
    w *= 10 ** (-6 * points.roll(1, 0))
    most = (w.abs() * torch.where(w > 0, 1 - points, points)).sum((1, 2, 3))
    for share in (0.99, 0.9999, 0.999999):
        reached = (w * projection(points, w, share * most, norm)).sum((1, 2, 3)) / (share * most)
        assert reached.min() > 0.999 and reached.max() < 1 + 1e-12


@pytest.mark.parametrize("norm", THREATS)
def test_projection_does_not_depend_on_the_scale(norm):
    points, w, amount = (x.float() for x in hyperplanes("upwards"))
    change = projection(points, w, amount, norm)
    for scale in (2.0**-80, 2.0**40):
        assert torch.equal(projection(points, w * scale, amount * scale, norm), change)
    assert projection(points, w * 2.0**-148, amount, norm).isfinite().all()


# --- the search -------------------------------------------------------------------------------------------------------


def published(scores_of, cases: Cases, i: int, eps: float, norm: str, steps: int) -> tuple[np.ndarray, bool]:
    """Croce & Hein's code for one image in NumPy: (iterates, whether the nearest misclassified one is within eps)."""
    image, label, target = cases.images[i].numpy(), int(cases.labels[i]), int(cases.targets[i])

    def ahead(x: np.ndarray) -> tuple[float, np.ndarray]:
        y = torch.from_numpy(x)[None].requires_grad_()
        scores = scores_of(y)[0]
        value = scores[target] - scores[label]
        value.backward()
        return value.item(), y.grad[0].numpy()

    def size(d: np.ndarray) -> float:
        return np.abs(d).max() if norm == "linf" else np.sqrt((d**2).sum())

    x, iterates, nearest = image, [], 1e10
    for _ in range(steps):
        value, w = ahead(x)
        offset = (w * x).sum() - value
        d1, d2 = (bisected(p, w, offset - (w * p).sum(), norm) for p in (x, image))
        a1, a2 = (max(size(d), 1e-8) for d in (d1, d2))
        alpha = min(a1 / (a1 + a2), 0.1)
        x = np.clip((x + 1.05 * d1) * (1 - alpha) + (image + 1.05 * d2) * alpha, 0, 1)
        iterates.append(x)
        with torch.no_grad():
            wrong = int(scores_of(torch.from_numpy(x)[None])[0].argmax()) != label
        if wrong:
            nearest = min(nearest, size(x - image))
            x = image + (x - image) * 0.9
    return np.stack(iterates), nearest <= eps


class Watched:
    """A network, and what it was asked."""

    def __init__(self, model) -> None:
        self.model = model
        self.iterates: list[Tensor] = []
        self.rows: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        if not x.requires_grad:
            self.iterates.append(x.clone())
        return self.model(x)


@pytest.mark.parametrize("norm", THREATS)
def test_every_iterate_is_the_published_one(norm):
    model, steps = classifier(), 12
    cases = standing_cases(model, 8)
    alone = Watched(model)
    fab(type(THREATS[norm])(0), steps)(Victim(alone), cases)
    found = fab(THREATS[norm], steps)(Victim(model), cases)
    for i in range(len(cases.images)):
        iterates, falls = published(model, cases, i, THREATS[norm].eps, norm, steps)
        assert np.abs(torch.stack(alone.iterates)[:, i].numpy() - iterates).max() < 1e-7
        assert falls == bool(found.fell[i])
    assert alone.rows == [len(cases.images)] * 2 * steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", THREATS)
def test_what_falls_is_misclassified_within_the_ball(norm, dtype):
    model, threat = classifier(dtype), THREATS[norm]
    cases = standing_cases(model, 64, dtype)
    found = fab(threat, 20)(Victim(model), cases)
    assert 0.2 < found.fell.double().mean() < 0.95
    assert found.images.dtype == dtype and found.images.min() >= 0 and found.images.max() <= 1
    length = (found.images - cases.images).abs().amax((1, 2, 3))
    length = length if norm == "linf" else (found.images - cases.images).square().sum((1, 2, 3)).sqrt()
    assert (length <= threat.eps).all()
    assert torch.equal(model(found.images).argmax(1) != cases.labels, found.fell)
    assert torch.equal(found.images[~found.fell], cases.images[~found.fell])
    assert not found.bad.any() and not found.flat.any()


@pytest.mark.parametrize("norm", THREATS)
def test_a_linear_classifier_falls_exactly_where_the_boundary_is_nearer_than_eps(norm):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 6, 6, generator=generator, dtype=torch.double)
    images = 0.5 + 0.2 * torch.rand(32, 3, 6, 6, generator=generator, dtype=torch.double) - 0.1
    behind = (images * w).sum((1, 2, 3))
    behind = behind.max() + 1 - behind
    offset = behind[0] + (images[0] * w).sum()
    distance = behind / torch.linalg.vector_norm(w.flatten(), 1 if norm == "linf" else 2)

    def logits(x: Tensor) -> Tensor:
        ahead = (x * w).sum((1, 2, 3)) - offset
        return torch.stack((torch.zeros_like(ahead), ahead, ahead - 100), 1)

    zeros = torch.zeros(32, dtype=torch.long)
    cases, ordered = Cases(images, zeros, torch.arange(32), zeros + 1), distance.sort().values
    assert ordered[-1] < 0.35 or norm == "l2"  # [0, 1] is further away
    for i in (4, 12, 16, 25):
        eps = float(ordered[i : i + 2].mean())
        assert ordered[i + 1] > 1.01 * ordered[i]
        found = fab(type(THREATS[norm])(eps), 12)(Victim(logits), cases)
        assert torch.equal(found.fell, distance < eps)


@pytest.mark.parametrize("norm", THREATS)
def test_an_image_does_not_depend_on_its_batch(norm):
    model = classifier(torch.float32)
    cases = standing_cases(model, 40, torch.float32)
    search = fab(THREATS[norm], 15)
    whole = search(Victim(model), cases)
    order = torch.randperm(len(cases.images), generator=torch.Generator().manual_seed(0))
    for rows in order.split(7):
        part = search(Victim(model), Cases(*(x[rows] for x in cases)))
        assert torch.equal(part.fell, whole.fell[rows])
        assert (part.images - whole.images[rows]).abs().max() < 1e-5


def test_an_image_that_fell_is_let_go():
    model = classifier()
    cases, watched = standing_cases(model, 64), Watched(classifier())
    found = fab(THREATS["linf"], 20)(Victim(watched), cases)
    n, left = len(cases.images), int((~found.fell).sum())
    assert watched.rows[0] == n and watched.rows == sorted(watched.rows, reverse=True)
    assert left <= watched.rows[-1] <= left + n // 16 + 1
    easy = Watched(model)
    assert fab(Linf(0.5), 20)(Victim(easy), cases).fell.all()
    assert len(easy.rows) < 20


def test_a_judge_has_the_last_word():
    model, cases = classifier(), standing_cases(classifier(), 16)
    asked = Watched(lambda x: torch.nn.functional.one_hot(cases.labels[:1].expand(len(x)), 4).double())
    found = fab(THREATS["linf"], 10)(Victim(model, asked), cases)
    assert asked.rows and torch.equal(found.fell, found.fell & (cases.labels != cases.labels[0]))


def test_keeps_the_memory_format():
    model = classifier(torch.float32)
    cases = standing_cases(model, 8, torch.float32)
    tall = cases._replace(images=cases.images.contiguous(memory_format=torch.channels_last))
    for norm, threat in THREATS.items():
        watched = Watched(model.to(memory_format=torch.channels_last))
        found = fab(threat, 5)(Victim(watched), tall)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in [*watched.iterates, found.images])
        plain = fab(threat, 5)(Victim(model), cases)
        assert norms(found.images - plain.images, norm).max() < 1e-4


def test_notes_bad_scores_and_gradients_of_zero():
    def logits(x: Tensor) -> Tensor:
        ahead = (x - 0.5).flatten(1).sum(1) * (x[:, 0, 0, 0] < 0.9)  # its gradient is 0 where that pixel is bright
        ahead = torch.where(x[:, 0, 0, 1] > 0.9, torch.nan, ahead)
        return torch.stack((torch.ones_like(ahead), ahead), 1)

    images = torch.full((3, 3, 4, 4), 0.5)
    images[1, 0, 0, 0] = images[2, 0, 0, 1] = 1
    zeros = torch.zeros(3, dtype=torch.long)
    found = fab(Linf(0.1), 5)(Victim(logits), Cases(images, zeros, zeros, zeros + 1))
    assert found.flat.tolist() == [False, True, True]
    assert found.bad.tolist() == [False, False, True]
    assert found.fell.tolist()[:2] == [True, False]
    assert torch.equal(found.images[1], images[1])


@pytest.mark.parametrize("norm", THREATS)
def test_launches_of_a_step(norm):
    """Beside the network's, on a GPU; and it waits once."""
    images, zeros = torch.full((16, 3, 16, 16), 0.5), torch.zeros(16, dtype=torch.long)
    w, counts = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)), []

    def logits(x: Tensor) -> Tensor:
        ahead = (x * w).sum((1, 2, 3)) - 1000
        return torch.stack((torch.zeros_like(ahead), ahead), 1)

    with mock.patch("fasttrain.attacks.fab._read_for_nothing", lambda x: False):
        for steps in (2, 12):
            with Watch() as watch:
                fab(THREATS[norm], steps)(Victim(logits), Cases(images, zeros, zeros, zeros + 1))
            counts.append(watch)
    first, second = counts
    assert second.total - first.total <= 10 * 190
    assert second.waits.total() - first.waits.total() <= 10
