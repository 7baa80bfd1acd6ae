"""Who makes batches: one protocol for all loaders, the settings they read, and the choice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from pydantic import Field

from fasttrain.config import Config
from fasttrain.data import Batch
from fasttrain.errors import UsageError

if TYPE_CHECKING:
    from fasttrain.data.augment import Augmentation
    from fasttrain.data.catalog import Catalog
    from fasttrain.data.damage import BadImages
    from fasttrain.data.order import Order


class LoaderConfig(Config):
    """How batches are read and decoded."""

    kind: Literal["auto", "resident", "dali", "ffcv"] = "auto"
    """who makes batches: resident (pixels decoded once and kept where the step is), NVIDIA DALI (image files), FFCV (a
    .beton file), or auto: for training, and for what is decoded already, resident where it fits; else by the data"""
    resident_share: float = Field(0.25, gt=0, le=1)
    """of the memory (a GPU's, and the host's or its container's), what decoded pixels may take to be kept"""
    colours: Literal["auto", "cpu", "gpu"] = "auto"
    """where DALI's and FFCV's views get their colours; auto: where the step is. With cpu DALI decodes there, too"""
    threads: int | None = Field(None, ge=1)
    """decoding threads of each rank; by default the cores it may use, shared among the ranks of this machine"""
    prefetch: int = Field(2, ge=1)
    """finished batches kept ready"""
    timeout: float = Field(120.0, gt=0)
    """seconds without a batch after which the run ends with an error that names the files being read"""
    bad_share: float = Field(0.01, ge=0, le=1)
    """share of the images that may turn out unreadable before the run stops; others are shown in their place"""

    def thread_count(self) -> int:
        """``threads``, or this rank's share of the cores."""
        ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1  # torchrun's name, DeepSpeed's
        return self.threads or max(1, len(os.sched_getaffinity(0)) // int(ranks))

    def colours_on_gpu(self, device: torch.device) -> bool:
        """Whether a batch that goes to ``device`` gets its colours there.

        Raises:
            UsageError: it should, and the run has no GPU.
        """
        if self.colours == "gpu" and device.type != "cuda":
            raise UsageError(f"loader.colours=gpu, and this run's device is {device.type}: leave it out")
        return device.type == "cuda" and self.colours != "cpu"


class Loader(Protocol):
    """Batches of one rank, in the order that :class:`~fasttrain.data.order.Order` gives."""

    bad: BadImages
    """the bad images in the batches that were taken so far"""

    def __len__(self) -> int:
        """Micro-batches an epoch."""
        ...

    def iterate(self, start: int = 0, *, levels: bool = False) -> Iterator[Batch]:
        """Batches from global micro-batch ``start`` of the run on: without end in training; in evaluation (the last
        partial batch is kept) up to ``len(self)``, where a rank's share of the last may be empty.

        A second call abandons the first one's batches.

        Args:
            start: of the first batch.
            levels: where no colours are changed, leave the images uint8, as they travelled.

        Raises:
            UsageError: more images than ``bad_share`` cannot be decoded, or no batch came for ``timeout`` seconds; both
                name the files.
        """
        ...

    def close(self) -> None:
        """Stop the threads; the loader is not used after it."""
        ...


def make_loader(
    config: LoaderConfig,
    catalog: Catalog,
    order: Order,
    augment: Augmentation,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """The loader of ``config.kind``; its packages are imported only here.

    Raises:
        UsageError: this kind does not read such data, or the data does not fit.
    """
    if config.kind in ("auto", "resident"):
        from fasttrain.data.pixels import resident_pixels
        from fasttrain.data.resident import ResidentLoader

        pixels = resident_pixels(config, catalog, order, device)
        if pixels is not None:
            return ResidentLoader(config, catalog, order, augment, pixels, device, rank, world)
    if config.kind == "ffcv" or (config.kind == "auto" and catalog.beton is not None):
        from fasttrain.data.ffcv import FfcvLoader

        return FfcvLoader(config, catalog, order, augment, device, rank, world)
    from fasttrain.data.dali import DaliLoader

    return DaliLoader(config, catalog, order, augment, device, rank, world)
