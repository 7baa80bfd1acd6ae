"""TrainStep is the weighted sum of its terms, each view encoded once."""

from __future__ import annotations

import torch

from fasttrain.data import Batch
from fasttrain.models import Encoded
from fasttrain.step import Term, TrainStep
from fasttrain.views import clean


class Doubling(torch.nn.Module):
    """An encoder whose features are twice its images' means; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.tensor(2.0)), 0

    def forward(self, images: torch.Tensor) -> Encoded:
        self.calls += 1
        features = self.weight * images.mean((1, 2, 3))[:, None]
        return Encoded(images, (), features, None, None)


def mean_feature(encoded, batch):
    return encoded.features[:, 0]


def negative_square(encoded, batch):
    return -encoded.features.square().sum()


def brighter(encoder, batch):
    return batch._replace(images=batch.images + 1)


def test_terms_are_weighted_and_summed_and_a_shared_view_is_encoded_once():
    images = torch.rand(2, 5, 3, 4, 4)
    batch = Batch(images, torch.zeros(5, dtype=torch.int64), torch.arange(5))
    terms = [
        Term("a", mean_feature, 0.5),
        Term("b", negative_square, 2.0, clean),
        Term("c", mean_feature, 3.0, brighter),
    ]
    step = TrainStep(Doubling(), terms)
    loss, values = step(batch)
    means = images.flatten(0, 1).mean((1, 2, 3))
    expected = {"a": (2 * means).mean(), "b": -(2 * means).square().sum(), "c": (2 * (means + 1)).mean()}
    torch.testing.assert_close(loss, 0.5 * expected["a"] + 2 * expected["b"] + 3 * expected["c"])
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value)
        assert not values[name].requires_grad
    assert step.encoder.calls == 2


def test_a_batch_is_prepared_once_before_any_view():
    seen = []

    def prepare(batch):
        seen.append(batch)
        return batch._replace(targets=torch.ones(3, 1))

    def against_targets(encoded, batch):
        return (encoded.features - batch.targets).square().sum(-1)

    batch = Batch(torch.rand(1, 3, 3, 2, 2), torch.zeros(3), torch.arange(3))
    step = TrainStep(Doubling(), [Term("a", against_targets), Term("b", against_targets, view=brighter)], prepare)
    loss, _ = step(batch)
    means = batch.images[0].mean((1, 2, 3))
    torch.testing.assert_close(loss, (2 * means - 1).square().mean() + (2 * means + 1).square().mean())
    assert len(seen) == 1


def test_other_terms_can_be_asked_for():
    batch = Batch(torch.rand(2, 5, 3, 4, 4), torch.zeros(5, dtype=torch.int64), torch.arange(5))
    step = TrainStep(Doubling(), [Term("a", mean_feature, 0.5), Term("c", mean_feature, 3.0, brighter)])
    loss, values = step(batch, [Term("b", negative_square, 2.0)])
    torch.testing.assert_close(loss, 2 * values["b"])
    assert values.keys() == {"b"} and step.encoder.calls == 1
