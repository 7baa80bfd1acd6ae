"""Decode every image of a split once, by the decoder that runs will read it with.

That is DALI's, on the CPU, for image files, and FFCV's for FFCV files. A run then meets no image that cannot be
decoded, unless it is changed meanwhile, or by a GPU, whose decoder may refuse what the CPU's takes (``decoder.py``).
"""

from __future__ import annotations

import functools
import io
import itertools
import multiprocessing
import os
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fasttrain.data import manifest
from fasttrain.data.catalog import Catalog
from fasttrain.data.damage import is_cut
from fasttrain.data.header import header_size
from fasttrain.errors import UsageError
from fasttrain.printable import printable

if TYPE_CHECKING:
    from fasttrain.data.decoder import Decoder

Finding = tuple[int, int] | str
"""(height, width) of an image that decodes, or what speaks against it."""
Found = tuple[Finding, int]
"""A file's finding, and its bytes."""

_CHUNK = 64  # files a task
_TOGETHER = 16  # files that DALI decodes at once,
_PIXELS = 1 << 23  # if they have no more than these together
_KILLER: Found = ("does not decode: the decoder's process dies of it", 0)
_MOST_KILLERS = 20  # beyond, it is not the files


def verify(catalog: Catalog, cache: Path, workers: int | None = None) -> str:
    """Check all of a split, by what it is, and say what was found.

    Every file of an ImageFolder split is decoded, those of an earlier quarantine too, and its manifest written, to the
    cache if the folder is read-only. An FFCV file is held against its hash and decoded. A CIFAR archive was held
    against its checksum when it was opened.

    Args:
        catalog: opened without its manifest.
        cache: :attr:`DataConfig.cache_folder`.
        workers: processes; default, one a core.

    Raises:
        UsageError: DALI is missing, a class without an image that decodes, a wrong hash, no place for the manifest, or
            the decoding processes die of many files (for want of memory, say).
    """
    if catalog.beton is not None:
        from fasttrain.data.beton import verify_beton

        verify_beton(catalog.beton)
        return f"{catalog.summary()}\n  its hash is right, and FFCV decodes all of it"
    if catalog.names is None:
        return f"{catalog.summary()}\n  its checksum is right"
    version, began = _dali_version(), time.perf_counter()
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
    place = printable(path)
    return f"{verified.summary(most=50)}\n  decoded by DALI {version}, {rate:,.0f} images/s\n  manifest: {place}"


def _dali_version() -> str:
    try:
        from fasttrain.data.decoder import VERSION  # DALI: a second to import
    except ImportError as error:
        raise UsageError(
            f"DALI, whose decoder verifies image files, cannot be imported ({error}): install it"
        ) from None
    return VERSION


def inspect(path: str) -> Finding:
    """(height, width) of a file that decodes whole to RGB, or why it does not."""
    ((finding, _),) = _inspect_all([path])
    return finding


def examine(contents: list[np.ndarray]) -> list[Finding]:
    """:func:`inspect` of files' bytes, some twenty at most.

    DALI's decoder decides, and Pillow's word explains; it counts alone where DALI is silent: on damage within a TIFF.
    """
    findings = [_before_decoding(content) for content in contents]
    for group in _groups(findings):
        for n, decoded in zip(group, _decoder().decode([contents[n] for n in group]), strict=True):
            if isinstance(decoded, str):
                word = _pillows_word(contents[n]) or f"DALI's decoder refuses it ({decoded}), Pillow's does not"
                findings[n] = f"does not decode: {word}"
            elif decoded.shape[:2] != findings[n]:
                said, found = (f"{height} x {width}" for height, width in (findings[n], decoded.shape[:2]))
                findings[n] = f"its header says {said} pixels, but it has {found}"
            elif contents[n][:2].tobytes() in (b"II", b"MM") and (word := _pillows_word(contents[n], known=True)):
                findings[n] = f"does not decode: {word}"
    return findings


def _before_decoding(content: np.ndarray) -> Finding:
    """The header's size, or what speaks against the file without decoding it."""
    if not len(content):
        return "empty file"
    try:
        size = header_size(content)
    except ValueError as error:
        return str(error)
    if is_cut(content):
        return f"does not decode: {_pillows_word(content) or 'its end is missing'}"
    if content[:2].tobytes() == b"\x89P" and not _has_right_checksums(content):
        return "does not decode: a checksum of the PNG is wrong"
    return size


def _groups(findings: list[Finding]) -> Iterator[list[int]]:
    """The positions of what remains to be decoded, so many at once as memory may hold."""
    group, pixels = [], 0
    for n, finding in enumerate(findings):
        if isinstance(finding, str):
            continue
        more = finding[0] * finding[1]
        if group and (len(group) == _TOGETHER or pixels + more > _PIXELS):
            yield group
            group, pixels = [], 0
        group.append(n)
        pixels += more
    if group:
        yield group


@functools.cache
def _decoder() -> Decoder:
    """This process's."""
    from fasttrain.data.decoder import Decoder

    return Decoder(_TOGETHER)


def _pillows_word(content: np.ndarray, known: bool = False) -> str | None:
    """What Pillow says against a file, if anything; where it must be ``known``, only of pixels that it can read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is no reason
            Image.open(io.BytesIO(content)).convert("RGB")
    except UnidentifiedImageError:
        return None if known else "neither DALI nor Pillow knows such files"
    except Exception as error:  # Pillow's plugins raise many kinds on garbage
        if known and not isinstance(error, OSError):
            return None
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _has_right_checksums(png: np.ndarray) -> bool:
    """Whether all chunks of a PNG up to its end are as they were written; decoders differ in what they let pass."""
    data, at = memoryview(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at = end + 4
    return False


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


def _inspect_all(paths: list[str]) -> list[tuple[Finding, int]]:
    """What :func:`inspect` finds of each file, and its bytes."""
    found = []
    for first in range(0, len(paths), _TOGETHER):
        contents = [_read(path) for path in paths[first : first + _TOGETHER]]
        findings = iter(examine([content for content in contents if not isinstance(content, str)]))
        found += [(c, 0) if isinstance(c, str) else (next(findings), len(c)) for c in contents]
    return found


def _read(path: str) -> np.ndarray | str:
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _map(function: Callable[[list[str]], list[Found]], chunks: Iterable[list[str]], workers: int | None) -> Iterator:
    """``function`` of every chunk of paths, in order, by processes. A file that kills its process is found and told."""
    left, killers = deque(chunks), 0
    while left:
        pool = _pool(workers or len(os.sched_getaffinity(0)))
        try:
            for found in pool.map(function, list(left)):
                left.popleft()
                yield found
        except BrokenProcessPool:  # by a file of this chunk, or of one that another process was at
            found = _alone(function, left.popleft())
            killers += found.count(_KILLER)
            if killers > _MOST_KILLERS:
                raise UsageError(
                    f"decoding was killed at {killers} files, perhaps for want of memory: lower workers"
                ) from None
            yield found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _alone(function: Callable[[list[str]], list[Found]], paths: list[str]) -> list[Found]:
    """``function`` of paths in a process of their own; where that is killed, of their halves, down to the one file."""
    pool = _pool(1)
    try:
        return pool.submit(function, paths).result()
    except BrokenProcessPool:
        if len(paths) == 1:
            return [_KILLER]
    finally:
        pool.shutdown(wait=False)
    middle = len(paths) // 2
    return _alone(function, paths[:middle]) + _alone(function, paths[middle:])


def _pool(workers: int) -> ProcessPoolExecutor:
    # A fork server: its workers start at once, and without copies of this process's threads, which would be half dead.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fasttrain.data.decoder"])
    return ProcessPoolExecutor(workers, context, initializer=_silence)


def _silence() -> None:
    """No word from the decoders' C libraries, which print for each bad file: what is found is told in the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


__all__ = ["examine", "inspect", "verify"]
