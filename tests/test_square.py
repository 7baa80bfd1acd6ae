"""Square Attack against the published algorithm, written out image by image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttrain.attacks import L2, Linf
from fasttrain.attacks.noise import below, signs, words
from fasttrain.attacks.search import Cases, Victim
from fasttrain.attacks.square import blocks, bumps, side_of, square
from tests.launches import Watch
from tests.test_attacks import _mixed, _splitmix64, classifier
from tests.test_fab import Watched, standing_cases

THREATS = {"linf": Linf(30 / 255), "l2": L2(2.2)}


# --- the published code, for one image, with the key's numbers --------------------------------------------------------


class Numbers:
    """Words of one image's key, as Python's integers."""

    def __init__(self, key: int) -> None:
        self._stream = _splitmix64(_mixed(key))
        self._words: list[int] = []

    def __getitem__(self, i: int) -> int:
        while len(self._words) <= i:
            self._words.append(next(self._stream))
        return self._words[i]


def _sign(word: int, bit: int) -> int:
    return 1 if word >> bit & 1 else -1


def _place(word: int, side: int, size: int) -> slice:
    first = (word >> 32) * (size - side + 1) >> 32
    return slice(first, first + side)


def eta_rectangle(rows: int, columns: int) -> np.ndarray:
    """Windows that grow from the middle, each of weight 1 / (its number)²."""
    delta = np.zeros((rows, columns))
    half_rows, half_columns = rows // 2 + 1, columns // 2 + 1
    row, column = half_rows - 1, half_columns - 1
    for k in range(max(half_rows, half_columns)):
        height, width = min(row + 2 * k + 1, rows), min(column + 2 * k + 1, columns)
        delta[max(row, 0) : height, max(column, 0) : width] += 1 / (k + 1) ** 2
        row, column = row - 1, column - 1
    return delta / np.sqrt((delta**2).sum())


def eta(side: int, turned: int) -> np.ndarray:
    delta = np.zeros((side, side))
    if side > 1:
        delta[: side // 2] = eta_rectangle(side // 2, side)
    delta[side // 2 :] = -eta_rectangle(side - side // 2, side)
    delta /= np.sqrt((delta**2).sum())
    return delta.T if turned else delta


def start(image: np.ndarray, key: int, eps: float, norm: str) -> np.ndarray:
    numbers, (channels, height, width) = Numbers(key), image.shape
    if norm == "linf":
        sign = np.array([[_sign(numbers[c * width + j], 0) for j in range(width)] for c in range(channels)])
        return np.clip(image + eps * sign[:, None, :], 0, 1)
    delta, side, tile = np.zeros_like(image), height // 5, 0
    for i in range(height // side):
        for j in range(width // side):
            top, left = (height % side) // 2 + i * side, (width % side) // 2 + j * side
            for c in range(channels):
                bump = eta(side, numbers[tile] >> 63) * _sign(numbers[tile], c)
                delta[c, top : top + side, left : left + side] += bump
            tile += 1
    return np.clip(image + delta / (np.sqrt((delta**2).sum()) + 1e-12) * eps, 0, 1)


def proposal(best: np.ndarray, image: np.ndarray, numbers: Numbers, query: int, side: int, eps: float, norm: str):
    channels, height, width = image.shape
    drawn = [numbers[5 * query + i] for i in range(5)]
    rows, columns = (_place(drawn[0], side, height), _place(drawn[2], side, width))
    sign = np.array([_sign(drawn[4], c) for c in range(channels)])[:, None, None]
    if norm == "linf":
        x = best.copy()
        x[:, rows, columns] += 2 * eps * sign
        return np.clip(np.minimum(np.maximum(x, image - eps), image + eps), 0, 1)
    rows2, columns2 = (_place(drawn[1], side, height), _place(drawn[3], side, width))
    delta, mask = best - image, np.zeros_like(image)
    mask[:, rows, columns] = mask[:, rows2, columns2] = 1
    old = delta[:, rows, columns]
    windows = np.sqrt(((delta * mask) ** 2).sum((1, 2), keepdims=True))
    new = eta(side, drawn[4] >> 63) * sign + old / (1e-12 + np.sqrt((old**2).sum((1, 2), keepdims=True)))
    left = max(eps**2 - (delta**2).sum(), 0) / channels
    new = new / (1e-12 + np.sqrt((new**2).sum((1, 2), keepdims=True))) * np.sqrt(left + windows**2)
    delta[:, rows2, columns2] = 0
    delta[:, rows, columns] = new
    return np.clip(image + delta / (np.sqrt((delta**2).sum()) + 1e-12) * eps, 0, 1)


def published_side(query: int, image: np.ndarray, norm: str) -> int:
    steps = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    p = 0.8 / 2 ** sum(query > step for step in steps)
    pixels = image[0].size
    if norm == "linf":
        return min(max(round(math.sqrt(p * pixels)), 1), *image.shape[1:])
    side = max(round(math.sqrt(p * pixels)), 3)
    return min(side + (side % 2 == 0), *image.shape[1:])


def published(scores_of, image: np.ndarray, label: int, key: int, threat, queries: int) -> list[np.ndarray]:
    """All images that are tried, until one is misclassified."""

    def behind(x: np.ndarray) -> float:
        scores = scores_of(x)
        return scores[label] - np.delete(scores, label).max()

    best = start(image, key, threat.eps, threat.norm)
    tried, lowest, numbers = [best], behind(best), Numbers(_mixed(key + 1))
    for query in range(queries):
        if lowest < 0:
            break
        side = published_side(query, image, threat.norm)
        x = proposal(best, image, numbers, query, side, threat.eps, threat.norm)
        tried.append(x)
        if behind(x) < lowest:
            best, lowest = x, behind(x)
    return tried


@pytest.mark.parametrize("norm", THREATS)
def test_every_proposal_is_the_published_one(norm):
    model, queries = classifier(), 70
    cases = standing_cases(model, 6)
    cases = cases._replace(keys=cases.keys * 977 - 3)
    tried: dict[int, list[Tensor]] = {i: [] for i in range(6)}
    for i in tried:
        alone = Watched(model)
        square(THREATS[norm], queries)(Victim(alone), Cases(*(x[i : i + 1] for x in cases)))
        tried[i] = alone.iterates
    found = square(THREATS[norm], queries)(Victim(model), cases)

    def scores_of(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(x)[None])[0].numpy()

    for i, ours in tried.items():
        label, key = int(cases.labels[i]), int(cases.keys[i])
        theirs = published(scores_of, cases.images[i].numpy(), label, key, THREATS[norm], queries)
        assert len(ours) == len(theirs)
        assert max(np.abs(x[0].numpy() - y).max() for x, y in zip(ours, theirs, strict=True)) < 1e-7
        assert bool(found.fell[i]) == (int(scores_of(theirs[-1]).argmax()) != label)
    assert 0 < int(found.fell.sum()) < 6


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 7, 9, 13, 29])
def test_bumps(side):
    found = bumps(side, 2, torch.double, torch.device("cpu"))
    for turned in (0, 1):
        assert np.abs(found[turned].numpy() - np.pad(eta(side, turned), 2)).max() < 1e-12


def test_squares_become_smaller_as_in_the_standard_version():
    images = torch.empty(1, 3, 32, 32)
    at = [0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001]
    assert [side_of(i, images, 1) for i in at] == [29, 29, 20, 20, 14, 14, 10, 10, 7, 7, 5, 5, 4, 4, 3]
    assert [side_of(i, images, 3) for i in at] == [29, 29, 21, 21, 15, 15, 11, 11, 7, 7, 5, 5, 5, 5, 3]
    for least, norm in ((1, "linf"), (3, "l2")):
        for shape in ((3, 32, 32), (3, 9, 7), (3, 2, 4)):
            for query in range(0, 9000, 7):
                side = side_of(query, torch.empty(1, *shape), least)
                assert side == published_side(query, np.empty(shape), norm)


@pytest.mark.parametrize("queries", [1, 10, 11, 12, 64, 65, 500, 5000])
def test_blocks_are_all_queries_in_order_with_squares_of_one_size(queries):
    images, seen = torch.empty(1, 3, 32, 32), []
    for first, count in blocks(queries):
        assert 0 < count <= 64
        assert side_of(first, images, 1) == side_of(first + count - 1, images, 1)
        seen += range(first, first + count)
    assert seen == list(range(queries))


# --- numbers --------------------------------------------------------


def test_words_are_the_keys_and_start_anywhere():
    keys = torch.tensor([0, 5, -7])
    whole = words(keys, 20)
    assert torch.equal(words(keys, 6, 4), whole[:, 4:10])
    for key, row in zip(keys.tolist(), whole.tolist(), strict=True):
        assert [word % 2**64 for word in row] == [Numbers(key)[i] for i in range(20)]


def test_places_reach_every_row_and_signs_are_fair():
    drawn = words(torch.arange(50), 400)
    for limit in (1, 3, 32):
        counts = below(drawn, limit).flatten().bincount(minlength=limit)
        assert len(counts) == limit
        assert ((counts - 20000 / limit).abs() < 5 * math.sqrt(20000 / limit)).all()
    coins = signs(drawn, 3).double()
    assert coins.unique().tolist() == [-1, 1]
    assert coins.mean((0, 1)).abs().max() < 0.03
    assert torch.corrcoef(coins.flatten(0, 1).T).fill_diagonal_(0).abs().max() < 0.03


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", THREATS)
def test_what_falls_is_misclassified_within_the_ball(norm, dtype):
    model, threat = classifier(dtype), THREATS[norm]
    cases, watched = standing_cases(model, 64, dtype), Watched(model)
    found = square(threat, 100)(Victim(watched), cases)
    assert 0.1 < found.fell.double().mean() < 0.95
    change = found.images - cases.images
    length = change.abs().amax((1, 2, 3)) if norm == "linf" else change.square().sum((1, 2, 3)).sqrt()
    assert length.max() <= threat.eps + 1e-6
    assert all(x.dtype == dtype and x.min() >= 0 and x.max() <= 1 for x in watched.iterates)
    assert torch.equal(model(found.images).argmax(1) != cases.labels, found.fell)
    assert torch.equal(found.images[~found.fell], cases.images[~found.fell])
    assert not found.bad.any() and not found.flat.any()
    left = int((~found.fell).sum())
    assert len(watched.rows) == 101 and watched.rows == sorted(watched.rows, reverse=True)
    assert left <= watched.rows[-1] <= left + len(cases.images) // 16 + 1


@pytest.mark.parametrize("norm", THREATS)
def test_a_linear_classifier_falls_only_where_the_boundary_is_nearer_than_eps(norm):
    """A random search does not find every such image; of the rest it must find none."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 1, 10, generator=generator, dtype=torch.double).expand(3, 10, 10)
    images = 0.4 + 0.2 * torch.rand(64, 3, 10, 10, generator=generator, dtype=torch.double)
    reach = torch.linalg.vector_norm(w.flatten(), 1 if norm == "linf" else 2)
    images = images - w / w.square().sum() * reach * torch.linspace(0, 0.1, 64, dtype=torch.double).view(-1, 1, 1, 1)
    ahead = (images * w).sum((1, 2, 3))
    offset = ahead.max() + 0.02 * reach
    distance, zeros = (offset - ahead) / reach, torch.zeros(64, dtype=torch.long)

    def logits(x: Tensor) -> Tensor:
        ahead = (x * w).sum((1, 2, 3)) - offset
        return torch.stack((torch.zeros_like(ahead), ahead), 1)

    eps = float(distance.quantile(0.6))
    found = square(type(THREATS[norm])(eps), 200)(Victim(logits), Cases(images, zeros, torch.arange(64), zeros + 1))
    assert not found.fell[distance > eps].any()
    assert found.fell[distance < 0.5 * eps].any()


@pytest.mark.parametrize("norm", THREATS)
def test_an_image_does_not_depend_on_its_batch(norm):
    model = classifier(torch.float32)
    cases = standing_cases(model, 40, torch.float32)
    search = square(THREATS[norm], 60)
    whole = search(Victim(model), cases)
    for rows in torch.randperm(len(cases.images), generator=torch.Generator().manual_seed(0)).split(7):
        part = search(Victim(model), Cases(*(x[rows] for x in cases)))
        assert torch.equal(part.fell, whole.fell[rows])
        assert (part.images - whole.images[rows]).abs().max() < 1e-5


def test_images_differ_in_where_their_squares_lie():
    image = torch.full((1, 3, 8, 8), 0.5).expand(32, -1, -1, -1)
    cases, watched = Cases(image, *(torch.zeros(32, dtype=torch.long),) * 3), Watched(lambda x: x[:, :2, 0, 0] * 0 + 1)
    square(Linf(0.1), 300)(Victim(watched), cases._replace(keys=torch.arange(32)))
    assert len({tuple(x.flatten().tolist()) for x in watched.iterates[-1]}) == 32
    moved = torch.stack(watched.iterates[1:]) - watched.iterates[0]
    assert (moved != 0).any(0).flatten(0, 1).any(0).all()  # every row and column, the last ones too


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 4, 3), (3, 7, 12), (1, 9, 9)])
@pytest.mark.parametrize("norm", THREATS)
def test_images_of_any_shape(norm, shape):
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    watched = Watched(lambda x: torch.stack((x.sum((1, 2, 3)), -x.sum((1, 2, 3))), 1) - 0.1)
    cases = Cases(images, torch.zeros(4, dtype=torch.long), torch.arange(4), torch.ones(4, dtype=torch.long))
    square(THREATS[norm], 80)(Victim(watched), cases)
    assert all(x.isfinite().all() for x in watched.iterates)


def test_keeps_the_memory_format():
    model = classifier(torch.float32)
    cases = standing_cases(model, 8, torch.float32)
    tall = cases._replace(images=cases.images.contiguous(memory_format=torch.channels_last))
    for threat in THREATS.values():
        watched, plain = Watched(model), Watched(model)
        found = square(threat, 20)(Victim(watched), tall)
        square(threat, 20)(Victim(plain), cases)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in [*watched.iterates, found.images])
        assert torch.allclose(watched.iterates[1], plain.iterates[1], atol=1e-6)


def test_notes_bad_scores():
    def logits(x: Tensor) -> Tensor:
        return torch.stack((torch.ones(len(x)), torch.where(x[:, 0, 0, 0] > 0.7, torch.nan, 0.0)), 1)

    images = torch.full((2, 3, 8, 8), 0.5)
    images[1] = 0.9
    zeros = torch.zeros(2, dtype=torch.long)
    found = square(Linf(0.1), 5)(Victim(logits), Cases(images, zeros, torch.arange(2), zeros + 1))
    assert found.bad.tolist() == [False, True] and not found.fell[0]


@pytest.mark.parametrize("norm, most", [("linf", 30), ("l2", 66)])
def test_launches_of_a_query(norm, most):
    """Beside the network's, on a GPU; and it waits once."""
    images = torch.full((16, 3, 16, 16), 0.5)
    zeros = torch.zeros(16, dtype=torch.long)
    cases, counts = Cases(images, zeros, torch.arange(16), zeros + 1), []
    scores = torch.tensor([[1.0, 0.0]]).expand(16, -1)
    for queries in (100, 164):
        with Watch() as watch:
            square(THREATS[norm], queries)(Victim(lambda x: scores), cases)
        counts.append(watch)
    first, second = counts
    assert second.total - first.total <= 64 * most
    assert second.waits.total() - first.waits.total() <= 64
