"""kNN and the linear probe against double loops, SciPy, and one process."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.data import Batch
from fasttrain.data.augment import AugmentConfig
from fasttrain.data.catalog import DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig
from fasttrain.errors import NotFinite, UsageError
from fasttrain.evaluation import Features, KNNConfig, LinearConfig, extract, knn, linear_probe
from fasttrain.evaluation.accuracy import hits
from fasttrain.evaluation.images import catalog_features
from fasttrain.evaluation.linear import fit
from tests.ranks import run_ranks


def _clusters(n: int, classes: int, spread: float, seed: int, dtype: torch.dtype = torch.float32) -> Features:
    """Noisy points round one centre a class; centres are the same for every seed."""
    centres = torch.randn(classes, 12, generator=torch.Generator().manual_seed(99), dtype=torch.double)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    points = centres[labels] + spread * torch.randn(n, 12, generator=generator, dtype=torch.double)
    return Features(points.to(dtype), labels, torch.arange(n))


def _share(samples: Features, sizes: list[int]) -> Features:
    return Features(*(member.split(sizes)[distributed.rank()] for member in samples))


def _brute_force_knn(train: Features, val: Features, k: int, temperature: float) -> tuple[float, float]:
    bank, queries = train.features.double().numpy(), val.features.double().numpy()
    right = np.zeros(2)
    for query, label in zip(queries, val.labels.tolist(), strict=True):
        cosines = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in bank]
        votes: dict[int, float] = {}
        for cosine, voter in sorted(zip(cosines, train.labels.tolist(), strict=True), reverse=True)[:k]:
            votes[voter] = votes.get(voter, 0.0) + math.exp(cosine / temperature)
        ranking = sorted(votes, key=lambda c: (-votes[c], c))
        right += [label in ranking[:1], label in ranking[:5]]
    return tuple(right / len(val.labels))


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (40, 0.07), (300, 1.0)])
def test_knn_equals_brute_force(k: int, temperature: float) -> None:
    train, val = _clusters(300, 9, 2.0, 1), _clusters(60, 9, 2.0, 2)
    found = knn(train, val, KNNConfig(neighbours=k, temperature=temperature))
    assert (found.top1, found.top5) == pytest.approx(_brute_force_knn(train, val, k, temperature))
    assert 0.2 < found.top1 < 0.95  # a case that can tell right from wrong


def test_knn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = _clusters(300, 9, 2.0, 1), _clusters(60, 9, 2.0, 2)
    whole = knn(train, val, KNNConfig(neighbours=20))
    module = importlib.import_module("fasttrain.evaluation.knn")  # the package's `knn` is the function
    monkeypatch.setattr(module, "QUERIES", 7)
    monkeypatch.setattr(module, "BANK_ROWS", 11)
    assert knn(train, val, KNNConfig(neighbours=20)) == whole


def test_knn_lowers_k_and_says_so() -> None:
    train, val = _clusters(30, 3, 1.0, 1), _clusters(20, 3, 1.0, 2)
    found = knn(train, val)
    assert found.neighbours == 30
    assert found.note is not None and "30" in found.note and "200" in found.note
    assert knn(train, val, KNNConfig(neighbours=30)).note is None


def test_knn_at_a_tiny_temperature() -> None:
    train, val = _clusters(100, 5, 1.0, 1), _clusters(40, 5, 1.0, 2)
    nearest = knn(train, val, KNNConfig(neighbours=1))
    assert knn(train, val, KNNConfig(neighbours=50, temperature=1e-5)).top1 == nearest.top1


def test_hits_breaks_ties_by_class() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.5, 2.0], [-torch.inf, 1.0, 0.0]])
    assert hits(scores, torch.tensor([1, 1, 0]), (1, 2, 3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_never_hits(value):
    assert hits(torch.full((4, 10), value), torch.tensor([0, 3, 5, 9])).tolist() == [0, 0]
    scores = torch.tensor([[2.0, value, 0.0], [2.0, 1.0, 0.0]])
    assert hits(scores, torch.tensor([0, 0]), (1, 3)).tolist() == [1, 1]  # the second row's


def spoilt(samples: Features, value: float, rows: list[int]) -> Features:
    features = samples.features.clone()
    features[rows, 3] = value
    return samples._replace(features=features)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("evaluate", [knn, linear_probe])
def test_features_that_are_not_finite_are_counted_and_named(evaluate, value):
    train, val = _clusters(300, 9, 2.0, 1), _clusters(60, 9, 2.0, 2)
    with pytest.raises(NotFinite, match="the features of 2 of 300 training images are not finite"):
        evaluate(spoilt(train, value, [7, 200]), val)
    with pytest.raises(NotFinite, match="the features of 1 of 60 validation images are not finite"):
        evaluate(train, spoilt(val, value, [0]))


@pytest.mark.parametrize("scale", [1e-30, 1e30, 3e37])
def test_features_of_any_finite_scale_give_the_same(scale):
    """The squares of such features are not finite, or 0."""
    train, val = _clusters(300, 9, 2.0, 1), _clusters(60, 9, 2.0, 2)
    scaled = [part._replace(features=part.features * scale) for part in (train, val)]
    assert knn(*scaled, KNNConfig(neighbours=20))[:2] == knn(train, val, KNNConfig(neighbours=20))[:2]
    settings = LinearConfig(l2=(1e-2,))
    assert linear_probe(*scaled, settings)[:4] == pytest.approx(linear_probe(train, val, settings)[:4], abs=0.02)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_an_encoder_that_gives_the_same_for_all_is_right_about_one_class(value):
    train, val = (_clusters(n, 9, 2.0, 1) for n in (300, 60))
    train, val = (part._replace(features=torch.full_like(part.features, value)) for part in (train, val))
    shares = {float(share) for share in torch.bincount(val.labels, minlength=9) / 60}
    assert knn(train, val).top1 in shares and linear_probe(train, val).val_top1 in shares


def _not_finite_on_one_rank() -> list[str]:
    train = _share(_clusters(300, 9, 2.0, 1), [150, 150])
    val = _share(_clusters(60, 9, 2.0, 2), [30, 30])
    bad = spoilt(train, math.nan, [5]) if distributed.rank() == 1 else train
    said = []
    for evaluate in (knn, linear_probe):
        with pytest.raises(NotFinite) as caught:
            evaluate(bad, val)
        said.append(str(caught.value))
    return said


def test_one_rank_whose_features_are_not_finite_is_all_ranks_error():
    line = "the features of 1 of 300 training images are not finite"
    assert run_ranks(2, _not_finite_on_one_rank) == [[line, line]] * 2


class Overflowing(nn.Module):
    """Features that fp16 cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4, bias=False)
        nn.init.constant_(self.linear.weight, 1e5)

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(features=self.linear(images.mean((2, 3)) + 1))


def test_the_reason_is_the_weights_or_the_precision(images):
    catalog = open_catalog(DataConfig(root=str(images)), "val")
    augment, cpu = AugmentConfig(size=16), torch.device("cpu")

    def features(encoder: nn.Module, autocast: torch.dtype | None) -> Features:
        return catalog_features(encoder, catalog, catalog.indices, 8, augment, LoaderConfig(threads=1), cpu, autocast)

    encoder = Overflowing()
    assert features(encoder, None).features.isfinite().all()
    total = len(catalog)
    with pytest.raises(NotFinite, match=rf"of {total} of {total} val images .* in fp32 they are.* precision=bf16, or"):
        features(encoder, torch.float16)
    encoder.linear.weight.data[2, 1] = math.nan
    with pytest.raises(NotFinite, match=r"linear.weight is not finite \(1 of 12 values\)"):
        features(encoder, torch.float16)
    encoder.linear.weight.data.fill_(3e38)
    with pytest.raises(NotFinite, match="too large for fp32"):
        features(encoder, None)


def test_probe_is_the_convex_optimum() -> None:
    samples, l2, classes = _clusters(80, 4, 2.0, 1, torch.double), 0.03, 4
    x, labels = samples.features.numpy(), samples.labels.numpy()

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:-classes].reshape(classes, -1), flat[-classes:]
        picked = log_softmax(x @ weight.T + bias, axis=1)[np.arange(len(labels)), labels]
        return -picked.mean() + 0.5 * l2 * (weight**2).sum()

    expected = minimize(objective, np.zeros(classes * 13), tol=1e-10)
    zeros = torch.zeros(classes, 12, dtype=torch.double)
    weight, bias = fit(samples, zeros, zeros[:, 0], l2, 200)
    assert objective(np.concatenate([weight.flatten().numpy(), bias.numpy()])) <= expected.fun + 1e-9
    np.testing.assert_allclose(weight.flatten(), expected.x[:-classes], atol=1e-4)


def test_probe_table() -> None:
    train, val = _clusters(600, 6, 1.5, 1), _clusters(200, 6, 1.5, 2)
    scaled = [part._replace(features=part.features * 1000 + 500) for part in (train, val)]  # standardised away
    found = linear_probe(train, val, LinearConfig(l2=(1e-4, 1e-2, 1.0)))
    assert found.l2 in found.held_out and set(found.held_out) == {1e-4, 1e-2, 1.0}
    assert found.held_out[found.l2] == max(found.held_out.values())
    assert 0.6 < found.val_top1 <= found.val_top5 <= 1 and found.train_top1 >= found.val_top1 - 0.05
    assert linear_probe(*scaled, LinearConfig(l2=(1e-4, 1e-2, 1.0))).val_top1 == pytest.approx(found.val_top1, abs=0.01)


def _sharded() -> list[tuple]:
    results = []
    for train_sizes, val_sizes in (([150, 150], [30, 30]), ([299, 1], [0, 60])):
        train = _share(_clusters(300, 9, 2.0, 1), train_sizes)
        val = _share(_clusters(60, 9, 2.0, 2), val_sizes)
        found = knn(train, val, KNNConfig(neighbours=50)), linear_probe(train, val, LinearConfig(l2=(1e-3, 1e-1)))
        results.append(found)
    with pytest.raises(UsageError, match="0 validation images"):
        knn(train, _share(_clusters(60, 9, 2.0, 2), [0, 0, 60]))
    return results


def test_two_ranks_equal_one() -> None:
    train, val = _clusters(300, 9, 2.0, 1), _clusters(60, 9, 2.0, 2)
    nearest = knn(train, val, KNNConfig(neighbours=50))
    probe = linear_probe(train, val, LinearConfig(l2=(1e-3, 1e-1)))
    for results in run_ranks(2, _sharded):
        for found_nearest, found_probe in results:
            assert found_nearest[:2] == pytest.approx(nearest[:2], abs=0.02)  # one image of 60 may flip by rounding
            assert found_probe[:4] == pytest.approx(probe[:4], abs=0.02)
            assert found_probe.l2 == probe.l2


def test_nothing_to_evaluate_is_a_usage_error() -> None:
    some, none = _clusters(10, 2, 1.0, 1), Features(torch.zeros(0, 12), *torch.zeros(2, 0, dtype=torch.long))
    for evaluate in (knn, linear_probe):
        with pytest.raises(UsageError, match="0 training images"):
            evaluate(none, some)
        with pytest.raises(UsageError, match="0 validation images"):
            evaluate(some, none)
    with pytest.raises(UsageError, match="no batch"):
        extract(nn.Identity(), [], torch.device("cpu"))


class _MeanColour(nn.Module):
    """An encoder whose features are known: the mean colour of each image, in training mode plus one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()

    def forward(self, images: Tensor) -> SimpleNamespace:
        assert not torch.is_grad_enabled()
        return SimpleNamespace(features=images.mean((2, 3)) + float(self.training))


def test_extract() -> None:
    encoder = _MeanColour().train()
    encoder.frozen.eval()
    images = torch.rand(2, 5, 3, 4, 4)
    labels, index = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2, 6, 5, 3])
    cuts = ((0, 2), (2, 5), (5, 5))
    batches = [Batch(images[:, a:b], labels[a:b], index[a:b]) for a, b in cuts]
    found = extract(encoder, batches, torch.device("cpu"))
    torch.testing.assert_close(found.features, images[0].mean((2, 3)))
    assert torch.equal(found.labels, labels) and torch.equal(found.index, index)
    assert encoder.training and encoder.norm.training and not encoder.frozen.training
    empty = extract(encoder, batches[2:], torch.device("cpu"))
    assert empty.features.shape == (0, 3) and empty.features.dtype == torch.float32
    half = extract(encoder, batches, torch.device("cpu"), autocast=torch.bfloat16)
    assert half.features.dtype == torch.float32
    with pytest.raises(UsageError, match="label -1"):
        extract(encoder, [Batch(images, labels - 2, index)], torch.device("cpu"))
