"""The contents of a batch at once: read, and looked at, by compiled code that does not hold the interpreter's lock.

::

    rows(ids) ── memory, a row a sample ── read(part), by several threads ── Rows.together()
                 `─ zeros behind a file    `─ open, read, close, header, end  `─ [B, L] or a list

Only what is certainly right is taken here: a JPEG or PNG as long as it was known to be, which ends as it should and
whose header the definitions of :mod:`~fasttrain.data.header` let pass. All else is left to ``Catalog.read``,
:func:`~fasttrain.data.header.header_size` and :func:`~fasttrain.data.damage.is_cut`, which say what is wrong with it.

Decoders end at a file's end marker, so a batch can be one array whose rows are as long as its longest file. Zeros stand
behind a file: 6,000 damaged JPEGs and PNGs were decoded, or refused, as they were without; with end markers behind them
five were not.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numba
import numpy as np

from fasttrain.data.catalog import Catalog
from fasttrain.data.damage import PNG_END
from fasttrain.data.header import MOST_PIXELS

_ROW = 1 << 15  # bytes: rows no longer than it are padded whatever the batch's mean
_LONGEST_PATH = 4096  # Linux's PATH_MAX
_FLAGS = os.O_RDONLY | os.O_CLOEXEC


class Rows(NamedTuple):
    """What a batch's contents are read into: of files, file n at ``memory[starts[n]:][:lengths[n]]``."""

    memory: np.ndarray  # uint8: files' bytes, or pixels [B, H, W, 3]
    starts: np.ndarray  # [B] int64
    lengths: np.ndarray  # [B] int64; 0 where it is left to Catalog.read
    sizes: np.ndarray  # [B, 2] int32 (height, width), of what was read
    done: np.ndarray  # [B] bool: what was, so far
    width: int | None = None  # of a row, where all are of one

    def together(self) -> np.ndarray | list[np.ndarray]:
        """All in one array, files' padded to uint8 [B, L]; a list where that would waste memory."""
        if self.memory.ndim > 1:
            return self.memory
        return self.apart() if self.width is None else self.memory.reshape(-1, self.width)

    def apart(self) -> list[np.ndarray]:
        if self.memory.ndim > 1:
            return list(self.memory)
        return [self.memory[start : start + length] for start, length in zip(self.starts, self.lengths, strict=True)]


class Contents:
    """What a catalogue's samples hold, a batch at a time. Of a catalogue that is no other here, none is known."""

    def rows(self, ids: np.ndarray) -> Rows:
        """Memory for the batch ``ids``."""
        count = len(ids)
        starts, lengths, sizes = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros((count, 2), np.int32)
        return Rows(np.zeros(0, np.uint8), starts, lengths, sizes, np.zeros(count, np.bool_))

    def read(self, ids: np.ndarray, rows: Rows, part: slice) -> np.ndarray:
        """Fill ``part`` of the rows, on the calling thread; the places that are left to ``Catalog.read``."""
        return np.arange(part.start, part.stop)

    def learn(self, index: int, content: np.ndarray) -> None:
        """``Catalog.read`` gave this, and it is sound: have it read here the next time, if it is one for here."""

    def forget(self, index: int) -> None:
        """Leave a sample to ``Catalog.read`` the next time."""


class Arrays(Contents):
    """Decoded images in memory."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    def rows(self, ids: np.ndarray) -> Rows:
        _, *shape = self._pixels.shape
        sizes = np.full((len(ids), 2), shape[:2], np.int32)
        return super().rows(ids)._replace(memory=np.empty((len(ids), *shape), np.uint8), sizes=sizes)

    def read(self, ids: np.ndarray, rows: Rows, part: slice) -> np.ndarray:
        np.take(self._pixels, ids[part], axis=0, out=rows.memory[part], mode="clip")  # else by way of a buffer
        rows.done[part] = True
        return np.zeros(0, np.int64)


class Files(Contents):
    """Files whose lengths are known: from the manifest, or because they were read before."""

    def __init__(self, catalog: Catalog) -> None:
        self._root = np.frombuffer(os.fsencode(os.path.join(catalog.root, "")), np.uint8)
        self._names, self._ends = np.frombuffer(catalog.names.block, np.uint8), catalog.names.ends
        self._lengths = np.zeros(len(catalog.names), np.int64)
        if catalog.nbytes is not None:
            self._lengths[:] = catalog.nbytes
        none = np.zeros(0, np.int64)
        self.read(none, self.rows(none), slice(0, 0))  # compiles: seconds, the first time ever

    def rows(self, ids: np.ndarray) -> Rows:
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths + 1)  # a byte more shows that a file ends where it should
        width = int(lengths.max(initial=0)) + 1
        padded = len(ids) * width <= max(2 * ends[-1:].sum(), len(ids) * _ROW)
        starts = np.arange(len(ids)) * width if padded else ends - lengths - 1
        memory = np.empty(len(ids) * width if padded else ends[-1], np.uint8)
        unread = super().rows(ids)
        return unread._replace(memory=memory, starts=starts, lengths=lengths, width=width if padded else None)

    def read(self, ids: np.ndarray, rows: Rows, part: slice) -> np.ndarray:
        _read(self._root, self._names, self._ends, ids, part.start, part.stop, *rows[:5])
        left = part.start + np.flatnonzero(~rows.done[part])
        self._lengths[ids[left]] = 0
        return left

    def learn(self, index: int, content: np.ndarray) -> None:
        self._lengths[index] = len(content) if _look(content)[0] else 0

    def forget(self, index: int) -> None:
        self._lengths[index] = 0


def contents_of(catalog: Catalog) -> Contents:
    if not isinstance(catalog, Catalog):
        return Contents()
    return Files(catalog) if catalog.names is not None else Arrays(catalog.pixels)


# Compiled ----------------------------------------------------------------------------------------------------------

_int32, _word, _pointer = numba.types.int32, numba.types.intp, numba.types.uintp
_open = numba.types.ExternalFunction("open", _int32(_pointer, _int32))  # libc's, by its linker symbol
_read_bytes = numba.types.ExternalFunction("read", _word(_int32, _pointer, _pointer))
_close = numba.types.ExternalFunction("close", _int32(_int32))
_jit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_jit
def _read(root, names, ends, ids, first, last, memory, starts, lengths, sizes, done):
    path = np.zeros(_LONGEST_PATH, np.uint8)
    path[: min(len(root), _LONGEST_PATH)] = root[:_LONGEST_PATH]
    for n in range(first, last):
        begin, end = ends[ids[n]], ends[ids[n] + 1]
        long = len(root) + end - begin
        if lengths[n] == 0 or long >= _LONGEST_PATH:
            continue
        path[len(root) : long] = names[begin:end]
        path[long] = 0
        start, stop = starts[n], starts[n + 1] if n + 1 < len(starts) else len(memory)
        if not _read_file(path, memory[start : start + lengths[n] + 1]):
            continue
        memory[start + lengths[n] : stop] = 0
        sizes[n, 0], sizes[n, 1] = _look(memory[start : start + lengths[n]])
        done[n] = sizes[n, 0] > 0


@_jit
def _read_file(path, memory):
    """Whether the file has one byte less than ``memory``, which it is read into."""
    file = _open(path.ctypes.data, _FLAGS)
    if file < 0:
        return False
    found = _read_bytes(file, memory.ctypes.data, len(memory))
    _close(file)
    return found == len(memory) - 1


@_jit
def _look(data):
    """(height, width) of a JPEG or PNG that is whole, for all that its header and its end say; else (0, 0)."""
    height, width = 0, 0
    if len(data) > 32:
        end = len(data)
        if _has(data, 0, b"\xff\xd8\xff") and _has(data, end - 2, b"\xff\xd9"):
            height, width = _jpeg(data)
        if _has(data, 0, b"\x89PNG\r\n\x1a\n") and _has(data, 12, b"IHDR") and _has(data, end - 8, PNG_END):
            height, width = _number(data, 20, 4), _number(data, 16, 4)
    sound = height <= MOST_PIXELS and width <= MOST_PIXELS and 0 < height * width <= MOST_PIXELS
    return (height, width) if sound else (0, 0)


@_jit
def _jpeg(data):
    """As header.py reads it; four colours are left to that."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if data[position + 4] != 8 or data[position + 9] == 4:
                break
            return _number(data, position + 5, 2), _number(data, position + 7, 2)
        if marker == 0xD8 or marker == 0xD9 or marker == 0xDA:
            break
        position += 1 if marker == 0xFF else 2 + _number(data, position + 2, 2)
    return 0, 0


@_jit
def _has(data, at, text):
    for i in range(len(text)):  # noqa: SIM110  (a generator does not compile)
        if data[at + i] != text[i]:
            return False
    return True


@_jit
def _number(data, at, size):
    number = 0
    for i in range(size):
        number = number << 8 | data[at + i]
    return number


__all__ = ["Arrays", "Contents", "Files", "Rows", "contents_of"]
