"""Transfer to tasks of a few classes (Cowlagi, Liu & Neervannan, table 1), and the trajectories of its trainings.

::

    encoder ─┬─ task 1: features ─┬─ seed 0 ── a classifier by SGD ─┬─ accuracy ── table, picture
             │                    └─ seed 1 …                       └─ probabilities of each validation image,
             └─ task 2 …                                               after each epoch ── a file
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.config import Where
from fasttrain.errors import NotFinite, UsageError
from fasttrain.evaluation.accuracy import hits
from fasttrain.evaluation.evaluation import Evaluation, EvaluationData, Split, Subject, fingerprint, place_of
from fasttrain.evaluation.features import Features
from fasttrain.evaluation.finetuning import (
    Network,
    TrainingConfig,
    linear_head,
    network_logits,
    train_classifier,
    train_network,
)
from fasttrain.evaluation.parts import Found, Parts, Point
from fasttrain.evaluation.spread import Spread, aligned, spreads
from fasttrain.evaluation.tasks import Task, Tasks, tasks_of
from fasttrain.evaluation.trajectories import FILE, Trajectory, write_trajectories
from fasttrain.figures import panels, style
from fasttrain.output import try_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLITS: tuple[Split, Split] = ("train", "val")
PAPER_LR, PAPER_LR_SUPERVISED = 0.05, 0.2
"Peak learning rates of classifiers, the second on an encoder trained by cross-entropy; footnote 2."


class TransferEvaluation(TrainingConfig):
    """Accuracy on tasks of a few classes, of classifiers trained by SGD; and these trainings' trajectories."""

    tasks: Tasks = "paper"
    """paper (four 5-way tasks by the labels of CIFAR-100), all (one of all classes), random:N (N disjoint 5-way tasks),
    or lists of labels or names, [[0,1,2],[cat,dog]]"""
    task_seed: int = Field(0, ge=0)
    "of tasks=random:N"
    backbone: Literal["frozen", "trained"] = "frozen"
    "frozen: a linear classifier on its features; trained: fine-tuned with that classifier, on random crops"
    lr: float | None = Field(None, gt=0)
    "peak learning rate; null: the paper's, 0.2 for an encoder trained by cross-entropy, 0.05 for any other"
    store: Literal["float16", "float32"] = "float16"
    "in which the trajectories' probabilities are kept"

    reads: ClassVar[dict[str, Where]] = {
        "task_seed": Where("draws_tasks", why="tasks are given"),
        "backbone_lr": Where("backbone", ("trained",)),
        "crop": Where("backbone", ("trained",)),
    }

    @property
    def draws_tasks(self) -> bool:
        """Whether the tasks are random."""
        return isinstance(self.tasks, str) and self.tasks.startswith("random")


class Transfer(NamedTuple):
    """Accuracies in percent of the tasks' validation images; a spread is over seeds and the encoders of a method."""

    accuracy: dict[str, dict[str, Spread]]  # by method and task, at the end
    epochs: dict[str, dict[str, list[Spread]]]  # likewise, at the start and after each epoch
    chance: dict[str, float]  # by task, of guessing
    lr: dict[str, str]  # by method, the peak, and whose it is
    runs: list[dict[str, Any]]  # each training: its source, name, method, task, seed, learning rate, accuracy
    trajectories: list[dict[str, Any]]  # each file of them: of which source, where, its bytes, how many


def evaluate(subjects: Sequence[Subject], data: EvaluationData, config: TransferEvaluation, parts: Parts) -> Transfer:
    """Train a classifier for each encoder, task and seed, and write each encoder's trajectories.

    Raises:
        UsageError: tasks that the data cannot give, or no place for the trajectories.
        NotFinite: a loss or a probability is not.
    """
    tasks = distributed.agree(lambda: _tasks(data, config))
    places = [Path(place) for place in distributed.on_rank_zero(lambda: _places(subjects, config))]
    whole = Task("all of them", tuple(sorted({label for task in tasks for label in task.classes})))
    chosen: dict[Split, np.ndarray] = {split: data.choose(split, None, whole) for split in SPLITS}
    runs, curves, files = [], [], []
    rates: dict[str, str] = {}
    for subject, place in zip(subjects, places, strict=True):
        lr, rates[subject.method] = _lr(subject, config)
        points, found = _train_all(subject, lr, tasks, chosen, data, config, parts)
        of_subject = {"source": subject.source, "name": subject.name, "method": subject.method, "lr": lr}
        names = {task.classes: task.name for task in tasks}
        for point, one in zip(points, found, strict=True):
            run = of_subject | {"task": names[tuple(point["task"])], "seed": point["seed"]}
            runs.append(run | {"accuracy": one["accuracy"][-1]})
            curves += [run | {"epoch": epoch, "accuracy": value} for epoch, value in enumerate(one["accuracy"])]
        kept = [_trajectory(*pair, names, of_subject, data) for pair in zip(points, found, strict=True)]
        size = distributed.on_rank_zero(lambda place=place, kept=kept: write_trajectories(place, kept))
        files.append({"source": subject.source, "path": str(place), "bytes": size, "trajectories": len(kept)})
    epochs = spreads(curves, "method", "task", "epoch")
    return Transfer(
        spreads(runs, "method", "task"),
        {method: {task: list(each.values()) for task, each in by.items()} for method, by in epochs.items()},
        {task.name: 100 / len(task.classes) for task in tasks},
        rates,
        runs,
        files,
    )


def supervised(subject: Subject) -> bool:
    """Whether its run trained by cross-entropy alone."""
    terms = subject.settings.get("terms", {})
    return bool(terms) and all(term.get("objective") == "cross_entropy" for term in terms.values())


def _lr(subject: Subject, config: TransferEvaluation) -> tuple[float, str]:
    if config.lr is not None:
        return config.lr, f"{config.lr:g}"
    if supervised(subject):
        return PAPER_LR_SUPERVISED, f"{PAPER_LR_SUPERVISED:g} (the paper's, of an encoder trained by cross-entropy)"
    return PAPER_LR, f"{PAPER_LR:g} (the paper's, of an encoder not trained by cross-entropy alone)"


def _train_all(
    subject: Subject,
    lr: float,
    tasks: Sequence[Task],
    chosen: dict[Split, np.ndarray],
    data: EvaluationData,
    config: TransferEvaluation,
    parts: Parts,
) -> tuple[list[Point], list[Found]]:
    """All trainings on one encoder."""
    encoder = subject.load(data.device)
    recipe = config.recipe(lr, whole=config.backbone == "trained")
    shared = {"weights": fingerprint(encoder), "backbone": config.backbone, "recipe": recipe._asdict()}
    shared |= data.seen | {"store": config.store}
    if config.backbone == "trained":
        shared["crop"] = config.crop.model_dump(mode="json")
    points = [shared | {"task": list(task.classes), "seed": seed} for task in tasks for seed in config.seeds]
    images = {task.classes: [task.members(data.of(split), chosen[split]) for split in SPLITS] for task in tasks}
    asked = {tuple(point["task"]) for point in parts.missing(points)} if config.backbone == "frozen" else ()
    features = {  # of each task by itself: in which batch an image is encoded is then the task's affair alone
        classes: [_of_task(classes, data.all_features(encoder, *pair)) for pair in zip(SPLITS, chosen, strict=True)]
        for classes, chosen in images.items()
        if classes in asked
    }

    def work(point: Point) -> Found:
        task, seed, curve = Task("", tuple(point["task"])), point["seed"], Curve(getattr(torch, config.store))
        if config.backbone == "trained":
            train, val = images[task.classes]
            head = linear_head(encoder.backbone.num_features, len(task.classes), seed)

            def after_epoch(epoch: int, network: Network) -> None:
                curve.add(network_logits(network, data, val, task))

            train_network(encoder, head, data, train, task, recipe, seed, config.crop, after_epoch)
        else:
            training, validation = features[task.classes]

            @torch.no_grad()
            def after_epoch(epoch: int, classifier: nn.Linear) -> None:
                curve.add(validation._replace(features=classifier(validation.features)))

            train_classifier(training.features, training.labels, len(task.classes), recipe, seed, after_epoch)
        return curve.found()

    return points, parts.run(f"transfer of {subject.name}", points, work)


class Curve:
    """What a network in training says of the validation images, epoch by epoch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._probabilities: list[Tensor] = []
        self._accuracy: list[float] = []

    def add(self, validation: Features) -> None:
        """Logits as ``features``, and labels of the task.

        Raises:
            NotFinite: a logit is not.
        """
        logits, labels = validation.features, validation.labels
        if not bool(logits.isfinite().all()):
            raise NotFinite(f"the scores after epoch {len(self._accuracy)} are not finite: lower lr")
        self._accuracy.append(100 * int(hits(logits, labels)[0]) / len(labels))
        self._probabilities.append(logits.double().softmax(1).to(self.dtype).cpu())
        self._of = {"labels": labels.cpu().clone(), "index": validation.index.cpu().clone()}  # a point's own

    def found(self) -> Found:
        """Accuracies in percent [T], probabilities [T, N, C], labels [N] and index [N]."""
        return {"accuracy": self._accuracy, "probabilities": torch.stack(self._probabilities), **self._of}


def _of_task(classes: tuple[int, ...], features: Features) -> Features:
    return features._replace(labels=Task("", classes).relabelled(features.labels))


def _trajectory(
    point: Point, found: Found, names: dict[tuple[int, ...], str], subject: dict[str, Any], data: EvaluationData
) -> Trajectory:
    classes = tuple(point["task"])
    how = {name: point[name] for name in ("weights", "backbone", "recipe")} | subject
    return Trajectory(
        names[classes],
        point["seed"],
        found["probabilities"],
        found["labels"],
        found["index"],
        data.val.fingerprint,
        tuple(data.val.classes[label] for label in classes),
        how,
    )


def _tasks(data: EvaluationData, config: TransferEvaluation) -> list[Task]:
    """What is asked for, each once, and with images of each class."""
    tasks = tasks_of(config.tasks, data.train, config.task_seed)
    for task in tasks:
        if tasks.count(task) > 1:
            raise UsageError(f"task {task.name} is given {tasks.count(task)} times: give each once")
        for catalog in (data.train, data.val):
            there = np.bincount(catalog.labels[catalog.indices], minlength=len(catalog.classes))
            for label in task.classes:
                if not there[label]:
                    raise UsageError(
                        f"task {task.name}: '{catalog.root}' has no image of class {label} "
                        f"('{catalog.classes[label]}'): leave it out, or add some"
                    )
    return tasks


def _places(subjects: Sequence[Subject], config: TransferEvaluation) -> list[str]:
    """Where each subject's trajectories go: into its folder; where the result goes elsewhere, or that cannot be
    written, or is several subjects', into a folder of its own beside the result."""
    output = place_of(config, subjects)
    beside = output.with_name(f"{output.stem}-trajectories")
    folders = [os.path.realpath(subject.folder) for subject in subjects]
    names = [subject.name for subject in subjects]
    places = []
    for number, subject in enumerate(subjects):
        place = subject.folder / FILE
        name = subject.name if names.count(subject.name) == 1 else f"{number}-{subject.name}"
        elsewhere = config.output is not None and output.suffix == ".json"
        if elsewhere or folders.count(folders[number]) > 1 or not _writable(place):
            place = beside / name / FILE
            try_output(place, "choose another place with output=…")
        places.append(str(place))
    return places


def _writable(place: Path) -> bool:
    try:
        try_output(place, "")
    except UsageError:
        return False
    return True


def lines(found: Transfer) -> list[str]:
    """A table of tasks and methods, the learning rates, and where the trajectories are."""
    methods, tasks = list(found.accuracy), list(found.chance)
    rows = [[task, *(str(found.accuracy[method][task]) for method in methods)] for task in tasks]
    counts = {method: next(iter(by.values())).n for method, by in found.accuracy.items()}
    table = aligned([["accuracy in %, mean ± sd", *methods], *rows])
    table += [f"{method}: n = {counts[method]}, lr {found.lr[method]}" for method in methods]
    files = [f"{x['trajectories']} trajectories, {x['bytes']:,} bytes: {x['path']}" for x in found.trajectories]
    return table + files


def figure(found: Transfer) -> Figure:
    """Accuracy a task and method, at the end and against the epoch; the bars are a standard deviation each way."""
    methods, tasks = list(found.accuracy), list(found.chance)
    sheet, axes = panels(1, 2, max(4.6, 0.5 * len(tasks) * len(methods) + 2), 3.8, sharey=True)
    left, right = axes[0]
    for number, method in enumerate(methods):
        look = style(number)
        shift = (number - (len(methods) - 1) / 2) * 0.6 / max(len(methods), 2)
        ends = [found.accuracy[method][task] for task in tasks]
        places = np.arange(len(tasks)) + shift
        spans = [one.sd or 0 for one in ends]
        bars = {"color": look.color, "marker": look.marker, "capsize": 3, "markersize": 6}
        left.errorbar(places, [one.mean for one in ends], spans, linestyle="none", label=method, **bars)
        for run in found.runs:
            if run["method"] == method:
                place = places[tasks.index(run["task"])] + 0.06
                left.plot(place, run["accuracy"], ".", color=look.color, alpha=0.4, markersize=4)
        curve = np.array([[one.mean for one in found.epochs[method][task]] for task in tasks]).mean(0)
        few = max(1, len(curve) // 8)
        right.plot(curve, label=method, markersize=5, markevery=few, **look._asdict())
    for place, task in enumerate(tasks):
        chance = {"color": "0.45", "linewidth": 1, "linestyle": ":", "label": "chance" if not place else None}
        left.hlines(found.chance[task], place - 0.4, place + 0.4, **chance)
    left.set_xticks(range(len(tasks)), [_wrapped(task) for task in tasks])
    left.set(ylabel="validation accuracy (%)", xlabel="classes of the task", xlim=(-0.5, len(tasks) - 0.5))
    right.set(ylabel="mean over tasks (%)", xlabel="epoch")
    right.axhline(np.mean(list(found.chance.values())), color="0.45", linewidth=1, linestyle=":", label="chance")
    left.set_ylim(0, min(100, left.get_ylim()[1]))
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="y")
    right.legend(fontsize="small", loc="lower right", handlelength=3.5)
    return sheet


def _wrapped(name: str, width: int = 12) -> str:
    """Of a task's name, lines of at most so many characters, where its commas allow."""
    text = [""]
    for word in name.split(" "):
        if text[-1] and len(text[-1]) + len(word) >= width:
            text.append("")
        text[-1] = f"{text[-1]} {word}".strip()
    return "\n".join(text)


EVALUATION = Evaluation(
    TransferEvaluation,
    evaluate,
    "accuracy on tasks of a few classes, of classifiers trained by SGD, and their trajectories",
    lines,
    figure,
)

__all__ = ["Transfer", "TransferEvaluation", "evaluate", "figure", "lines", "supervised"]
