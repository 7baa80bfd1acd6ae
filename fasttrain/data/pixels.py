"""A split's decoded images in memory: whether they fit, how they get there, and who shares them.

They are decoded once, by DALI or (a .beton) FFCV, into memory that all processes of the host share
(``shared_memory.py``), and on a GPU copied there. What does not decode is bad, as for the other loaders.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from fasttrain import distributed
from fasttrain.data.damage import is_cut
from fasttrain.data.header import header_size
from fasttrain.data.prefetch import Workers
from fasttrain.data.shared_memory import free_memory, host_memory, shared
from fasttrain.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fasttrain.data.catalog import Catalog
    from fasttrain.data.loader import LoaderConfig
    from fasttrain.data.order import Order

_CHUNK = 32  # images that are read or decoded together
_SAMPLED = 64  # files whose headers tell how large the others are, where no manifest does
_CHANGED = "an image has another size than its header said"


class Pixels(NamedTuple):
    """A split's decoded images, one after the other."""

    data: Tensor  # uint8 [bytes], on the device
    host: Tensor  # the same in the host's memory, where other processes find it as long as this one has it
    starts: np.ndarray  # [full] int64, of image i's [H, W, 3] in data
    sizes: np.ndarray  # [full, 2] int32 (height, width)
    ids: np.ndarray  # [n] of the images that are there
    bad: dict[int, str]  # id -> complaint, of those that do not decode
    state: bytes  # of the files, when they were decoded


def resident_pixels(config: LoaderConfig, catalog: Catalog, order: Order, device: torch.device) -> Pixels | None:
    """The decoded images of ``order``, and in training of the whole split if that fits; made if nobody here has them.

    With ``kind=auto``: None where they do not fit, and of files that are gone through but once, in evaluation.

    Raises:
        UsageError: ``kind=resident`` and they do not fit; no image was decoded for ``timeout`` seconds.
    """
    auto = config.kind == "auto"
    if auto and catalog.pixels is None and not order.drop_last:
        return None
    for ids in (catalog.indices, order.indices) if order.drop_last or catalog.pixels is not None else (order.indices,):
        state = file_state(catalog, ids)
        key = _digest(os.fsencode(catalog.root), catalog.fingerprint.encode(), ids.tobytes(), state)
        if (key, device) in _kept:
            return _kept[key, device]
        needed = _decoded_bytes(config, catalog, ids)
        if not (lack := _lack(needed, config.resident_share, device)):
            pixels = _of_arrays(catalog) if catalog.pixels is not None else _of_files(config, catalog, ids, key, state)
            return _keep(key, pixels, catalog, config.resident_share, device, said=order.drop_last)
    if auto:
        return None
    raise UsageError(
        f"loader.kind=resident: the {len(ids):,} images of '{catalog.root}' take {_size(needed)} when decoded, and "
        f"{lack}: make room, or set loader.kind=auto"
    )


def file_state(catalog: Catalog, ids: np.ndarray) -> bytes:
    """A digest of how large the files are and when they were last written."""
    if catalog.pixels is not None:
        return b""
    paths = [catalog.beton] if catalog.beton is not None else [catalog.path(int(index)) for index in ids]
    found = np.zeros((len(paths), 2), np.int64)
    for row, path in enumerate(paths):
        try:
            status = os.stat(path)
            found[row] = status.st_size, status.st_mtime_ns
        except OSError:
            pass  # it counts as empty
    return _digest(found.tobytes()).encode()


# Whether they fit --------------------------------------------------------------------------------------------------


def _decoded_bytes(config: LoaderConfig, catalog: Catalog, ids: np.ndarray) -> int:
    """Bytes of the decoded images; where no manifest knows their sizes, as a few files' headers have it."""
    pixels = catalog.sizes[ids].astype(np.int64).prod(axis=1)
    if not pixels.all():
        sampled = ids[np.linspace(0, len(ids) - 1, min(_SAMPLED, len(ids))).astype(int)]
        sizes, decoding = np.zeros((len(catalog.sizes), 2), np.int32), _FileDecoding(catalog)
        _in_chunks(config, catalog, sampled, "sizes of", lambda chunk: decoding.measure(chunk, sizes))
        pixels = sizes[sampled].astype(np.int64).prod(axis=1)
        return int(3 * len(ids) * pixels.sum() / max(1, np.count_nonzero(pixels)))
    return 3 * int(pixels.sum())


def _lack(needed: int, share: float, device: torch.device) -> str | None:
    """Why there is no room for so many bytes; None where there is."""
    rooms = [("the memory of this host or container", host_memory(), free_memory())]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own
        rooms.append(("the GPU's memory", total, free + unused))
    for name, total, free in rooms:
        if needed > share * total:
            return f"loader.resident_share={share:g} of {name} ({_size(total)}) is {_size(share * total)}"
        if needed > free:
            return f"of {name} {_size(free)} are free"
    return None


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


# How they get there ------------------------------------------------------------------------------------------------

_kept: dict[tuple[str, torch.device], Pixels] = {}  # the oldest first


def _keep(key: str, pixels: Pixels, catalog: Catalog, share: float, device: torch.device, said: bool) -> Pixels:
    """Put ``pixels`` on the device and among what this process has; the oldest gives way."""
    room = share * host_memory() - pixels.data.nbytes
    while _kept and sum(other.data.nbytes for other in _kept.values()) > room:
        del _kept[next(iter(_kept))]
    _kept[key, device] = pixels._replace(data=pixels.data.to(device))
    if said:
        distributed.say(
            f"loader: resident, {len(pixels.ids):,} images of {catalog.root} ({_size(pixels.data.nbytes)}) are kept "
            f"decoded in {'the GPU' if device.type == 'cuda' else 'memory'}"
        )
    return _kept[key, device]


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _of_arrays(catalog: Catalog) -> Pixels:
    """Of a data set that is decoded already: nothing is copied."""
    count = len(catalog.pixels)
    starts = np.arange(count, dtype=np.int64) * catalog.pixels[:1].size
    data = torch.from_numpy(np.ascontiguousarray(catalog.pixels).reshape(-1))
    return Pixels(data, data, starts, catalog.sizes, catalog.indices, {}, b"")


def _of_files(config: LoaderConfig, catalog: Catalog, ids: np.ndarray, key: str, state: bytes) -> Pixels:
    def fill(allocate: Callable[[int], np.ndarray]) -> bytes:
        decoding = _BetonDecoding(catalog) if catalog.beton is not None else _FileDecoding(catalog)
        sizes, starts = catalog.sizes.copy(), np.zeros(len(catalog.sizes), np.int64)
        unknown = ids[catalog.sizes[ids].prod(axis=1) == 0]
        _in_chunks(config, catalog, unknown, "sizes of", lambda chunk: decoding.measure(chunk, sizes))
        nbytes = 3 * sizes[ids].astype(np.int64).prod(axis=1)
        starts[ids] = np.cumsum(nbytes) - nbytes
        data = allocate(max(1, int(nbytes.sum())))  # all may be bad
        _in_chunks(config, catalog, ids, "decode", lambda chunk: decoding.decode(chunk, sizes, starts, data))
        found = sorted(decoding.bad.items())
        bad, told = np.array([index for index, _ in found], np.int64), np.array([reason for _, reason in found], "U")
        stream = io.BytesIO()
        np.savez(stream, starts=starts, sizes=sizes, bad=bad, told=told)
        return stream.getvalue()

    data, extra = shared(key, fill)
    kept = np.load(io.BytesIO(extra))
    bad = dict(zip(kept["bad"].tolist(), kept["told"].tolist(), strict=True))
    return Pixels(torch.from_numpy(data), torch.from_numpy(data), kept["starts"], kept["sizes"], ids, bad, state)


def _in_chunks(
    config: LoaderConfig, catalog: Catalog, ids: np.ndarray, doing: str, work: Callable[[np.ndarray], None]
) -> None:
    """``work`` on all ``ids``, a few at a time, in threads, with a bar.

    Raises:
        UsageError: nothing was done for ``timeout`` seconds; it names the files.
    """
    workers = Workers(config.threads or len(os.sched_getaffinity(0)))  # the host's other ranks wait meanwhile
    chunks = [ids[first : first + _CHUNK] for first in range(0, len(ids), _CHUNK)]
    running = [workers.submit(work, chunk) for chunk in chunks]
    # disable=None: no bar where there is no terminal
    with tqdm(total=len(ids), desc=f"{doing} {catalog.split}", unit=" images", disable=None, leave=False) as bar:
        for chunk, future in zip(chunks, running, strict=True):
            try:
                future.result(config.timeout)
            except FutureTimeout:
                raise UsageError(
                    f"no image for {config.timeout:g} s while reading '{catalog.path(int(chunk[0]))}' and those after "
                    "it: check that the disk or network mount answers, or raise the loader's timeout"
                ) from None
            bar.update(len(chunk))
    workers.close()


class _Decoding(Protocol):
    """How images get from a split into memory; several threads at once call both functions, for other images each."""

    bad: dict[int, str]  # id -> complaint

    def measure(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Fill in the ``sizes`` of ``ids``, or say what is bad."""
        ...

    def decode(self, ids: np.ndarray, sizes: np.ndarray, starts: np.ndarray, data: np.ndarray) -> None:
        """Fill in the pixels of ``ids`` in ``data``, or say what is bad."""
        ...


class _FileDecoding(_Decoding):
    """Image files, by DALI's decoder."""

    def __init__(self, catalog: Catalog) -> None:
        self.bad, self._catalog, self._threads = {}, catalog, threading.local()

    def measure(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        for index in ids.tolist():
            if (content := self._read(index)) is not None:
                sizes[index] = header_size(content)

    def decode(self, ids: np.ndarray, sizes: np.ndarray, starts: np.ndarray, data: np.ndarray) -> None:
        from fasttrain.data.decoder import Decoder
        from fasttrain.data.verify import examine

        if not hasattr(self._threads, "decoder"):
            self._threads.decoder = Decoder(_CHUNK)
        read = [(index, self._read(index)) for index in ids.tolist() if index not in self.bad]
        sound = [(index, content) for index, content in read if content is not None]
        decoded = self._threads.decoder.decode([content for _, content in sound]) if sound else []
        for (index, content), pixels in zip(sound, decoded, strict=True):
            if isinstance(pixels, str):
                (finding,) = examine([content])
                self._complain(index, finding if isinstance(finding, str) else pixels)
            elif pixels.shape[:2] != tuple(sizes[index]):
                self._complain(index, _CHANGED)
            else:
                data[starts[index] : starts[index] + pixels.size] = pixels.reshape(-1)

    def _read(self, index: int) -> np.ndarray | None:
        try:
            content = self._catalog.read(index)
            if not len(content):
                raise ValueError("empty file")
            header_size(content)
            if is_cut(content):
                raise ValueError("truncated: its end is missing")
            return content
        except (OSError, ValueError) as error:
            return self._complain(index, getattr(error, "strerror", None) or error)

    def _complain(self, index: int, reason: object) -> None:
        self.bad[index] = f"cannot decode '{self._catalog.path(index)}' ({reason})"


class _BetonDecoding(_Decoding):
    """An FFCV file, by FFCV's decoder."""

    def __init__(self, catalog: Catalog) -> None:
        from fasttrain.data.beton import open_beton

        self.bad, self._beton = {}, open_beton(catalog.beton)

    def measure(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Its tables have all sizes."""

    def decode(self, ids: np.ndarray, sizes: np.ndarray, starts: np.ndarray, data: np.ndarray) -> None:
        from fasttrain.data.beton import decode_samples

        samples = self._beton.samples[np.searchsorted(self._beton.samples["id"], ids)]
        sound = decode_samples(self._beton.data, samples, starts[ids], data)
        for index in ids[~sound].tolist():
            self.bad[index] = f"'{self._beton.path}' is damaged: sample {index} does not decode"


__all__ = ["Pixels", "file_state", "resident_pixels"]
