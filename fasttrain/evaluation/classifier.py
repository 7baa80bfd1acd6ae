"""The classifier on top of an encoder whose errors an evaluation counts: a linear probe, or the run's own."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fasttrain import checkpoint, distributed
from fasttrain.config import Config, Where
from fasttrain.distributed import all_reduce
from fasttrain.errors import UsageError
from fasttrain.evaluation.evaluation import EvaluationData, Subject, fingerprint
from fasttrain.evaluation.linear import Classifier, LinearConfig, alone, fit_classifier
from fasttrain.evaluation.parts import Parts
from fasttrain.evaluation.tasks import Classes, Task, task_of
from fasttrain.export import PREFIX
from fasttrain.models import Encoder


class ClassifierConfig(Config):
    """What tells the classes apart."""

    kind: Literal["probe", "own"] = "probe"
    "probe: fitted to the encoder's features of the training images; own: the one a supervised run was trained with"
    classes: Classes | None = None
    "labels or names of the classes to tell apart, the others' images left out; null: all"
    bank: int | None = Field(None, ge=1)
    "training images to fit it to, evenly spaced over the listing; null: all"
    linear: LinearConfig = LinearConfig()

    reads: ClassVar[dict[str, Where]] = {name: Where("kind", ("probe",)) for name in ("classes", "bank", "linear")}


class Linear(NamedTuple):
    """Logits W x + b of features x [B, F], for the task's classes."""

    weight: Tensor  # [C, F]
    bias: Tensor  # [C]
    task: Task

    def __call__(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


def classifier_of(
    subject: Subject, encoder: Encoder, data: EvaluationData, config: ClassifierConfig, parts: Parts
) -> Linear:
    """The classifier that ``config`` asks for, the same on every rank; all together.

    For any number of ranks it is the same bits, but where features are too many for each rank to hold all of them. It
    is kept as a part: another fit on a GPU, whose algorithms are chosen anew, would make other points of all that
    follows from it.

    Raises:
        UsageError: kind=own of what was trained without a classifier, or with one of other classes.
    """
    if config.kind == "own":
        weight, bias = distributed.agree(lambda: _own(subject))
        if len(weight) != len(data.train.classes):
            raise UsageError(
                f"the classifier of '{subject.source}' has {len(weight)} classes, and '{data.train.root}' has "
                f"{len(data.train.classes)}: give the data it was trained on, or classifier.kind=probe"
            )
        return Linear(weight.to(data.device), bias.to(data.device), task_of(None, data.train))
    task = distributed.agree(lambda: task_of(config.classes, data.train))
    indices = data.choose("train", config.bank, task)
    point = data.seen | {
        "classifier": config.kind,
        "weights": fingerprint(encoder),
        "classes": list(task.classes),
        "images": len(indices),
        "linear": config.linear.model_dump(mode="json"),
    }
    fitted = _fit(encoder, data, indices, task, config.linear) if parts.missing([point]) else None
    (kept,) = parts.run("classifier", [point], lambda _: {"weight": fitted.weight, "bias": fitted.bias})
    return Linear(kept["weight"].to(data.device), kept["bias"].to(data.device), task)


def _fit(encoder: Encoder, data: EvaluationData, indices: np.ndarray, task: Task, config: LinearConfig) -> Classifier:
    splits, shared = data.features(encoder, train=indices)
    features = splits["train"]._replace(labels=task.relabelled(splits["train"].labels))
    return fit_classifier(features, len(task.classes), config, all_reduce if shared else alone)


def _own(subject: Subject) -> tuple[Tensor, Tensor]:
    """Weight and bias of the run's classifier, from its newest whole checkpoint."""
    found, _ = checkpoint.find(subject.folder / "checkpoints")
    tensors = found.tensors(checkpoint.MODEL) if found is not None else {}
    names = [f"{PREFIX}fc.{name}" for name in ("weight", "bias")]
    if not all(name in tensors for name in names):
        raise UsageError(
            f"'{subject.source}' has no classifier of its own (supervised runs have): use classifier.kind=probe, which "
            "fits one to its features"
        )
    weight, bias = (tensors[name].float() for name in names)
    return weight, bias


__all__ = ["ClassifierConfig", "Linear", "classifier_of"]
