"""Robust accuracy against exhaustive attackers, and over ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.attacks import AttackConfig
from fasttrain.data import Batch
from fasttrain.errors import NotFinite, UsageError
from fasttrain.evaluation import Features, LinearConfig, linear_probe
from fasttrain.evaluation.linear import fit_classifier
from fasttrain.evaluation.robust import RobustConfig, robust_accuracy
from fasttrain.models import Encoded
from tests.ranks import run_ranks

EPS, CLASSES, COUNT = 0.07, 2, 40
ATTACK = AttackConfig(eps_255=255 * EPS, steps=20)
CPU = torch.device("cpu")


class Pixels(nn.Module):
    """An encoder whose features are the pixels."""

    def forward(self, images: Tensor) -> Encoded:
        return Encoded(images, (), images.flatten(1), None, None)


def classifier() -> nn.Linear:
    """Undecided about grey."""
    torch.manual_seed(3)
    layer = nn.Linear(6, CLASSES)
    layer.bias.data = -layer.weight.data.sum(1) / 2
    return layer.requires_grad_(False)


def samples() -> Batch:
    """Images of 6 values, two out of three labelled as the classifier would."""
    images = torch.rand(1, COUNT, 3, 1, 2, generator=torch.Generator().manual_seed(4))
    labels = classifier()(images[0].flatten(1)).argmax(1)
    labels[::3] = 1 - labels[::3]
    return Batch(images, labels, torch.arange(COUNT))


def brute_force(model, batch: Batch) -> tuple[float, float]:
    """A linear classifier is at its worst in a corner of the box around an image, of which there are 2⁶."""
    clean = robust = 0
    for image, label in zip(batch.images[0].flatten(1), batch.labels.tolist(), strict=True):
        box = [sorted({max(0.0, value - EPS), min(1.0, value + EPS)}) for value in image.tolist()]
        corners = [image, *(torch.tensor(corner) for corner in itertools.product(*box))]
        right = [int(model(corner).argmax()) == label for corner in corners]
        clean, robust = clean + right[0], robust + all(right)
    return clean / COUNT, robust / COUNT


def test_a_linear_model_falls_where_some_corner_of_the_box_makes_it():
    batch, model = samples(), classifier()
    found = robust_accuracy(Pixels(), model, [batch], ATTACK, CPU)
    expected = brute_force(model, batch)
    assert (found.clean_top1, found.robust_top1) == pytest.approx(expected)
    assert found.images == COUNT and 0.1 < expected[1] < expected[0] - 0.1  # a case that can tell right from wrong


def test_an_attack_of_no_radius_changes_nothing_and_a_wrong_image_stays_wrong():
    batch = samples()
    none = robust_accuracy(Pixels(), classifier(), [batch], AttackConfig(eps_255=0), CPU)
    assert none.robust_top1 == none.clean_top1
    wrong = batch._replace(labels=1 - classifier()(batch.images[0].flatten(1)).argmax(1))
    assert robust_accuracy(Pixels(), classifier(), [wrong], ATTACK, CPU)[:2] == (0, 0)


def of_share(cuts: list[int]) -> tuple:
    """Accuracies of this rank's part of the samples, in batches of 7 (and an empty one)."""
    batch, where = samples(), slice(*cuts[distributed.rank() : distributed.rank() + 2])
    mine = [batch.images[:, where], batch.labels[where], batch.index[where]]
    parts = zip(mine[0].split(7, 1), mine[1].split(7), mine[2].split(7), strict=True)
    batches = [*(Batch(*part) for part in parts), Batch(mine[0][:, :0], mine[1][:0], mine[2][:0])]
    return robust_accuracy(Pixels(), classifier(), batches, ATTACK, CPU)


def test_uneven_ranks_agree_with_one_process():
    alone = robust_accuracy(Pixels(), classifier(), [samples()], ATTACK, CPU)
    assert run_ranks(2, of_share, [0, 31, COUNT]) == [alone, alone]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_an_error_and_not_the_first_class(value):
    batch, model = samples(), classifier()

    def spoilt(features: Tensor) -> Tensor:
        return torch.where(features[:, :1] > batch.images[0].flatten(1)[:, 0].max() - 1e-6, value, model(features))

    with pytest.raises(NotFinite, match=f"the scores of 1 of {COUNT} validation images are not finite"):
        robust_accuracy(Pixels(), spoilt, [batch], AttackConfig(eps_255=0), CPU)


class Rootlike(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


def test_an_attack_that_went_by_gradients_that_are_not_finite_tells_nothing():
    """It would not move: robust accuracy would be the clean one."""
    model = classifier()
    with pytest.raises(NotFinite, match=f"of {COUNT} of {COUNT} validation images under attack are not finite"):
        robust_accuracy(Pixels(), lambda features: model(Rootlike.apply(features)), [samples()], ATTACK, CPU)


def test_no_image_and_another_batchnorm_are_refused():
    empty = Batch(torch.zeros(1, 0, 3, 1, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UsageError, match="0 validation images"):
        robust_accuracy(Pixels(), classifier(), [empty], ATTACK, CPU)
    with pytest.raises(ValueError, match="set batchnorm=eval"):
        RobustConfig(attack=AttackConfig(batchnorm="train"))


def test_the_fitted_classifier_is_the_probe_on_features_as_they_are():
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (200,), generator=generator)
    points = torch.randn(3, 8, generator=generator)[labels] + torch.randn(200, 8, generator=generator)
    points = torch.cat([5 + 10 * points, torch.full((200, 1), 4.0)], 1)  # far from standard, one feature constant
    train = Features(points, labels, torch.arange(200))
    settings = LinearConfig(l2=(1e-3, 1e-1))
    found, probe = fit_classifier(train, 3, settings), linear_probe(train, train, settings)
    logits = train.features @ found.weight.T + found.bias
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(probe.train_top1)
    assert (found.l2, found.held_out) == (probe.l2, probe.held_out)
    assert probe.train_top1 > 0.6 and not found.weight[:, -1].any()
