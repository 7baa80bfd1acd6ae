"""Accuracy with a share of the labels (Campbell, Manta & Iannantuono, table 1).

::

    share of each class's training images ──┬─ logistic regression on the frozen encoder's features    frozen
    (nested: a larger holds a smaller)      ├─ encoder and a 2-layer ReLU head, by SGD, a seed each    mlp
                                            └─ encoder and a linear head, likewise                     linear
    a supervised run ── its own classifier, in the row of the share it was trained on                  own

A supervised network of a share is trained by ``launch/pretrain.py terms.supervised.objective=cross_entropy
data.share=0.1 …``: the same images. Fine-tuning on many images can take one rank hours, and a kill loses that one;
``launch/pretrain.py model.weights=<run> terms.supervised.objective=cross_entropy …`` spreads one over ranks, with
checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.config import Where
from fasttrain.data.catalog import Catalog, DataConfig
from fasttrain.errors import UsageError
from fasttrain.evaluation.accuracy import hits
from fasttrain.evaluation.classifier import ClassifierConfig, Linear, classifier_of
from fasttrain.evaluation.evaluation import Evaluation, EvaluationData, Subject, fingerprint, place_of
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.finetuning import (
    Head,
    TrainingConfig,
    linear_head,
    mlp_head,
    network_logits,
    train_network,
)
from fasttrain.evaluation.linear import LinearConfig, alone, fit_classifier, held_out
from fasttrain.evaluation.parts import Found, Parts, Point, one_thread
from fasttrain.evaluation.spread import Spread, aligned, spreads
from fasttrain.evaluation.tasks import task_of
from fasttrain.evaluation.transfer import supervised
from fasttrain.figures import panels, style
from fasttrain.models import Encoder
from fasttrain.output import write_output
from fasttrain.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class WholeData(DataConfig):
    """All training images: an evaluation says by itself which shares of them it takes."""

    reads: ClassVar[dict[str, Where]] = {"share": Where("has_one_share", why="shares says how much is taken")}

    @property
    def has_one_share(self) -> bool:
        """Whether one share is taken for all."""
        return False


class LabelsEvaluation(TrainingConfig):
    """Accuracy with a share of the labels: the encoder frozen, and fine-tuned with a head."""

    shares: tuple[float, ...] = Field((1.0, 0.1, 0.01), min_length=1)
    "shares of each class's training images: those of data.share"
    heads: tuple[Head, ...] = ("mlp", "linear")
    "of the fine-tuned encoder: mlp (2 layers with a ReLU between, the paper's), linear; [] fine-tunes none"
    hidden: int | None = Field(None, ge=1)
    "units of the mlp between its layers; null: as many as features"
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    "fine-tunings of each head; the head's first weights, the order and the crops depend on these alone"
    epochs: int = Field(100, ge=1)
    "of each fine-tuning"
    lr: float = Field(0.05, gt=0)
    "peak learning rate of fine-tuning (SimCLR's, appendix B.5, is 0.05 for each 256 images of a batch)"
    weight_decay: float = Field(0.0, ge=0)
    "L2 of fine-tuning, of weights; biases and BatchNorm's parameters have none"
    linear: LinearConfig = LinearConfig()
    data: WholeData = WholeData()

    reads: ClassVar[dict[str, Where]] = {
        "hidden": Where("fine_tunes_mlp", why="no head is an mlp"),
        **{
            name: Where("heads", why="nothing is fine-tuned")
            for name in ("seeds", "epochs", "train_batch", "lr", "backbone_lr", "weight_decay", "crop")
        },
    }

    @property
    def fine_tunes_mlp(self) -> bool:
        """Whether a head is an mlp."""
        return "mlp" in self.heads

    @property
    def opened(self) -> DataConfig:
        """All of it."""
        return self.data.model_copy(update={"share": 1.0})

    @field_validator("shares")
    @classmethod
    def _are_shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        for share in shares:
            if not 0 < share <= 1:
                raise ValueError(f"share {share:g}: should be above 0 and at most 1")
            if shares.count(share) > 1:
                raise ValueError(f"share {share:g} is given {shares.count(share)} times: give each once")
        return shares

    @field_validator("heads")
    @classmethod
    def _one_of_each(cls, heads: tuple[Head, ...]) -> tuple[Head, ...]:
        for head in heads:
            if heads.count(head) > 1:
                raise ValueError(f"head {head} is given {heads.count(head)} times: give each once")
        return heads


class Labels(NamedTuple):
    """Accuracies in percent of all validation images; a spread is over seeds and the encoders of a method."""

    accuracy: dict[str, dict[str, dict[str, Spread]]]  # by method, share and way: frozen, mlp, linear, own
    images: dict[str, int]  # by share, training images
    runs: list[dict[str, Any]]  # each classifier: its source, name, method, share, way, seed, accuracy
    files: dict[str, str]  # by share, which images
    notes: list[str]


def evaluate(subjects: Sequence[Subject], data: EvaluationData, config: LabelsEvaluation, parts: Parts) -> Labels:
    """Fit, fine-tune and measure for each encoder, share, head and seed; write which images each share is.

    Raises:
        UsageError: a share has too few images, or its file cannot be written.
        NotFinite: a feature or a loss is not.
    """
    subsets = distributed.agree(lambda: _subsets(data.train, config))
    output = place_of(config, subjects)
    files = distributed.on_rank_zero(lambda: _write(output, subsets)) if output.suffix == ".json" else {}
    validation = data.choose("val")
    data.used["train"] = len(subsets[max(subsets)])
    runs, notes = [], []
    for subject in subjects:
        encoder = subject.load(data.device)
        own = _own(subject, encoder, data, notes, parts)
        found = _train_all(subject.name, encoder, own, subsets, validation, data, config, parts)
        of_subject = {"source": subject.source, "name": subject.name, "method": subject.method}
        runs += [of_subject | run for run in found]
    return Labels(
        spreads(runs, "method", "share", "way"),
        {named(share): len(subset) for share, subset in subsets.items()},
        runs,
        files,
        notes,
    )


def _train_all(
    name: str,
    encoder: Encoder,
    own: tuple[float, Linear] | None,
    subsets: dict[float, Catalog],
    validation: np.ndarray,
    data: EvaluationData,
    config: LabelsEvaluation,
    parts: Parts,
) -> list[dict[str, Any]]:
    """All classifiers on one encoder, those that take long first."""
    task, recipe = task_of(None, data.train), config.recipe(config.lr, whole=True)
    shared = {"weights": fingerprint(encoder)} | data.seen
    tuned: list[Point] = []
    for share in sorted(subsets, reverse=True):
        for head in config.heads:
            one = {"share": share, "way": head, "recipe": recipe._asdict(), "crop": config.crop.model_dump(mode="json")}
            one |= {"hidden": config.hidden} if head == "mlp" else {}
            tuned += [shared | one | {"seed": seed} for seed in config.seeds]
    frozen = [{"share": share, "way": "frozen", "linear": config.linear.model_dump(mode="json")} for share in subsets]
    if own is not None:
        frozen.append({"share": own[0], "way": "own", "classifier": fingerprint(_module(own[1]))})
    frozen = [shared | point for point in frozen]
    missing = parts.missing(frozen)
    val = data.all_features(encoder, "val", validation) if missing else None
    features = {  # of each share by itself: in which batch an image is encoded is then the share's affair alone
        point["share"]: data.all_features(encoder, "train", subsets[point["share"]].indices)
        for point in missing
        if point["way"] == "frozen"
    }

    def work(point: Point) -> Found:
        way, share = point["way"], point["share"]
        if way == "own":
            return {"accuracy": _percent(own[1](val.features), val.labels)}
        if way == "frozen":
            return _logistic(features[share], val, len(task.classes), config.linear)
        make = linear_head if way == "linear" else partial(mlp_head, hidden=config.hidden)
        head = make(encoder.backbone.num_features, len(task.classes), point["seed"])
        indices = subsets[share].indices
        network = train_network(encoder, head, data, indices, task, recipe, point["seed"], config.crop)
        scores = network_logits(network, data, validation, task)
        return {"accuracy": _percent(scores.features, scores.labels)}

    points = tuned + frozen
    found = parts.run(f"labels of {name}", points, work)
    return [
        {"share": named(point["share"]), "way": point["way"], "seed": point.get("seed"), **one}
        for point, one in sorted(zip(points, found, strict=True), key=lambda pair: -pair[0]["share"])
    ]


def _logistic(train: Features, val: Features, classes: int, config: LinearConfig) -> Found:
    with one_thread():
        fitted = fit_classifier(train, classes, config, alone)
    logits = F.linear(val.features, fitted.weight, fitted.bias)
    return {"accuracy": _percent(logits, val.labels), "l2": fitted.l2}


def _percent(logits: Tensor, labels: Tensor) -> float:
    return 100 * int(hits(logits, labels)[0]) / len(labels)


def _module(classifier: Linear) -> nn.Module:
    return nn.ParameterDict({"weight": classifier.weight, "bias": classifier.bias})


def _own(
    subject: Subject, encoder: Encoder, data: EvaluationData, notes: list[str], parts: Parts
) -> tuple[float, Linear] | None:
    """Of a supervised run on this data: the share it was trained on, and its classifier."""
    if not supervised(subject):
        return None
    theirs = subject.settings.get("data", {})
    if _real(theirs.get("root")) != _real(data.config.data.root):
        notes.append(f"'{subject.source}' was trained on other data: its own classifier is left out")
        return None
    return float(theirs.get("share", 1.0)), classifier_of(subject, encoder, data, ClassifierConfig(kind="own"), parts)


def _real(root: str | None) -> str | None:
    return root and os.path.realpath(os.path.expanduser(root))


def _subsets(catalog: Catalog, config: LabelsEvaluation) -> dict[float, Catalog]:
    """The images of each share, enough of them to choose from."""
    subsets = {share: catalog.thinned(share) if share < 1 else catalog for share in config.shares}
    if config.linear.chooses:
        remedy = f"choosing one of linear.l2={list(config.linear.l2)} holds some out: give a larger share, or one l2"
        for share, subset in subsets.items():
            counts = np.bincount(subset.labels[subset.indices], minlength=len(subset.classes))
            few = int(np.where(counts > 0, counts, counts.max() + 1).argmin())
            if counts[few] < 2:
                one = f"share {named(share)} is {counts[few]} training image of class '{subset.classes[few]}'"
                raise UsageError(f"{one}, and {remedy}")
            held = held_out(torch.from_numpy(subset.indices), config.linear.held_out)
            if bool(held.all()) or not bool(held.any()):
                raise UsageError(f"share {named(share)} is {len(subset)} training images, and {remedy}")
    return subsets


def _write(output: Path, subsets: dict[float, Catalog]) -> dict[str, str]:
    """A file a share beside the result, which says of each line what it is."""
    files = {}
    for share, subset in subsets.items():
        place = output.with_name(f"{output.stem}-{named(share)}.txt")
        content = [
            f"# share {named(share)} of each class's training images in {printable(str(subset.root))}, "
            f"{len(subset):,} of them",
            "# a line an image, tab-separated: its position in the sorted listing from 0, its class"
            + (", its file in that folder" if subset.names is not None else ""),
        ]
        for index in subset.indices.tolist():
            file = [subset.names[index]] if subset.names is not None else []
            content.append("\t".join(map(printable, [str(index), subset.classes[subset.labels[index]], *file])))
        write_output(place, "\n".join(content) + "\n", "choose another place with output=…")
        files[named(share)] = str(place)
    return files


def named(share: float) -> str:
    """As a person writes it: 0.1."""
    return f"{share:.12g}"


def lines(found: Labels) -> list[str]:
    """A table of methods and shares against the ways, and where the shares' images are listed."""
    ways = list(dict.fromkeys(run["way"] for run in found.runs))
    ways.sort(key=("frozen", "mlp", "linear", "own").index)
    rows = []
    for method, by_share in found.accuracy.items():
        for share in sorted(by_share, key=float, reverse=True):
            cells = [str(by_share[share][way]) if way in by_share[share] else "–" for way in ways]
            rows.append([f"{method}, {100 * float(share):g} % of the labels", *cells])
    counts = [f"{way} {'/'.join(map(str, sorted(ns)))}" for way, ns in _counts(found, ways).items()]
    table = [*aligned([["accuracy in %, mean ± sd", *ways], *rows]), f"n of each: {', '.join(counts)}", *found.notes]
    return table + [f"{found.images[share]:,} images of share {share}: {place}" for share, place in found.files.items()]


def _counts(found: Labels, ways: Sequence[str]) -> dict[str, set[int]]:
    cells = [by_way for by_share in found.accuracy.values() for by_way in by_share.values()]
    return {way: {cell[way].n for cell in cells if way in cell} for way in ways}


NAMES = {
    "frozen": "frozen, logistic regression",
    "mlp": "fine-tuned, 2-layer head",
    "linear": "fine-tuned, linear head",
    "own": "its own classifier",
}


def figure(found: Labels) -> Figure:
    """Accuracy against the share of labels, a line a method and way; the bars are a standard deviation each way."""
    sheet, axes = panels(1, 1, 7.4, 3.8)
    axis, number = axes[0, 0], 0
    for method, by_share in found.accuracy.items():
        for way, meaning in NAMES.items():
            shares = sorted((share for share in by_share if way in by_share[share]), key=float)
            if shares:
                spans = [by_share[share][way] for share in shares]
                x, y, bars = ([100 * float(s) for s in shares], [o.mean for o in spans], [o.sd or 0 for o in spans])
                look = style(number)._asdict()
                axis.errorbar(x, y, bars, label=f"{method}: {meaning}", capsize=3, markersize=6, **look)
                number += 1
    ticks = sorted({100 * float(share) for by_share in found.accuracy.values() for share in by_share})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="training images with labels (%)", ylabel="validation accuracy (%)")
    axis.set_ylim(0, min(100, axis.get_ylim()[1]))
    axis.grid(alpha=0.3)
    sheet.legend(fontsize="small", loc="outside right upper", handlelength=4)
    return sheet


EVALUATION = Evaluation(
    LabelsEvaluation, evaluate, "accuracy with a share of the labels, the encoder frozen and fine-tuned", lines, figure
)

__all__ = ["Labels", "LabelsEvaluation", "WholeData", "evaluate", "figure", "lines", "named"]
