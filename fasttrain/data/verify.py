"""Decode every image of a split once, so that no run meets one that cannot be decoded."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fasttrain.data import manifest
from fasttrain.data.catalog import FORMATS, Catalog
from fasttrain.data.damage import PNG_END
from fasttrain.errors import UsageError
from fasttrain.printable import printable

S, T = TypeVar("S"), TypeVar("T")

_CHUNK = 64  # files a task


def verify(catalog: Catalog, cache: Path, workers: int | None = None) -> str:
    """Check all of a split, by what it is, and say what was found.

    Every file of an ImageFolder split is decoded, those of an earlier quarantine too, and its manifest written, to the
    cache if the folder is read-only. An FFCV file is held against its hash. A CIFAR archive was when it was opened.

    Args:
        catalog: opened without its manifest.
        cache: :attr:`DataConfig.cache_folder`.
        workers: processes; default, one a core.

    Raises:
        UsageError: a class without an image that decodes, a wrong hash, no place for the manifest, or the decoding
            processes die (for want of memory, say).
    """
    if catalog.beton is not None:
        from fasttrain.data.beton import verify_beton

        verify_beton(catalog.beton)
        return f"{catalog.summary()}\n  its hash is right"
    if catalog.names is None:
        return f"{catalog.summary()}\n  its checksum is right"
    began = time.perf_counter()
    sizes, nbytes, excluded = _inspect_listing(catalog, workers)
    names = catalog.names
    found = manifest.Manifest(
        names.digest(),
        catalog.classes,
        excluded,
        *sizes.T.tolist(),
        nbytes=nbytes.tolist(),
        names=list(names),
        by_content=catalog.by_content,
    )
    path = manifest.save(found, catalog.root, cache)
    rate = len(sizes) / (time.perf_counter() - began)
    verified = catalog.without({index: reason for index, _, reason in excluded})
    return f"{verified.summary(most=50)}\n  manifest: {printable(path)} ({rate:,.0f} images/s)"


def inspect(path: str) -> tuple[int, int] | str:
    """(height, width) of a file that decodes whole to RGB, or why it does not."""
    try:
        return examine(Path(path).read_bytes())
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def examine(data: bytes) -> tuple[int, int] | str:
    """:func:`inspect` of a file's bytes."""
    if not data:
        return "empty file"
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # odd metadata is no reason
            image.convert("RGB")  # decodes; a truncated file raises here
            size = image.height, image.width
            if image.format == "PNG":  # Pillow stops at the last pixel; other decoders want checksums and the end
                Image.open(io.BytesIO(data)).verify()
                if PNG_END not in data:
                    return "does not decode: the PNG's end is missing"
    except UnidentifiedImageError:
        return f"wrong format: begins with {data[:16]!r}"
    except Exception as error:  # Pillow's plugins raise many kinds on garbage
        return f"does not decode: {' '.join(str(error).split()) or type(error).__name__}"
    return size


def _inspect_listing(
    catalog: Catalog, workers: int | None
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str, str]]]:
    """Sizes [full, 2], bytes [full], and (position, name, reason) of what does not decode."""
    full = len(catalog.labels)
    sizes, nbytes, excluded = np.zeros((full, 2), np.int32), np.zeros(full, np.int64), []
    chunks = (
        [catalog.path(index) for index in range(first, min(first + _CHUNK, full))] for first in range(0, full, _CHUNK)
    )
    findings = itertools.chain.from_iterable(_map(_inspect_all, chunks, workers))
    # disable=None: no bar where there is no terminal
    bar = tqdm(findings, f"verify {catalog.split}", total=full, unit=" images", disable=None)
    for index, (finding, length) in enumerate(bar):
        if isinstance(finding, str):
            excluded.append((index, catalog.names[index], finding))
        else:
            sizes[index], nbytes[index] = finding, length
    return sizes, nbytes, excluded


def _inspect_all(paths: list[str]) -> list[tuple[tuple[int, int] | str, int]]:
    """What ``inspect`` finds of each file, and its bytes."""
    return [(inspect(path), os.path.getsize(path) if os.path.exists(path) else 0) for path in paths]


def _map(function: Callable[[S], T], items: Iterable[S], workers: int | None) -> Iterator[T]:
    # A fork server: its workers start at once, and without copies of this process's threads, which would be half dead.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), context)
    try:
        yield from pool.map(function, items)
    except BrokenProcessPool:
        raise UsageError("a decoding process was killed, perhaps for want of memory: lower workers") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


__all__ = ["examine", "inspect", "verify"]
