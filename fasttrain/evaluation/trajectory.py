"""Trajectories of several methods side by side: progress towards the truth, and all of them in one picture.

::

    trajectories.safetensors ─┬─ progress, and distances from P_0 and to P*: a point a trajectory ─┬─ InPCA ── picture
    of each source            └─ distances of all models of a task: a point a tile of the matrix ──┘

No image is read and no network: probabilities are what trajectories keep.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from math import ceil, log
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fasttrain import distributed
from fasttrain.config import PathText
from fasttrain.errors import UsageError
from fasttrain.evaluation.evaluation import Evaluation, EvaluationData, SourcesConfig, Subject
from fasttrain.evaluation.inpca import inpca
from fasttrain.evaluation.parts import Found, Parts, Point, key_of, one_thread
from fasttrain.evaluation.progress import (
    MEMORY,
    assembled,
    block_bytes,
    block_size,
    coefficients,
    cross,
    floor_of,
    progress_of,
    tiles_of,
    truth,
    uniform,
)
from fasttrain.evaluation.trajectories import FILE, Trajectory, read_trajectories
from fasttrain.figures import Style, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

A_ROW = 4
"Tasks side by side in the picture, at most."

Name = Annotated[str | tuple[str, ...], Field(union_mode="left_to_right")]
"A task's name, or the list of classes that it shows."


class TrajectoryEvaluation(SourcesConfig):
    """Progress and InPCA of the trajectories that ``transfer`` left, of one source or several."""

    source: tuple[PathText, ...] = Field(min_length=1)  # type: ignore[assignment]
    "folders with a trajectories.safetensors, one or several; the arguments after the first"
    tasks: tuple[Name, ...] | None = Field(None, min_length=1)
    "names of the tasks to show, or their classes: [[0,1,2,3,4]]; null: all that the sources have in common"
    axes: int = Field(3, ge=2)
    "how many of InPCA's axes to give coordinates along; eigenvalues are given of all"
    memory: float = Field(MEMORY / 2**30, gt=0)
    "GiB that a rank's blocks of models and images may take"


class Course(NamedTuple):
    """One trajectory: at the start and after each epoch."""

    source: str
    method: str
    seed: int
    progress: list[float]  # t_w in [0, 1]
    from_start: list[float]  # d_B from P_0, nats
    to_truth: list[float]  # d_B to P*, nats
    coordinates: list[list[float]]  # along InPCA's first axes
    stored_zeros: float  # share of the true classes' probabilities that were rounded to 0


class Method(NamedTuple):
    """Progress of a method: over its sources and seeds."""

    method: str
    trajectories: int
    mean: list[float]  # at the start and after each epoch
    sd: list[float] | None  # with n − 1; null of a single one


class TaskMap(NamedTuple):
    """A task's trajectories, embedded together with P_0 and P*."""

    task: str
    data: str  # fingerprint of the validation split
    images: int
    classes: tuple[str, ...]
    floor: float  # what smaller probabilities were taken for
    methods: list[Method]
    courses: list[Course]
    start: list[float]  # coordinates of P_0
    truth: list[float]  # and of P*
    shares: list[float]  # of Σ|eigenvalue|, each axis's
    eigenvalues: list[float]  # of both signs, by magnitude; an axis of a negative one is imaginary
    distances: Tensor  # [M, M] d_B between P_0, P* and then the models of all trajectories


class TrajectoryResult(NamedTuple):
    """Of each task."""

    tasks: list[TaskMap]
    memory: int  # bytes that a rank's largest block and the largest matrix take


class Compared(NamedTuple):
    """A task's trajectories, each with whose it is."""

    task: str
    members: list[tuple[Subject, Trajectory]]

    @property
    def models(self) -> list[Tensor]:
        """All [N, C], in order."""
        return list(chain.from_iterable(one.probabilities for _, one in self.members))

    @property
    def floor(self) -> float:
        return max(floor_of(one.probabilities.dtype) for _, one in self.members)


def evaluate(
    subjects: Sequence[Subject], data: EvaluationData, config: TrajectoryEvaluation, parts: Parts
) -> TrajectoryResult:
    """The sources' trajectories compared, task by task.

    Raises:
        UsageError: a source has no trajectories; they are of other data, images, labels or classes than the first's; a
            task that a source lacks, or none in common; seeds of one method have unequally many epochs; less memory
            than a single image takes.
    """
    memory = int(config.memory * 2**30)
    tasks = distributed.agree(lambda: compared(subjects, config.tasks))
    jobs = distributed.agree(lambda: [job for task in tasks for job in _jobs(task, memory, data.device)])
    work = {key_of(job.point): job.work for job in jobs}

    def work_on(point: Point) -> Found:
        with one_thread():
            return work[key_of(point)]()

    found = iter(parts.run("trajectories", [job.point for job in jobs], work_on))
    with one_thread():
        maps = [_mapped(task, found, config.axes) for task in tasks]
    return TrajectoryResult(maps, max(job.memory for job in jobs) + max(_bytes(one.distances) for one in maps))


def compared(subjects: Sequence[Subject], wanted: Sequence[str | Sequence[str]] | None) -> list[Compared]:
    """The trajectories of the tasks that are ``wanted`` (None: of those that all subjects have), in the first's order.

    Raises:
        UsageError: as :func:`evaluate`.
    """
    kept = [(subject, read_trajectories(subject.folder / FILE)) for subject in subjects]
    names = [list(dict.fromkeys(one.task for one in found)) for _, found in kept]
    if wanted is None:
        chosen = [name for name in names[0] if all(name in others for others in names)]
        left = sorted(set(chain.from_iterable(names)) - set(chosen))
        if not chosen:
            what = "; ".join(f"'{s.source}' has {', '.join(own)}" for (s, _), own in zip(kept, names, strict=True))
            raise UsageError(f"the sources have no task in common: {what}")
        if left:
            distributed.say(f"not of all sources, and left out: {', '.join(left)}")
    else:
        chosen = list(dict.fromkeys(one if isinstance(one, str) else f"[{', '.join(one)}]" for one in wanted))
        for (subject, _), own in zip(kept, names, strict=True):
            if lacking := [name for name in chosen if name not in own]:
                raise UsageError(f"'{subject.source}' has no task {lacking[0]}: its tasks are {', '.join(own)}")
    tasks = [Compared(name, [(s, one) for s, found in kept for one in found if one.task == name]) for name in chosen]
    for task in tasks:
        for member in task.members[1:]:
            _check_same(task.members[0], member)
        _check_epochs(task)
    return tasks


def _check_same(first: tuple[Subject, Trajectory], other: tuple[Subject, Trajectory]) -> None:
    one, two = first[1], other[1]
    of_two = (
        (one.data != two.data, f"another data set (fingerprint {two.data}, not {one.data})"),
        (
            one.classes != two.classes,
            f"other classes, or in another order ({', '.join(two.classes)}, not {', '.join(one.classes)})",
        ),
        (
            not torch.equal(one.index, two.index),
            f"other validation images ({len(two.index):,}, not these {len(one.index):,})",
        ),
        (not torch.equal(one.labels, two.labels), "other labels of the same images"),
    )
    for differs, how in of_two:
        if differs:
            raise UsageError(
                f"the trajectories of task {one.task} in '{other[0].source}' are of {how} than those in "
                f"'{first[0].source}': run transfer of both on the same data, with the same tasks"
            )


def _check_epochs(task: Compared) -> None:
    first: dict[str, tuple[Subject, Trajectory]] = {}
    for subject, one in task.members:
        before, other = first.setdefault(subject.method, (subject, one))
        if len(one.probabilities) != len(other.probabilities):
            raise UsageError(
                f"of {subject.method} on task {task.task}, '{before.source}' has {len(other.probabilities) - 1} epochs "
                f"and '{subject.source}' {len(one.probabilities) - 1}: seeds of one method need as many; say with "
                "names=… which are one"
            )


class Job(NamedTuple):
    """A point of the work, and what finds it."""

    point: Point
    work: Callable[[], Found]
    memory: int  # bytes that its largest block takes


def _jobs(task: Compared, memory: int, device: torch.device) -> list[Job]:
    """First a trajectory each, then the tiles of the matrix of all models."""
    models, floor = task.models, task.floor
    images, classes = models[0].shape
    labels = task.members[0][1].labels
    keys = [_digest(model) for model in models]
    jobs: list[Job] = []

    def add(what: str, of: Sequence[slice], others: int, work: Callable[[], Found], **more: str) -> None:
        rows = len(keys[of[0]])
        size = min(images, block_size(rows, others, classes, memory))
        hashes = [key_of({"models": keys[part]}) for part in of]
        point = {"what": what, "models": hashes, "floor": floor, "block": size, **more}
        jobs.append(Job(point, work, size * block_bytes(rows, others, classes)))

    end = 0
    for _, one in task.members:
        rows = slice(end, end := end + len(one.probabilities))
        work = partial(_progress, models[rows], labels, memory, floor, device)
        add("progress", [rows], 2, work, labels=_digest(labels))
    for rows, columns in tiles_of(len(models)):
        work = partial(_distances, models[rows], models[columns], memory, floor, device)
        add("distances", [rows, columns], len(models[columns]), work)
    return jobs


def _progress(models: list[Tensor], labels: Tensor, memory: int, floor: float, device: torch.device) -> Found:
    images, classes = models[0].shape
    a, b, angle = coefficients(models, uniform(images, classes), truth(labels, classes), memory, floor, device)
    rows = torch.arange(images)
    zeros = sum(int((model[rows, labels] == 0).sum()) for model in models)
    return {
        "progress": progress_of(a, b, angle, memory).tolist(),
        "from_start": (-a.clamp(max=1).log().mean(1)).tolist(),
        "to_truth": (-b.clamp(max=1).log().mean(1)).tolist(),
        "stored_zeros": zeros / (len(models) * images),
    }


def _distances(rows: list[Tensor], columns: list[Tensor], memory: int, floor: float, device: torch.device) -> Found:
    return {"distances": cross(rows, columns, memory, floor, device)}


def _digest(tensor: Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=12)
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mapped(task: Compared, found: Iterator[Found], axes: int) -> TaskMap:
    """The task's result, from what its :func:`_jobs` found."""
    own = [next(found) for _ in task.members]
    count = sum(len(one["progress"]) for one in own)
    tiles = tiles_of(count)
    half = torch.zeros(count + 2, count + 2, dtype=torch.float64)
    half[0, 1] = log(len(task.members[0][1].classes)) / 2
    for row, end in enumerate(("from_start", "to_truth")):
        half[row, 2:] = torch.tensor([x for one in own for x in one[end]], dtype=torch.float64)
    half[2:, 2:] = assembled(count, tiles, [next(found)["distances"] for _ in tiles]).triu()
    distances = half + half.T
    embedding = inpca(distances, axes)
    start, end, *places = embedding.coordinates.tolist()
    rest = iter(places)
    courses = [
        Course(subject.source, subject.method, one.seed, **values, coordinates=[next(rest) for _ in values["progress"]])
        for (subject, one), values in zip(task.members, own, strict=True)
    ]
    _, first = task.members[0]
    return TaskMap(
        task=task.task,
        data=first.data,
        images=len(first.labels),
        classes=first.classes,
        floor=task.floor,
        methods=_methods(courses),
        courses=courses,
        start=start,
        truth=end,
        shares=embedding.shares.tolist(),
        eigenvalues=embedding.eigenvalues.tolist(),
        distances=distances,
    )


def _methods(courses: Sequence[Course]) -> list[Method]:
    """Each method's mean and standard deviation, in the order in which they first come."""
    methods = []
    for method in dict.fromkeys(one.method for one in courses):
        own = torch.tensor([one.progress for one in courses if one.method == method], dtype=torch.float64)
        sd = own.std(0).tolist() if len(own) > 1 else None
        methods.append(Method(method, len(own), own.mean(0).tolist(), sd))
    return methods


def lines(found: TrajectoryResult) -> list[str]:
    """A table a task: where each method ends, and what the axes explain."""
    width = max(len(method.method) for task in found.tasks for method in task.methods)
    text = []
    for task in found.tasks:
        axes = [_axis(task, k) for k in range(min(3, len(task.shares)))]
        zeros = sum(one.stored_zeros for one in task.courses) / len(task.courses)
        text += [
            f"task {task.task}: {task.images:,} images, {len(task.classes):,} classes, {len(task.distances):,} models",
            *(f"  {one.method:{width}s}  {_ended(one)}" for one in task.methods),
            f"  InPCA's axes explain {', '.join(axes)}",
        ]
        if zeros:
            text.append(
                f"  {100 * zeros:.2g} % of the true classes' probabilities were rounded to 0 when they were "
                f"stored, and are taken for {task.floor:.1e}, the largest that is"
            )
    return [*text, f"{'memory':16s}{found.memory / 2**30:.2g} GiB for blocks and distances"]


def _ended(one: Method) -> str:
    sd = f" ± {one.sd[-1]:.4f}" if one.sd is not None else " " * 9
    count = f"{one.trajectories} {'trajectory' if one.trajectories == 1 else 'trajectories'}"
    return f"progress {one.mean[-1]:.4f}{sd}  after {len(one.mean) - 1} epochs, {count}"


def _axis(task: TaskMap, number: int) -> str:
    imaginary = " (imaginary)" if task.eigenvalues[number] < 0 else ""
    return f"{100 * task.shares[number]:.1f} %{imaginary}"


def figure(found: TrajectoryResult) -> Figure:
    """A column a task: all trajectories along InPCA's first two axes, and progress against the epoch."""
    from matplotlib.lines import Line2D

    rows = ceil(len(found.tasks) / A_ROW)
    columns = ceil(len(found.tasks) / rows)
    whole, axes = panels(2 * rows, columns, 4.4, 3.7)
    names = list(dict.fromkeys(one.method for task in found.tasks for one in task.methods))
    styles = {name: style(number) for number, name in enumerate(names)}
    for place in range(rows * columns):
        above, below = (axes[2 * (place // columns) + k, place % columns] for k in (0, 1))
        if place >= len(found.tasks):
            above.set_axis_off()
            below.set_axis_off()
            continue
        _draw_map(above, found.tasks[place], styles)
        _draw_progress(below, found.tasks[place], styles)
    handles = [Line2D([], [], label=name, markersize=5, **styles[name]._asdict()) for name in names]
    handles += [
        Line2D([], [], color="0.4", linestyle="", marker="o", markerfacecolor="white", label="at the start"),
        Line2D([], [], color="0.4", linestyle="", marker="o", label="after the last epoch"),
    ]
    whole.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * columns), frameon=False)
    return whole


def _draw_map(axis: Axes, task: TaskMap, styles: dict[str, Style]) -> None:
    for one in task.courses:
        x, y = (torch.tensor(one.coordinates)[:, k].tolist() for k in (0, 1))
        colour, dash, marker = styles[one.method]
        axis.plot(x, y, color=colour, linestyle=dash, linewidth=1)
        axis.plot(x[1:-1], y[1:-1], color=colour, linestyle="", marker=marker, markersize=2)
        axis.plot(x[:1], y[:1], color=colour, linestyle="", marker=marker, markersize=5, markerfacecolor="white")
        axis.plot(x[-1:], y[-1:], color=colour, linestyle="", marker=marker, markersize=5)
    for (x, y, *_), name in ((task.start, "$P_0$"), (task.truth, "$P^*$")):
        axis.plot([x], [y], color="black", marker="+", markersize=9, markeredgewidth=1.6)
        axis.annotate(name, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=12)
    axis.set_aspect("equal", adjustable="datalim")
    axis.margins(0.12)
    axis.locator_params(nbins=5)
    axis.set_title(textwrap.fill(task.task, 44), fontsize=10)
    axis.set(xlabel=f"InPCA axis 1: {_axis(task, 0)}", ylabel=f"InPCA axis 2: {_axis(task, 1)}")
    axis.grid(alpha=0.3)


def _draw_progress(axis: Axes, task: TaskMap, styles: dict[str, Style]) -> None:
    for one in task.methods:
        colour, dash, marker = styles[one.method]
        epochs, mean = torch.arange(len(one.mean)), torch.tensor(one.mean)
        every = max(1, len(epochs) // 8)
        axis.plot(epochs, mean, color=colour, linestyle=dash, marker=marker, markersize=4, markevery=every)
        if one.sd is not None:
            sd = torch.tensor(one.sd)
            axis.fill_between(epochs, (mean - sd).clamp(min=0), (mean + sd).clamp(max=1), color=colour, alpha=0.2, lw=0)
    spread = " (mean ± sd)" if any(one.sd is not None for one in task.methods) else ""
    axis.set(xlabel="epoch", ylabel=f"progress $t_w${spread}")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


EVALUATION = Evaluation(
    TrajectoryEvaluation, evaluate, "progress and InPCA of the trajectories that transfer left", lines, figure
)


__all__ = [
    "Course",
    "Method",
    "TaskMap",
    "TrajectoryEvaluation",
    "TrajectoryResult",
    "compared",
    "evaluate",
    "figure",
    "lines",
]
