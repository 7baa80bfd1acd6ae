"""Weighted k-nearest-neighbour accuracy, the bank of training features sharded over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pydantic
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fasttrain.config import Config
from fasttrain.distributed import all_gather, all_gather_object, all_reduce, rank
from fasttrain.errors import UsageError
from fasttrain.evaluation.accuracy import count_classes, hits
from fasttrain.evaluation.evaluation import Evaluation, EvaluationConfig, EvaluationData, Subject
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.finite import check_features
from fasttrain.evaluation.parts import Parts

QUERIES, BANK_ROWS = 1024, 65536  # similarities held at a time: 256 MiB


class KNNConfig(Config):
    neighbours: int = pydantic.Field(default=200, ge=1)
    """Nearest training images that vote; lowered, with a note, to the number of training images."""
    temperature: float = pydantic.Field(default=0.1, gt=0)
    """A neighbour's vote weighs exp(cosine / temperature); Wu et al. use 0.07."""


class KNNEvaluation(EvaluationConfig):
    """kNN accuracy of an encoder."""

    bank: int | None = pydantic.Field(None, ge=1)
    "training images to use, evenly spaced over the listing; null: all"
    knn: KNNConfig = KNNConfig()


class KNNAccuracy(NamedTuple):
    """Shares of the validation images in [0, 1]; top5 means top-C with C < 5 classes."""

    top1: float
    top5: float
    neighbours: int
    temperature: float
    note: str | None


@torch.no_grad()
def knn(train: Features, val: Features, config: KNNConfig | None = None, *, shared: bool = True) -> KNNAccuracy:
    """Accuracy of the vote Σ exp(cos(q, b)/T) [label(b) = c] over the K nearest b of each query q (Wu et al. 2018).

    The neighbours are exactly those of the whole training set: each rank searches its shard for every rank's queries,
    and the K best of all shards' K best are kept. Shards may differ in length. Every rank returns the same.

    Args:
        shared: whether each rank holds a shard; else it holds all of both sets, and asks no other.

    Raises:
        UsageError: no training or no validation sample.
        NotFinite: a feature is not finite.
    """
    config = config or KNNConfig()
    train_sizes, val_sizes = (
        all_gather_object(len(part.labels)) if shared else [len(part.labels)] for part in (train, val)
    )
    for name, sizes in (("training", train_sizes), ("validation", val_sizes)):
        if not sum(sizes):
            raise UsageError(f"kNN has 0 {name} images: give a data set with a {name} split")
    k = min(config.neighbours, sum(train_sizes))
    classes = count_classes(train.labels, val.labels)
    check_features("training images", train)
    check_features("validation images", val)
    bank, queries = _directions(train.features), _directions(val.features)

    correct = torch.zeros(2, dtype=torch.int64, device=bank.device)
    for source, size in enumerate(val_sizes):
        for start in range(0, size, QUERIES):
            rows = slice(start, min(start + QUERIES, size))
            mine = source == rank() or not shared
            query = queries[rows].contiguous() if mine else bank.new_empty(rows.stop - start, bank.shape[1])
            if len(val_sizes) > 1:
                dist.broadcast(query, source)
            similarity, labels = _nearest(query, bank, train.labels, k)
            if shared:
                similarity, labels = _merge(similarity, labels, k)
            if mine:
                correct += hits(_vote(similarity, labels, classes, config.temperature), val.labels[rows])
    top1, top5 = ((all_reduce(correct) if shared else correct) / sum(val_sizes)).tolist()
    note = f"K = {k}, not {config.neighbours}: there are {k} training images" if k < config.neighbours else None
    return KNNAccuracy(top1, top5, k, config.temperature, note)


def evaluate(subjects: Sequence[Subject], data: EvaluationData, config: KNNEvaluation, parts: Parts) -> KNNAccuracy:
    """:func:`knn` of the one subject."""
    encoder = subjects[0].load(data.device)
    splits, shared = data.features(encoder, train=data.choose("train", config.bank), val=data.choose("val"))
    return knn(splits["train"], splits["val"], config.knn, shared=shared)


def _directions(features: Tensor) -> Tensor:
    """Unit rows, whatever the range of the features: a square of 10²⁰ would be infinite. Rows of zeros stay zeros."""
    largest = features.abs().amax(1, keepdim=True)
    return F.normalize(features / largest.masked_fill(largest == 0, 1), dim=1)


def _nearest(query: Tensor, bank: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest similarities [q, k] of this shard, −∞ where it has fewer rows, and their labels."""
    best = query.new_full((len(query), k), -torch.inf)
    best_labels = labels.new_zeros(len(query), k)
    for start in range(0, len(bank), BANK_ROWS):
        similarity = query @ bank[start : start + BANK_ROWS].T
        similarity, position = similarity.topk(min(k, similarity.shape[1]))
        best, kept = torch.cat([best, similarity], 1).topk(k)
        best_labels = torch.cat([best_labels, labels[start + position]], 1).gather(1, kept)
    return best, best_labels


def _merge(similarity: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of all ranks' [q, k]."""
    similarity, labels = (all_gather(part).transpose(0, 1).flatten(1) for part in (similarity, labels))  # [q, W k]
    best, position = similarity.topk(k)
    return best, labels.gather(1, position)


def _vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Each class's summed weight [q, classes], in units of the greatest so that none overflows; −∞ without a vote."""
    weight = ((similarity - similarity.amax(1, keepdim=True)) / temperature).exp()
    votes = weight.new_zeros(len(weight), classes).scatter_add_(1, labels, weight)
    return votes.masked_fill(votes == 0, -torch.inf)


EVALUATION = Evaluation(KNNEvaluation, evaluate, "accuracy of the nearest training images' vote")
