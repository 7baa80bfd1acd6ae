"""Our loaders beside others that decode, crop, flip and colour the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
import torch
from pydantic import Field

from fasttrain.benchmarks.loader_peers import Peer, PeerName, importable, numba_as_it_is, reason
from fasttrain.benchmarks.loader_work import Epoch, Work
from fasttrain.benchmarks.timing import Report, alternate, table
from fasttrain.config import Config, PathText
from fasttrain.data.augment import AugmentConfig, SimCLR
from fasttrain.data.catalog import DataConfig, open_catalog
from fasttrain.data.loader import LoaderConfig, make_loader
from fasttrain.data.order import Order
from fasttrain.errors import UsageError

Kind = Literal["resident", "dali", "ffcv"]


class LoaderBenchConfig(Config):
    """What to load, by whom."""

    batch: int = Field(128, ge=1)
    "images a batch"
    batches: int = Field(20, ge=1)
    "batches a round"
    loaders: tuple[Kind, ...] = ()
    "ours; none given: loader.kind's, and where that is auto all that the data allows"
    peers: tuple[PeerName, ...] = get_args(PeerName)
    "others, of those that can be imported"
    beton: PathText | None = None
    "an FFCV file of the same images, for FFCV's loader and ours; null: data.root where that is one"
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = LoaderConfig()


def compare_loaders(config: LoaderBenchConfig, rounds: int) -> Iterator[Report]:
    """Images (not views) a second of everyone with all of the augmentation, and with crop and flip alone.

    A round is an epoch of the same images, in as large batches, by as many threads or worker processes, until the views
    lie on the device. Who cannot be imported, or cannot do the work, is left out and named. Yields after every round.

    Raises:
        UsageError: ``loader.kind`` names a loader that cannot do it, ``beton`` is of other images, or nobody is left.
    """
    with ExitStack() as closing:
        work = _work(config, Path(closing.enter_context(TemporaryDirectory(prefix="fasttrain-bench-"))))
        closing.enter_context(numba_as_it_is())
        runs: dict[str, Callable[[], int]] = {}
        closing.callback(runs.clear)  # the threads and processes of others end with them
        gives: dict[str, str] = {}
        peers, missing = importable(config.peers)
        for name, build, needed in _candidates(config, work, peers, closing):
            try:
                runs[name], gives[name] = _contestant(build, config.augment, work.device)
            except Exception as error:
                if needed:
                    raise
                missing[reason(error)].append(name)
        absent = [f"{'; '.join(names)}: left out, {why}" for why, names in missing.items()]
        if not runs:
            raise UsageError("; ".join(["nobody can load this", *absent]))
        for timings in alternate(runs, rounds):
            rows = [timing._asdict() | {"gives": gives[timing.name]} for timing in timings]
            lines = [table(timings, "images", gives), "", *(f"- {line}" for line in absent)]
            yield Report("\n".join(lines).rstrip(), rows, {timing.name: timing.rate for timing in timings}, "images/s")


def _work(config: LoaderBenchConfig, scratch: Path) -> Work:
    """The images of all contestants, drawn at random."""
    whole = open_catalog(config.data.model_copy(update={"share": 1.0}), "train")
    beton = whole if whole.beton else None
    if config.beton is not None:
        at = {"root": config.beton, "train": None, "share": 1.0, "by_content": False}
        beton = open_catalog(config.data.model_copy(update=at), "train")
        if beton.beton is None or beton.fingerprint != whole.fingerprint:
            raise UsageError(f"beton={config.beton} is no FFCV file of '{whole.root}': write it with launch/prepare.py")
    usable = whole.thinned(config.data.share).indices
    count = min(len(usable), config.batch * config.batches)
    ids = np.sort(np.random.default_rng(0).choice(usable, count, replace=False))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    catalog = replace(whole, indices=ids, fingerprint="")
    return Work(catalog, config.batch, config.loader.thread_count(), device, scratch, beton)


def _candidates(
    config: LoaderBenchConfig, work: Work, peers: Iterable[Peer], closing: ExitStack
) -> Iterator[tuple[str, Callable[[], Epoch], bool]]:
    """Each one's name, how to build it, and whether that must succeed."""
    asked = () if config.loader.kind == "auto" else (config.loader.kind,)
    plain = config.augment.model_copy(update={"jitter_p": 0.0, "grey": 0.0, "blur": 0.0, "solarise": 0.0})
    for extent, augment in {"all": config.augment, "crop and flip": plain}.items():
        for kind in config.loaders or asked or get_args(Kind):
            needed = not config.loaders and kind in asked
            yield f"fasttrain {kind}, {extent}", partial(_ours, config.loader, kind, work, augment, closing), needed
        for peer in peers:
            yield f"{peer.title}, {extent}", partial(peer.build, work, augment), False


def _ours(config: LoaderConfig, kind: Kind, work: Work, augment: AugmentConfig, closing: ExitStack) -> Epoch:
    loader = LoaderConfig(**config.model_dump() | {"kind": kind})
    catalog = work.require_beton() if kind == "ffcv" else work.catalog
    order = Order(work.catalog.indices, 0, work.batch, drop_last=False)
    reader = make_loader(loader, catalog, order, SimCLR(augment, 0), work.device)
    closing.callback(reader.close)
    return lambda: (batch.images for batch in reader.iterate(levels=True))


def _contestant(
    build: Callable[[], Epoch], augment: AugmentConfig, device: torch.device
) -> tuple[Callable[[], int], str]:
    """How it goes through an epoch, and what its views are.

    Raises:
        UsageError: they are not as many, or not as large, as they should be.
    """
    epoch = build()
    views = next(iter(epoch()), ())
    shapes = [tuple(view.shape[1:]) for view in views]
    if shapes != [(3, augment.size, augment.size)] * augment.views:
        raise UsageError(f"its first batch has views of {shapes}")
    return partial(_go_through, epoch, device), str(views[0].dtype).removeprefix("torch.")


def _go_through(epoch: Epoch, device: torch.device) -> int:
    images = sum(len(views[0]) for views in epoch())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images
