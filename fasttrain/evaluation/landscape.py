"""The loss landscape: an encoder and its classifier, moved along two random directions in the space of their weights.

The directions are filter-normalised (Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets"), so that a step
of 1 changes each filter by as much as the filter is long, whatever its scale: BatchNorm takes a filter's scale away
again, and networks that differ in it alone have one landscape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from itertools import chain
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
import pydantic
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fasttrain import distributed
from fasttrain.config import Where
from fasttrain.errors import UsageError
from fasttrain.evaluation.classifier import ClassifierConfig, Linear, classifier_of
from fasttrain.evaluation.curvature import (
    Batches,
    Eigenvalue,
    Estimate,
    HessianConfig,
    estimate,
    hessian_product,
    quadratic_form,
    signs,
    top_eigenvalue,
)
from fasttrain.evaluation.evaluation import (
    ComparisonConfig,
    Evaluation,
    EvaluationData,
    Split,
    Subject,
    fingerprint,
)
from fasttrain.evaluation.images import thin
from fasttrain.evaluation.loss_plane import Direction, axis_of, filter_scales, loss_plane, random_directions, ring_of
from fasttrain.evaluation.parts import Found, Parts, Point, one_thread
from fasttrain.evaluation.tasks import Task
from fasttrain.figures import panels, style
from fasttrain.models import Encoder
from fasttrain.precision import Precision, decide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure


class LandscapeEvaluation(ComparisonConfig):
    """Loss on a plane through the weights of an encoder and its classifier, and how flat it is there."""

    classifier: ClassifierConfig = ClassifierConfig()
    split: Split = "train"
    "whose images the loss is of: train, on which the classifier is fitted and the loss is at its lowest, or val"
    images: int | None = Field(1024, ge=1)
    "images, evenly spaced over the listing; null: all"
    extent: float = Field(1.0, gt=0)
    "how far the plane reaches to either side; at 1 every filter has moved by its own length"
    points: int = Field(21, ge=3)
    "of the grid, along each side; an odd number, so that the weights themselves are one"
    radii: tuple[Annotated[float, pydantic.Field(gt=0)], ...] = (0.1, 0.25, 0.5, 1.0)
    "distances in the plane at which the rise of the loss is told; []: none"
    ring: int = Field(16, ge=2)
    "points at each of those distances, evenly around"
    seed: int = Field(0, ge=0, lt=2**63)
    "of the directions, and of the Hessian's probes"
    hessian: HessianConfig = HessianConfig()
    precision: Precision = "fp32"
    "of all that is computed here: curvature is a difference of losses that bf16 does not resolve"

    reads: ClassVar[dict[str, Where]] = {"ring": Where("radii", why="radii=[]")}

    @field_validator("points")
    @classmethod
    def _has_a_middle(cls, points: int) -> int:
        if points % 2 == 0:
            raise ValueError(f"{points} is even, and the weights themselves would not be a point: use {points + 1}")
        return points


class Rise(NamedTuple):
    """Mean and largest rise of the loss over its value at the weights, over a circle in the plane."""

    radius: float
    mean: float
    max: float


class Landscape(NamedTuple):
    """Of one encoder. Losses are mean cross-entropies in nats (not finite far out, perhaps), errors percents."""

    source: str
    name: str
    method: str
    loss: float  # at the weights themselves
    error: float
    losses: list[list[float]]  # [α][β]
    errors: list[list[float]]  # [α][β]
    rises: list[Rise]
    trace: Estimate | None  # of the Hessian by all weights
    curvature: Estimate | None  # mean of dᵀ H d over filter-normalised directions d
    top_eigenvalue: Eigenvalue | None


class LandscapeResult(NamedTuple):
    """Loss planes over one grid, of one encoder or several."""

    split: str
    images: int
    hessian_images: int | None
    classes: str  # what is told apart
    coordinates: list[float]  # of α and of β
    landscapes: list[Landscape]


class Network(nn.Module):
    """An encoder's backbone and a linear classifier on it: images [B, 3, H, W] -> logits [B, C]."""

    def __init__(self, encoder: Encoder, classifier: Linear, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.encoder, self.autocast = encoder, autocast
        self.classifier = nn.utils.skip_init(nn.Linear, *classifier.weight.shape[::-1])
        self.classifier.weight = nn.Parameter(classifier.weight)
        self.classifier.bias = nn.Parameter(classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            return self.classifier(self.encoder(images).features)


def evaluate(
    subjects: Sequence[Subject], data: EvaluationData, config: LandscapeEvaluation, parts: Parts
) -> LandscapeResult:
    """The loss on the plane and on the rings, then the Hessian's trace and top eigenvalue, of each subject.

    Each point of plane and rings, each probe of the trace and each search for an eigenvalue is a part.
    """
    networks = []
    for subject in subjects:
        encoder = subject.load(data.device)
        classifier = classifier_of(subject, encoder, data, config.classifier, parts)
        networks.append(Network(encoder, classifier, data.autocast).eval())
    keys = [fingerprint(network) for network in networks]
    bench = distributed.agree(lambda: Bench(dict(zip(keys, networks, strict=True)), classifier.task, data, config))

    axis = axis_of(config.extent, config.points)
    at = [(a, b) for a in axis for b in axis] + [p for radius in config.radii for p in ring_of(radius, config.ring)]
    heights = parts.run("loss landscape", [bench.point(key, at=list(p)) for key in keys for p in at], bench.height)
    asked = config.hessian
    kinds: list[Point] = [{"probe": number} for number in range(asked.probes)]
    if asked.iterations:  # the longest part first
        kinds.insert(0, {"iterations": asked.iterations, "tolerance": asked.tolerance})
    curved = parts.run("curvature", [bench.curved_point(key, **kind) for key in keys for kind in kinds], bench.curved)

    return LandscapeResult(
        config.split,
        len(bench.indices),
        len(bench.few) if asked.measures else None,
        classifier.task.name,
        axis,
        [
            _landscape(subject, own_heights, own_curved, config)
            for subject, own_heights, own_curved in zip(
                subjects, _each(heights, len(keys)), _each(curved, len(keys)), strict=True
            )
        ],
    )


class Bench:
    """Networks by their fingerprints, and the images that they are measured on: loaded once, when first asked for.

    Raises:
        UsageError: fewer images than classes.
    """

    def __init__(
        self, networks: Mapping[str, Network], task: Task, data: EvaluationData, config: LandscapeEvaluation
    ) -> None:
        self.networks, self.task, self.data, self.config = networks, task, data, config
        catalog = data.of(config.split)
        members = task.members(catalog, catalog.indices)
        self.indices = thin(members, config.images)
        self.few = thin(self.indices, config.hessian.images)
        if len(self.indices) < len(task.classes):
            enough = len(members) >= len(task.classes)
            raise UsageError(
                f"{len(self.indices)} {config.split} images of {len(task.classes)} classes are fewer than one each: "
                + (f"set images={len(task.classes)} or more" if enough else "give more data, or other classes")
            )
        data.used[config.split] = max(data.used.get(config.split, 0), len(self.indices))  # a probe may have used more
        self.directions = lru_cache(1)(self._directions)

    def point(self, key: str, **more: Any) -> Point:
        """What all that is found of a network depends on."""
        config = self.config
        return {
            "task": config.task,
            "weights": key,
            "data": self.data.of(config.split).fingerprint,
            "split": config.split,
            "classes": list(self.task.classes),
            "images": len(self.indices),
            "size": config.augment.size,
            "crop": config.augment.eval_crop,
            "precision": decide(config.precision, self.data.device),
            "batch": config.batch,
            "seed": config.seed,
            **more,
        }

    def curved_point(self, key: str, **more: Any) -> Point:
        """… and what is found of its Hessian."""
        return self.point(key, hessian_images=len(self.few), hessian_batch=self.config.hessian.batch, **more)

    @cached_property
    def batches(self) -> Batches:
        return self._shown(self.indices)

    @cached_property
    def hessian_batches(self) -> Batches:
        size = self.config.hessian.batch
        pieces = (zip(x.split(size), labels.split(size), strict=True) for x, labels in self._shown(self.few))
        return list(chain(*pieces))

    def _shown(self, indices: np.ndarray) -> Batches:
        """On this rank's device, with their labels in the task."""
        device = self.data.device
        with self.data.own_batches(self.config.split, indices) as batches:
            return [(b.images[0].to(device), self.task.relabelled(b.labels.to(device))) for b in batches]

    def _directions(self, key: str) -> list[Direction]:
        with one_thread():
            return random_directions(self.networks[key], self.config.seed)

    def height(self, point: Point) -> Found:
        """Loss and error at a point of the plane."""
        key = point["weights"]
        found = loss_plane(self.networks[key], self.directions(key), [point["at"]], self.batches)
        return {"loss": float(found.losses), "error": float(found.errors)}

    def curved(self, point: Point) -> Found:
        """What one vector of signs tells of the trace and of the curvature, or the top eigenvalue."""
        network = self.networks[point["weights"]]
        size = sum(parameter.numel() for parameter in network.parameters())
        vector = signs(size, self.config.seed, point.get("probe", 0)).to(self.data.device, torch.float32)
        product = partial(hessian_product, network, self.hessian_batches)
        with one_thread():
            if "probe" not in point:
                return top_eigenvalue(product, vector, point["iterations"], point["tolerance"])._asdict()
            along = vector * filter_scales(network).to(vector.dtype)
            return {"trace": quadratic_form(product, vector), "curvature": quadratic_form(product, along)}


def _each(found: Sequence[Found], count: int) -> list[Sequence[Found]]:
    """In ``count`` equal parts."""
    size = len(found) // max(1, count)
    return [found[number * size : (number + 1) * size] for number in range(count)]


def _landscape(
    subject: Subject, heights: Sequence[Found], curved: Sequence[Found], config: LandscapeEvaluation
) -> Landscape:
    grid, around = heights[: config.points**2], heights[config.points**2 :]
    rows = _each(grid, config.points)
    middle = grid[len(grid) // 2]
    probes = [found for found in curved if "trace" in found]
    tops = [Eigenvalue(**found) for found in curved if "trace" not in found]
    return Landscape(
        subject.source,
        subject.name,
        subject.method,
        middle["loss"],
        middle["error"],
        [[found["loss"] for found in row] for row in rows],
        [[found["error"] for found in row] for row in rows],
        [
            _rise(radius, [found["loss"] - middle["loss"] for found in ring])
            for radius, ring in zip(config.radii, _each(around, len(config.radii)), strict=True)
        ],
        estimate([found["trace"] for found in probes]) if probes else None,
        estimate([found["curvature"] for found in probes]) if probes else None,
        tops[0] if tops else None,
    )


def _rise(radius: float, ups: Sequence[float]) -> Rise:
    return Rise(radius, float(np.mean(ups)), float(np.max(ups)))


def labels(landscapes: Sequence[Landscape]) -> list[str]:
    """What to call each: its method, and its own name where the method has several."""
    methods = [one.method for one in landscapes]
    return [one.method if methods.count(one.method) == 1 else f"{one.method} ({one.name})" for one in landscapes]


def lines(result: LandscapeResult) -> list[str]:
    """A line an encoder."""
    names = labels(result.landscapes)
    width = max(map(len, ["encoder", *names]))
    found = [
        f"mean cross-entropy of {result.images:,} {result.split} images, {result.classes}"
        + (f"; its Hessian of {result.hessian_images:,}" if result.hessian_images else ""),
        f"{'encoder':{width}s}  {'loss':>9s}  {'error %':>7s}" + "".join(_heads(result.landscapes[0])),
    ]
    for name, one in zip(names, result.landscapes, strict=True):
        found.append(f"{name:{width}s}  {one.loss:9.4g}  {one.error:7.2f}" + "".join(_figures(one)))
    if cut := sum(map(_not_finite, result.landscapes)):
        found.append(f"{cut:,} of {sum(np.size(one.losses) for one in result.landscapes):,} losses are not finite")
    return found


def _heads(one: Landscape) -> list[str]:
    """Above :func:`_figures`."""
    heads = [f"  {f'rise, max r={rise.radius:g}':>20s}" for rise in one.rises]
    heads += [f"  {'trace':>18s}  {'dᵀHd':>18s}"] if one.trace is not None else []
    return heads + ([f"  {'top eigenvalue':>18s}"] if one.top_eigenvalue is not None else [])


def _figures(one: Landscape) -> list[str]:
    found = [f"  {f'{rise.mean:.3g}, {rise.max:.3g}':>20s}" for rise in one.rises]
    found += [f"  {_shown(x):>18s}" for x in (one.trace, one.curvature) if x is not None]
    return found + ([f"  {_found(one.top_eigenvalue):>18s}"] if one.top_eigenvalue is not None else [])


def _shown(x: Estimate) -> str:
    return f"{x.mean:.4g} ± {_plainly(x.standard_error)}" if x.probes > 1 else f"{x.mean:.4g}"


def _found(x: Eigenvalue) -> str:
    return f"{x.value:.4g} ± {_plainly(x.residual)}"


def _not_finite(one: Landscape) -> int:
    return int((~np.isfinite(one.losses)).sum())


SURFACES = 4
"Encoders in a picture of surfaces; of more there are contours alone."
LEVELS = 15


def figure(result: LandscapeResult) -> Figure:
    """Surfaces and contours on one scale, sections through the weights and the rise on rings, the numbers below."""
    landscapes, names = result.landscapes, labels(result.landscapes)
    several = len(landscapes) > SURFACES
    columns = 4 if several else len(landscapes) + 1
    rows = math.ceil((len(landscapes) + 2) / columns) if several else 2
    picture, axes = panels(rows, columns, 3.6, 3.2)
    picture.get_layout_engine().set(w_pad=0.12)  # surfaces are wider than they say
    scale = _scale(landscapes)
    if several:
        contours, (sections, rises), left = np.split(axes.ravel(), [len(landscapes), len(landscapes) + 2])
        for axis in left:
            axis.remove()
    else:
        contours, sections, rises = axes[1, :-1], axes[0, -1], axes[1, -1]
        for axis, one, name in zip(axes[0, :-1], landscapes, names, strict=True):
            _surface(axis, result.coordinates, one, name, scale)
    for axis, one, name in zip(contours, landscapes, names, strict=True):
        filled = _contour(axis, result.coordinates, one, scale)
        if several:
            axis.set_title(name)
    bar = picture.colorbar(filled, ax=list(contours), label="cross-entropy", format=_plainly, shrink=0.9)
    bar.ax.minorticks_off()
    _sections(sections, result.coordinates, landscapes, names)
    _rises(rises, landscapes, names)
    wide = int(14 * picture.get_figwidth())  # letters
    told = [wrap(caption, wide, subsequent_indent="    ") for caption in _captions(landscapes, names)]
    picture.supxlabel("\n".join(chain(*told)), fontsize="small", x=0.01, ha="left")
    return picture


def _captions(landscapes: Sequence[Landscape], names: Sequence[str]) -> list[str]:
    found = []
    for name, one in zip(names, landscapes, strict=True):
        told = [f"loss {one.loss:.3g}, error {one.error:.1f} %"]
        told += [f"rise at r = {rise.radius:g}: {rise.mean:.2g} (max {rise.max:.2g})" for rise in one.rises[-1:]]
        told += [f"trace {_shown(one.trace)}, mean dᵀHd {_shown(one.curvature)}"] if one.trace is not None else []
        told += [f"top eigenvalue {_found(one.top_eigenvalue)}"] if one.top_eigenvalue is not None else []
        cut = _not_finite(one)
        told += [f"{cut} of {np.size(one.losses)} losses not finite, left blank"] if cut else []
        found.append(f"{name}: " + "; ".join(told))
    return found


def _scale(landscapes: Sequence[Landscape]) -> LogNorm:
    """One for all losses above 0 that are finite."""
    from matplotlib.colors import LogNorm

    losses = np.concatenate([np.ravel(one.losses) for one in landscapes])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    low, high = (losses.min(), losses.max()) if len(losses) else (1.0, 1.0)
    return LogNorm(low, max(high, 1.01 * low))


def _clipped(one: Landscape, scale: LogNorm) -> np.ma.MaskedArray:
    """[β][α], as pictures have it: rows upwards."""
    losses = np.asarray(one.losses, np.float64).T
    return np.ma.masked_array(np.clip(losses, scale.vmin, scale.vmax), ~np.isfinite(losses))


def _levels(scale: LogNorm) -> np.ndarray:
    levels = np.geomspace(scale.vmin, scale.vmax, LEVELS)
    levels[[0, -1]] = scale.vmin, scale.vmax  # to the bit: what lies on the edge is inside
    return levels


def _plainly(value: float, position: Any = None) -> str:
    return f"{float(f'{value:.2g}'):,g}"


def _contour(axis: Axes, coordinates: Sequence[float], one: Landscape, scale: LogNorm) -> Any:
    losses, levels = _clipped(one, scale), _levels(scale)
    filled = axis.contourf(coordinates, coordinates, losses, levels, norm=scale, cmap="viridis")
    axis.contour(coordinates, coordinates, losses, levels, colors="black", linewidths=0.4)
    axis.plot(0, 0, "+", color="red", markersize=9, markeredgewidth=1.5)
    axis.set(xlabel="α (first direction)", ylabel="β (second direction)", aspect="equal")
    return filled


def _surface(axis: Axes, coordinates: Sequence[float], one: Landscape, name: str, scale: LogNorm) -> None:
    """In place of ``axis``; heights are logarithms, labelled with what they are of."""
    place, picture = axis.get_subplotspec(), axis.figure
    axis.remove()
    solid = picture.add_subplot(place, projection="3d", title=name)
    alpha, beta = np.meshgrid(coordinates, coordinates)
    losses = _clipped(one, scale)
    colours = _colours(scale, losses)
    heights = np.log10(losses).filled(np.nan)
    solid.plot_surface(alpha, beta, heights, facecolors=colours, rcount=101, ccount=101, linewidth=0.2, shade=False)
    solid.set(xlabel="α", ylabel="β", zlim=np.log10([scale.vmin, scale.vmax]))
    ends = [coordinates[0], 0, coordinates[-1]]
    solid.set(xticks=ends, yticks=ends)
    solid.zaxis.set_major_formatter(lambda height, position: _plainly(10**height))


def _colours(scale: LogNorm, losses: np.ma.MaskedArray) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["viridis"](scale(losses))


def _sections(axis: Axes, coordinates: Sequence[float], landscapes: Sequence[Landscape], names: Sequence[str]) -> None:
    middle, every = len(coordinates) // 2, max(1, len(coordinates) // 10)
    for number, (one, name) in enumerate(zip(landscapes, names, strict=True)):
        along_alpha, along_beta = [row[middle] for row in one.losses], one.losses[middle]
        look = style(number)._asdict()
        axis.plot(coordinates, along_alpha, **look, markersize=4, markevery=every, label=name)
        axis.plot(coordinates, along_beta, **(look | {"marker": None}), linewidth=0.8)
    axis.set(xlabel="α (marked) or β, the other at 0", ylabel="cross-entropy")
    _logarithmic(axis, "y")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _rises(axis: Axes, landscapes: Sequence[Landscape], names: Sequence[str]) -> None:
    if not landscapes[0].rises:
        axis.remove()
        return
    for number, (one, name) in enumerate(zip(landscapes, names, strict=True)):
        radii, means, most = zip(*one.rises, strict=True)
        look = style(number)._asdict()
        axis.plot(radii, means, **look, markersize=4, label=name)
        axis.plot(radii, most, **look, markersize=4, markerfacecolor="none", linewidth=0.8)
    axis.set(xlabel="distance r in the plane", ylabel="rise (hollow: largest)")
    if all(rise.mean > 0 for one in landscapes for rise in one.rises):
        _logarithmic(axis, "x")
        _logarithmic(axis, "y")
    axis.grid(alpha=0.3)


def _logarithmic(axis: Axes, which: str) -> None:
    """With labels at 1, 2, 5, 10, …, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set(**{f"{which}scale": "log"})
    line = getattr(axis, f"{which}axis")
    line.set_major_locator(LogLocator(subs=(1, 2, 5)))
    line.set_major_formatter(_plainly)
    line.set_minor_formatter(NullFormatter())


EVALUATION = Evaluation(
    LandscapeEvaluation, evaluate, "loss on a plane through the weights, and its flatness", lines, figure
)


__all__ = ["Landscape", "LandscapeEvaluation", "LandscapeResult", "evaluate", "figure", "lines"]
