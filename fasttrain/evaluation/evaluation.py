"""The one shape of all evaluations: settings, (encoders, data, settings) -> a named result, a picture that reads it.

``launch/eval.py`` holds the table of them. A new evaluation is one module here with a subclass of
:class:`EvaluationConfig`, a function, perhaps a figure, and one line there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from fasttrain import distributed, inherited
from fasttrain.config import Config, PathText, Where
from fasttrain.data.augment import AugmentConfig
from fasttrain.data.catalog import Catalog, DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig
from fasttrain.errors import UsageError
from fasttrain.evaluation.features import Features, extract
from fasttrain.evaluation.finite import check_features
from fasttrain.evaluation.images import catalog_features, chunks, evaluation_batches, own_batches, thin, why_not_finite
from fasttrain.evaluation.parts import Parts
from fasttrain.evaluation.tasks import Task
from fasttrain.evaluation.watching import watched
from fasttrain.export import load_encoder
from fasttrain.models import Encoder, ModelConfig
from fasttrain.precision import Precision, decide

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Split = Literal["train", "val"]

WHOLE = 1 << 30
"Bytes of features that every rank may hold."


class CropConfig(AugmentConfig):
    """What of an image an evaluation shows: its central square, whatever a training drew."""

    reads: ClassVar[dict[str, Where]] = {
        name: Where("draws", why="an evaluation draws nothing")
        for name in AugmentConfig.model_fields
        if name not in ("size", "eval_crop")
    }

    @property
    def draws(self) -> bool:
        """Whether anything is drawn."""
        return False


class SourceConfig(Config):
    """What all evaluations are told, those too that show a network no image."""

    task: str
    "which evaluation; the first argument"
    source: PathText
    "a run's folder or a weights file; the second argument"
    output: PathText | None = None
    "the JSON file; null: eval-<task>.json beside the weights"
    device: distributed.Device = "auto"
    "auto: the GPU when there is one"

    @property
    def sources(self) -> tuple[str, ...]:
        """Of one, or of several."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)


class EvaluationConfig(SourceConfig):
    """What evaluations of an encoder are told: what to evaluate, how and on what."""

    batch: int = Field(256, ge=1)
    "images each rank encodes at a time"
    precision: Precision = "auto"
    "of the features: auto is bf16 where the hardware has it, else fp32"
    model: ModelConfig | None = None
    "architecture, of weights that say nothing of theirs (model.arch, model.stem, model.width, …)"
    data: DataConfig = DataConfig()
    augment: CropConfig = CropConfig()
    loader: LoaderConfig = LoaderConfig()

    @property
    def opened(self) -> DataConfig:
        """The data set that is opened."""
        return self.data


class SourcesConfig(SourceConfig):
    """What evaluations of several sources, or of one, are told."""

    source: tuple[PathText, ...] = Field(min_length=1)  # type: ignore[assignment]
    "runs' folders or weights files, one or several; the arguments after the first"
    output: PathText | None = None
    "the JSON file; null: eval-<task>.json beside the weights, or in the folder that holds all of several runs"
    names: tuple[str, ...] | None = None
    """what to call each source in tables and pictures; sources of one name are taken as seeds of one method. null: the
    folder's name, and runs whose settings differ in run.seed and run.dir alone are one method"""

    @field_validator("source")
    @classmethod
    def _each_once(cls, source: tuple[str, ...]) -> tuple[str, ...]:
        for one in source:
            if source.count(one) > 1:
                raise ValueError(f"'{one}' is given {source.count(one)} times: give each source once")
        return source

    @field_validator("names")
    @classmethod
    def _a_name_each(cls, names: tuple[str, ...] | None, info: Any) -> tuple[str, ...] | None:
        count = len(info.data.get("source", names or ()))
        if names is not None and len(names) != count:
            raise ValueError(f"{len(names)} names for {count} sources: give one each, in the order of the sources")
        return names


class ComparisonConfig(SourcesConfig, EvaluationConfig):
    """What evaluations of one encoder or several are told."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One of the things that are evaluated: an encoder, and what it is called."""

    source: str
    name: str  # its own
    method: str  # what it shares with other seeds of the same
    settings: dict[str, dict[str, Any]]  # of its run, {} of anything else
    model: ModelConfig | None = None

    @property
    def folder(self) -> Path:
        """Where results about it go."""
        path = Path(self.source)
        return path if path.is_dir() else path.parent

    def load(self, device: torch.device) -> Encoder:
        """The encoder, in evaluation mode, without heads; all ranks together.

        Raises:
            UsageError: as :func:`fasttrain.export.load_encoder`.
        """
        return distributed.agree(lambda: load_encoder(self.source, self.model)).to(device)


def subjects_of(config: SourceConfig) -> list[Subject]:
    """What ``config`` evaluates, in its order.

    Runs whose settings differ in ``run.seed`` and ``run.dir`` alone are of one method, named after the first's folder
    without the number at its end.
    """
    names = getattr(config, "names", None)
    subjects: list[Subject] = []
    methods: dict[str, str] = {}
    called = _names_of([Path(source).resolve() for source in config.sources])
    for position, source in enumerate(config.sources):
        settings, own = inherited.settings_of(source), called[position]
        if names is not None:
            method = names[position]
        elif settings:
            method = methods.setdefault(_without_seed(settings), own)
        else:
            method = own
        subjects.append(Subject(source, own, method, settings, getattr(config, "model", None)))
    if names is None:
        shared = {s.method for s in subjects if sum(t.method == s.method for t in subjects) > 1}
        short = {method: method.rstrip("0123456789").rstrip("-_. ") or method for method in shared}
        taken = {subject.method for subject in subjects} - shared
        short = {m: s if s not in taken and list(short.values()).count(s) == 1 else m for m, s in short.items()}
        subjects = [replace(subject, method=short.get(subject.method, subject.method)) for subject in subjects]
    return subjects


def _names_of(paths: Sequence[Path]) -> list[str]:
    """Of each its own name, a file's without what it ends in, and as many folders before it as tell it from others."""
    names = [str(path if path.is_dir() else path.with_suffix("")).split("/") for path in paths]
    depths = [1] * len(names)
    for i, name in enumerate(names):
        others = [other for j, other in enumerate(names) if j != i and other != name]
        while depths[i] < len(name) and any(other[-depths[i] :] == name[-depths[i] :] for other in others):
            depths[i] += 1
    return ["/".join(name[-depth:]) for name, depth in zip(names, depths, strict=True)]


def _without_seed(settings: dict[str, dict[str, Any]]) -> str:
    run = {key: value for key, value in settings.get("run", {}).items() if key not in ("seed", "dir")}
    return json.dumps(settings | {"run": run}, sort_keys=True, default=str)


def fingerprint(encoder: torch.nn.Module) -> str:
    """A hash of the weights and buffers: what was found with other weights is not found again by it."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """A data set as an evaluation sees it, on this rank's device."""

    config: EvaluationConfig
    device: torch.device
    autocast: torch.dtype | None
    used: dict[Split, int] = field(default_factory=dict, init=False)  # images, of what was opened

    @cached_property
    def train(self) -> Catalog:
        return self._labelled("train")

    @cached_property
    def val(self) -> Catalog:
        return self._labelled("val")

    def _labelled(self, split: Split) -> Catalog:
        """All ranks together.

        Raises:
            UsageError: there is no such split, or its labels mean nothing.
        """

        def opened() -> Catalog:
            catalog = open_catalog(self.config.opened, split)
            catalog.require_labels(f"the accuracy of {self.config.task}")
            return catalog

        return distributed.agree(opened)

    def of(self, split: Split) -> Catalog:
        return self.train if split == "train" else self.val

    def choose(self, split: Split, most: int | None = None, task: Task | None = None) -> np.ndarray:
        """Indices of at most so many images (of the task's classes), evenly spaced over the listing."""
        indices = self.of(split).indices
        indices = thin(indices if task is None else task.members(self.of(split), indices), most)
        self.used[split] = len(indices)
        return indices

    def facts(self) -> dict[str, Any]:
        """What of it was used, for the record."""
        return {
            split: {"where": str(self.of(split).root), "images": count, "fingerprint": self.of(split).fingerprint}
            for split, count in self.used.items()
        }

    @property
    def seen(self) -> dict[str, Any]:
        """What features depend on but for weights and which images, for :data:`~fasttrain.evaluation.parts.Point`."""
        config = self.config
        return {
            "train": self.train.fingerprint,
            "val": self.val.fingerprint,
            "size": config.augment.size,
            "eval_crop": config.augment.eval_crop,
            "batch": config.batch,
            "precision": decide(config.precision, self.device),
            "loader": config.loader.kind,
        }

    @property
    def where(self) -> tuple[Any, ...]:
        """Behind catalogue, indices and batch: what the functions of :mod:`fasttrain.evaluation.images` are told."""
        return self.config.augment, self.config.loader, self.device

    def features(self, encoder: Encoder, **indices: np.ndarray) -> tuple[dict[str, Features], bool]:
        """The features of each split's ``indices``, and whether they are shared among the ranks; all ranks together.

        What takes at most :data:`WHOLE` bytes every rank holds, whole and in bits the same for any number of ranks, and
        so is what follows from it. Of more each rank holds a share, and results over ranks agree to rounding.
        """
        count = sum(map(len, indices.values()))
        shared = count * encoder.backbone.num_features * 4 > WHOLE
        where = self.config.batch, *self.where, self.autocast
        return {
            split: catalog_features(encoder, self.of(split), chosen, *where)
            if shared
            else self.all_features(encoder, split, chosen)
            for split, chosen in indices.items()
        }, shared

    def batches(self, split: Split, indices: np.ndarray):
        """This rank's share of the images, in batches, as a context; all ranks together."""
        return evaluation_batches(self.of(split), indices, self.config.batch, *self.where)

    def own_batches(self, split: Split, indices: np.ndarray):
        """All of the images, in batches, as a context; this rank alone, so that a part of an evaluation may ask."""
        return own_batches(self.of(split), indices, self.config.batch, *self.where)

    def all_features(self, encoder: Encoder, split: Split, indices: np.ndarray) -> Features:
        """The features of all of ``indices`` in their order on every rank, in bits the same for any number of ranks.

        All ranks together. Each batch of ``config.batch`` images is encoded by one rank, whole.

        Raises:
            NotFinite: some are not.
        """
        mine = chunks(indices, self.config.batch)[distributed.rank() :: distributed.world_size()]

        def encoded(chosen: np.ndarray, autocast: torch.dtype | None) -> Features:
            if not len(chosen):
                none = torch.zeros(0, dtype=torch.int64, device=self.device)
                return Features(torch.zeros(0, encoder.backbone.num_features, device=self.device), none, none)
            with self.own_batches(split, chosen) as batches:
                seen = watched(batches, f"{split} features", -(-len(chosen) // self.config.batch))
                return extract(encoder, seen, self.device, autocast)

        share = encoded(np.concatenate(mine) if mine else indices[:0], self.autocast)
        check_features(f"{split} images", share, partial(why_not_finite, encoder, self.autocast, encoded))
        parts = [_gathered(part.cpu()) for part in share]
        shares = [Features(*members) for members in zip(*parts, strict=True)]
        size, pieces = self.config.batch, []
        for number in range(len(chunks(indices, size))):
            turn, place = number // distributed.world_size() * size, number % distributed.world_size()
            pieces.append(Features(*(member[turn : turn + size] for member in shares[place])))
        return Features(*(torch.cat(members).to(self.device) for members in zip(*pieces, strict=True)))


def _gathered(part: Tensor) -> list[Tensor]:
    """Every rank's tensor, of any length, on the CPU."""
    data = distributed.all_gather_bytes(part.contiguous().numpy().tobytes())
    shape = (-1, *part.shape[1:])
    return [torch.frombuffer(bytearray(x), dtype=part.dtype).view(shape) if x else part[:0] for x in data]


def flat(found: Any) -> list[str]:
    """A line a member of a result that holds plain values: shares in percent where they are ``top``-k accuracies."""
    return [
        f"{name:16s}{100 * value:8.2f} %" if "top" in name else f"{name:16s}{value!s:>8}"
        for name, value in found._asdict().items()
    ]


class Evaluation(NamedTuple):
    """A line of the table in ``launch/eval.py``."""

    config: type[SourceConfig]
    evaluate: Callable[[Sequence[Subject], EvaluationData, Any, Parts], Any]
    "(subjects, data, settings, parts) -> a NamedTuple; all ranks together, and the same on each"
    about: str
    "what it tells, for --help"
    lines: Callable[[Any], list[str]] = flat
    "of the result, for whoever watches"
    figure: Callable[[Any], Figure] | None = None
    "of the result alone"


def split_arrays(value: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A result as JSON has it, and the tensors in it, each by its dotted name, which stands in its place."""
    if isinstance(value, Tensor):
        return {"array": name, "shape": list(value.shape)}, {name: value}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        parts = {str(key): split_arrays(part, f"{name}.{key}" if name else str(key)) for key, part in value.items()}
        plain: Any = {key: part for key, (part, _) in parts.items()}
    elif isinstance(value, list | tuple):
        numbered = [split_arrays(part, f"{name}.{i}") for i, part in enumerate(value)]
        parts, plain = dict(enumerate(numbered)), [part for part, _ in numbered]
    else:
        return value, {}
    return plain, {key: tensor for _, found in parts.values() for key, tensor in found.items()}


def place_of(config: SourceConfig, subjects: Sequence[Subject]) -> Path:
    """Where the result goes: ``config.output``, or beside the weights, or in the folder that holds all of several.

    Raises:
        UsageError: several sources have none in common but the root.
    """
    if config.output is not None:
        return Path(config.output)
    folders = [subject.folder.resolve() for subject in subjects]
    if len(set(folders)) == 1:
        return subjects[0].folder / f"eval-{config.task}.json"
    shared = [parent for parent in folders[0].parents if all(parent in folder.parents for folder in folders)]
    if not shared or shared[0] == Path("/"):
        raise UsageError("the sources have no folder in common: say where the result goes with output=…")
    return shared[0] / f"eval-{config.task}.json"


__all__ = [
    "ComparisonConfig",
    "CropConfig",
    "Evaluation",
    "EvaluationConfig",
    "EvaluationData",
    "SourceConfig",
    "SourcesConfig",
    "Split",
    "Subject",
    "fingerprint",
    "flat",
    "place_of",
    "split_arrays",
    "subjects_of",
]
