"""Images of a catalogue as evaluations see them, and their features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from fasttrain import distributed
from fasttrain.data import Batch
from fasttrain.data.augment import AugmentConfig, CentreCrop
from fasttrain.data.catalog import Catalog
from fasttrain.data.loader import LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.evaluation.features import Features, extract
from fasttrain.evaluation.finite import check_features, reason
from fasttrain.evaluation.watching import watched
from fasttrain.models import Encoder
from fasttrain.stop import heeded, until_stopped


def catalog_features(
    encoder: Encoder,
    catalog: Catalog,
    indices: np.ndarray,
    batch: int,
    augment: AugmentConfig,
    loader: LoaderConfig,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Features:
    """This rank's share of the features of ``indices``, seen through the evaluation crop.

    Raises:
        NotFinite: some are not, and why.
    """

    def encoded(chosen: np.ndarray, dtype: torch.dtype | None) -> Features:
        with evaluation_batches(catalog, chosen, batch, augment, loader, device) as batches:
            count = -(-len(chosen) // (batch * distributed.world_size()))
            return extract(encoder, watched(batches, f"{catalog.split} features", count), device, dtype)

    found = encoded(indices, autocast)
    check_features(f"{catalog.split} images", found, partial(why_not_finite, encoder, autocast, encoded))
    return found


def why_not_finite(
    encoder: Encoder,
    autocast: torch.dtype | None,
    encoded: Callable[[np.ndarray, torch.dtype | None], Features],
    images: list[int],
) -> str:
    """Why the features of these images are not finite; all ranks together, ``encoded`` giving those in a precision."""

    def finite_in_fp32() -> bool:
        again = encoded(np.asarray(images), None)
        return not distributed.any_rank(not bool(again.features.isfinite().all()))

    return reason(encoder, autocast, finite_in_fp32)


@contextmanager
def evaluation_batches(
    catalog: Catalog,
    indices: np.ndarray,
    batch: int,
    augment: AugmentConfig,
    loader: LoaderConfig,
    device: torch.device,
) -> Iterator[Iterator[Batch]]:
    """This rank's share of ``indices``, in order, ``batch`` images at a time, seen through the evaluation crop.

    Ranks have equally many batches, the last of which may be empty; a signal ends them early (:class:`Stopped`).
    """
    rank, world = distributed.rank(), distributed.world_size()
    order = Order(indices, seed=0, batch=batch * world, shuffle=False, drop_last=False)
    reader = make_loader(loader, catalog, order, CentreCrop(augment), device, rank, world)
    try:
        yield until_stopped(reader.iterate())
    finally:
        reader.close()


@contextmanager
def own_batches(
    catalog: Catalog,
    indices: np.ndarray,
    batch: int,
    augment: AugmentConfig,
    loader: LoaderConfig,
    device: torch.device,
) -> Iterator[Iterator[Batch]]:
    """All of ``indices``, in order, on this rank alone, ``batch`` images at a time, seen through the evaluation crop.

    A signal to this rank ends them early (:class:`Stopped`); nothing here waits for another rank.
    """
    order = Order(indices, seed=0, batch=batch, shuffle=False, drop_last=False)
    reader = make_loader(loader, catalog, order, CentreCrop(augment), device)
    try:
        yield heeded(reader.iterate())
    finally:
        reader.close()


def chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """``indices`` in order, ``size`` at a time: the same images meet in a batch whatever the number of ranks."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def thin(indices: np.ndarray, most: int | None) -> np.ndarray:
    """At most ``most`` of ``indices``, evenly spaced: of a listing sorted by class, as many of each class."""
    if most is None or most >= len(indices):
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]
