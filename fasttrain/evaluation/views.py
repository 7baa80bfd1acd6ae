"""Adversarial views over training, from what runs of ``launch/pretrain.py`` logged (Lubana & Aldeeb, figures 2 to 4).

kNN accuracy against the epoch, of runs with and without an adversary; the constants of a learned change against the
step; and a row of images before and after the change, as the newest checkpoint's adversary makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fasttrain import checkpoint, distributed
from fasttrain.accuracies import percent
from fasttrain.config import Where, resolve
from fasttrain.data import Batch
from fasttrain.errors import NotFinite, UsageError
from fasttrain.evaluation.evaluation import ComparisonConfig, Evaluation, EvaluationData, Subject, fingerprint
from fasttrain.evaluation.logged import (
    Lines,
    Reached,
    Series,
    by_method,
    called,
    check_one_data_set,
    draw,
    epochs_of,
    from_zero,
    logged,
    mean_of,
    reached,
    series,
    spread,
)
from fasttrain.evaluation.parts import Parts
from fasttrain.evaluation.spread import aligned
from fasttrain.figures import DASHES, MARKERS, Style, panels, style
from fasttrain.models import Encoder, ModelConfig
from fasttrain.objectives import build_objective, sees_both
from fasttrain.step import Term, TrainStep
from fasttrain.views import ViewedTermConfig, build_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTEAD = {"fare": "python launch/eval.py fare {source} shows what a fine-tuning logged"}
UNITS = {
    "colour_space": "share of a channel",
    "rotation": "mean size (degrees)",
    "translation": "mean size (share of the side)",
    "colour_jitter": "mean size (of a factor; hue: of a turn)",
}
"What the constants of a learned change are in; each is the mean over a batch, of its absolute value."
CHANNELS = {"red": "#c0392b", "green": "#27864a", "blue": "#1f4fa8"}


class ViewsEvaluation(ComparisonConfig):
    """Pretraining with adversarial views, over training."""

    images: int = Field(8, ge=0, le=64)
    "validation images to show before and after the change, evenly spaced over the listing; 0: none"

    reads: ClassVar[dict[str, Where]] = {
        "model": Where("weights", why="the sources are runs, which say what they are"),
        **{name: Where("images") for name in ("data", "augment", "loader", "batch", "precision")},
    }

    @property
    def weights(self) -> bool:
        """Whether a source may be a weights file."""
        return False


class ViewsRun(NamedTuple):
    """What one run logged."""

    name: str
    method: str  # what it shares with other seeds of the same
    knn: Series | None  # shares in [0, 1]; None: it was not measured
    epochs: Tensor | None  # [T] float64: those of knn's steps
    reached: Reached | None  # of knn; the first is the untrained encoder's
    constants: dict[str, Series]  # of learned changes, by term/family/constant


class Shown(NamedTuple):
    """Images before and after a run's adversary changed them."""

    name: str  # of the run
    term: str  # whose view it is
    kind: str  # attack or structured
    step: int  # of the checkpoint
    before: Tensor  # [N, 3, H, W] uint8
    after: Tensor  # [N, 3, H, W] uint8
    constants: dict[str, float]  # mean size of each constant over these images, by family/constant; {}: of an attack


class ViewsResult(NamedTuple):
    """Runs of ``launch/pretrain.py``, in the order given."""

    runs: list[ViewsRun]
    shown: list[Shown]
    notes: list[str]


def evaluate(subjects: Sequence[Subject], data: EvaluationData, config: ViewsEvaluation, parts: Parts) -> ViewsResult:
    """What the runs logged, and what their adversaries make of some images."""
    lines = logged(subjects, "terms", INSTEAD)
    check_one_data_set(subjects)
    runs = [of_run(subject, mine) for subject, mine in zip(subjects, lines, strict=True)]
    notes = [
        f"{run.name} measured no kNN accuracy (evaluate.every_epochs=0): python launch/eval.py knn {subject.source} "
        "measures what it ended with"
        for subject, run in zip(subjects, runs, strict=True)
        if run.knn is None
    ]
    return ViewsResult(runs, shown(subjects, data, config, parts) if config.images else [], notes)


def of_run(subject: Subject, lines: Lines) -> ViewsRun:
    """The run's series."""
    knn = series(lines, "knn_top1")
    names = {name: None for line in lines for name in line if name.startswith("view/")}
    constants = {name.removeprefix("view/"): series(lines, name) for name in names}
    if knn is None:
        return ViewsRun(subject.name, subject.method, None, None, None, constants)
    return ViewsRun(subject.name, subject.method, knn, epochs_of(knn.steps, lines), reached(knn), constants)


class Trained(NamedTuple):
    """A run's module as its newest checkpoint has it."""

    module: TrainStep
    terms: dict[str, ViewedTermConfig]
    step: int
    views: int  # of each image, that its terms see


def trained(subject: Subject, device: torch.device) -> Trained:
    """The encoder, its heads and its adversaries, built as the training built them; in evaluation mode.

    Raises:
        UsageError: there is no checkpoint, or it is none of these settings.
    """
    found, damaged = checkpoint.find(subject.folder / "checkpoints")
    for line in damaged:
        distributed.say(f"WARNING: {line}")
    if found is None:
        raise UsageError(
            f"'{subject.source}' has no checkpoint, and the adversary is nowhere else: let it save one, or leave the "
            "images out with images=0"
        )
    settings = subject.settings
    model = {key: value for key, value in settings["model"].items() if key in ModelConfig.model_fields}
    encoder = Encoder(resolve(ModelConfig, model | {"sync_bn": False})).to(device)  # one rank shows them
    terms = {name: resolve(ViewedTermConfig, term) for name, term in settings["terms"].items()}
    seed, accumulation = settings["run"]["seed"], settings["train"]["accumulation"]
    summands = [
        Term(name, build_objective(term), term.weight, build_view(term, encoder, seed, accumulation))
        for name, term in terms.items()
    ]
    module = TrainStep(encoder, summands)
    try:
        module.load_state_dict(found.tensors(checkpoint.MODEL))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{found.path} does not fit the configuration in '{subject.source}' ({reason}): leave the run, or the "
            "images (images=0), out"
        ) from None
    return Trained(module.eval(), terms, found.state["step"], settings["augment"]["views"])


def shown(subjects: Sequence[Subject], data: EvaluationData, config: ViewsEvaluation, parts: Parts) -> list[Shown]:
    """Of every view that changes images, some validation images before and after."""
    moving = [s for s in subjects if any(term["view"]["kind"] != "clean" for term in s.settings["terms"].values())]
    if not moving:
        return []
    runs = distributed.agree(lambda: [trained(subject, data.device) for subject in moving])
    try:
        indices = data.choose("val", config.images)
    except UsageError as error:
        raise UsageError(f"{error}; or leave the images out with images=0", everywhere=True) from None
    pairs, points = [], []
    for subject, run in zip(moving, runs, strict=True):
        weights = fingerprint(run.module)
        for name in (name for name, term in run.terms.items() if term.view.kind != "clean"):
            pairs.append((subject, run, name))
            points.append(
                {
                    "weights": weights,
                    "settings": {key: subject.settings[key] for key in ("model", "terms")},
                    "draws": [subject.settings["run"]["seed"], subject.settings["train"]["accumulation"]],
                    "term": name,
                    "views": run.views,
                    "data": data.val.fingerprint,
                    "images": indices.tolist(),
                    "crop": [config.augment.size, config.augment.eval_crop],
                    "precision": str(data.autocast),
                }
            )

    def work(point: dict[str, Any]) -> dict[str, Any]:
        _, run, name = pairs[points.index(point)]
        with data.own_batches("val", indices) as batches:
            images, labels, index = zip(*(batch[:3] for batch in batches), strict=True)
        whole = Batch(torch.cat(images, dim=1), torch.cat(labels), torch.cat(index))
        return changed(run, name, Batch(*(part.to(data.device) for part in whole[:3])), data.autocast)

    found = parts.run("images before and after", points, work)
    return [
        Shown(subject.name, name, run.terms[name].view.kind, run.step, **one)
        for (subject, run, name), one in zip(pairs, found, strict=True)
    ]


def changed(run: Trained, name: str, images: Batch, autocast: torch.dtype | None = None) -> dict[str, Any]:
    """What the view of the term ``name`` makes of one view of ``images``, whose other views are the image itself too.

    Returns:
        ``before`` and ``after`` [N, 3, H, W] uint8, and the ``constants`` of a learned change.

    Raises:
        NotFinite: a changed image is not.
    """
    view, settings = run.module.views[name], run.terms[name].view
    place = -1 if sees_both(run.terms[name]) else settings.index
    run.module.train(settings.kind == "attack" and settings.attack.batchnorm == "train")
    device = images.images.device.type
    seen = images._replace(images=images.images.expand(run.views, -1, -1, -1, -1))
    with distributed.alone(), torch.autocast(device, autocast, enabled=autocast is not None):
        after = view(run.module.encoder, seen).images[place].detach()
    if not after.isfinite().all():
        raise NotFinite(f"what the view of term {name} makes of an image is not finite: its encoder has diverged")
    sizes = {key: float(size) for key, size in view.scalars().items()} if settings.kind == "structured" else {}
    return {"before": as_bytes(images.images[0]), "after": as_bytes(after), "constants": sizes}


def as_bytes(images: Tensor) -> Tensor:
    """Pixels in [0, 1] as a file has them: the nearest of 0 to 255, on the CPU."""
    return (255 * images.float()).round().clamp(0, 255).to(torch.uint8).contiguous().cpu()


def lines(found: ViewsResult) -> list[str]:
    """A row a run: kNN accuracy untrained, at the end and at its best; then the constants at the end."""
    rows = [["run", "method", "epochs", "untrained", "kNN", "best", "at epoch"]]
    for run in found.runs:
        row = [run.name, run.method if run.method != run.name else ""]
        if run.knn is None:
            rows.append([*row, *["-"] * 5])
            continue
        came, best = run.reached, float(run.epochs[run.knn.steps == run.reached.best_step][0])
        row += [f"{float(run.epochs[-1]):.4g}", percent(came.first), percent(came.last), percent(came.best)]
        rows.append([*row, f"{best:.4g}"])
    said = aligned(rows)
    for method, seeds in by_method(found.runs).items():
        if len(seeds) > 1 and (curve := mean_of([seed.knn for seed in seeds])) is not None:
            said.append(f"{method}: kNN {spread(curve)}")
    for run in found.runs:
        for family, names in families(run.constants).items():
            values = [f"{name} {float(run.constants[f'{family}/{name}'].values[-1]):.3g}" for name in names]
            said.append(f"{run.name}, {family}: {', '.join(values)}; {unit(family)}")
    return said + found.notes


def families(constants: Iterable[str]) -> dict[str, list[str]]:
    """``term/family`` -> the names of its constants."""
    found: dict[str, list[str]] = {}
    for key in constants:
        family, _, name = key.rpartition("/")
        found.setdefault(family, []).append(name)
    return found


def unit(family: str) -> str:
    """Of the constants of ``term/family``."""
    return UNITS.get(family.rpartition("/")[2], "mean size")


def figure(found: ViewsResult) -> Figure:
    """kNN accuracy against the epoch, the constants of each learned change, and rows of images."""
    methods = by_method(found.runs)
    curves: list[Callable[[Axes], None]] = [partial(draw_knn, methods=methods)]
    curves += [
        partial(draw_constants, method=method, seeds=seeds, family=family, names=names)
        for method, seeds in methods.items()
        for family, names in families(seeds[0].constants).items()
    ]
    images = [partial(draw_images, shown=one) for one in found.shown]
    columns = min(3, max(len(curves), len(images)))
    heights = [1.0] * -(-len(curves) // columns) + [0.5] * -(-len(images) // columns)
    picture, axes = panels(
        len(heights), columns, 4.6, 3.6 * sum(heights) / len(heights), gridspec_kw={"height_ratios": heights}
    )
    rows = heights.count(1.0)
    for places, drawn in ((axes[:rows].flat, curves), (axes[rows:].flat, images)):
        for axis, what in zip_longest(places, drawn):
            axis.remove() if what is None else what(axis)
    return picture


def draw_knn(axis: Axes, methods: dict[str, list[ViewsRun]]) -> None:
    for number, (method, seeds) in enumerate(methods.items()):
        if (curve := mean_of([seed.knn for seed in seeds])) is not None:
            epochs = seeds[0].epochs[torch.isin(seeds[0].knn.steps, curve.steps)]
            draw(axis, epochs, curve, style(number), 100, label=called(method, len(seeds)))
    axis.set(xlabel="epoch", ylabel="kNN accuracy (%)")
    from_zero(axis)
    if axis.lines:
        axis.legend(fontsize="small")


def draw_constants(axis: Axes, method: str, seeds: Sequence[ViewsRun], family: str, names: Sequence[str]) -> None:
    """Each constant against the step; of the colour space the colour says which channel is taken, the dash for what."""
    for number, name in enumerate(names):
        look, label = style(number), name
        target, _, channel = name.rpartition("_")
        if channel in CHANNELS:
            place = tuple(CHANNELS).index(channel)
            look = Style(CHANNELS[channel], DASHES[int(target[1:]) - 1], MARKERS[place])
            label = f"{channel} in {target.upper()}"
        if (curve := mean_of([seed.constants.get(f"{family}/{name}") for seed in seeds])) is not None:
            draw(axis, curve.steps, curve, look, label=label)
    axis.set(xlabel="step", ylabel=unit(family))
    from_zero(axis)
    title = f"{called(method, len(seeds))}: {family.rpartition('/')[2].replace('_', ' ')}"
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": min(4, len(names)) if len(names) < 9 else 3}
    axis.legend(title=title, fontsize="x-small", title_fontsize="small", frameon=False, **above)


def draw_images(axis: Axes, shown: Shown) -> None:
    """Rows of images: before, after, and what an attack changed, on grey, magnified to what can be seen."""
    rows = {"before": shown.before, "after": shown.after}
    if shown.kind == "attack":
        change = shown.after.int() - shown.before.int()
        times = max(1, 127 // max(1, int(change.abs().max())))
        rows[f"change × {times}"] = (128 + times * change).clamp(0, 255).to(torch.uint8)
    mosaic = torch.cat([torch.cat([*images], dim=2) for images in rows.values()], dim=1)
    height = shown.before.shape[2]
    axis.imshow(mosaic.permute(1, 2, 0).numpy(), interpolation="nearest" if height < 100 else None)
    axis.set_yticks([height * (row + 0.5) - 0.5 for row in range(len(rows))], list(rows))
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.set_title(f"{shown.name}, step {shown.step:,}", fontsize="small")


EVALUATION = Evaluation(
    ViewsEvaluation,
    evaluate,
    "pretraining with adversarial views over its epochs: kNN, constants, images",
    lines,
    figure,
)
