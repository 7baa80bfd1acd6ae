"""What a folder of images holds: the images in torchvision's order, and how much of what else.

Nothing is passed over without being counted: files by their ending, and what programs leave among images by its name.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from fasttrain.data import manifest
from fasttrain.errors import UsageError

T = TypeVar("T")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's

SIGNATURES = {  # how files of the formats that the loaders decode begin
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "BMP": rb"BM.{4}\0{4}",
    "PPM": rb"P[1-6]\s+[\d#]",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "WEBP": rb"RIFF.{4}WEBP",
}
_IMAGE = re.compile(b"|".join(SIGNATURES.values()), re.DOTALL)
_BEGINNING = 16  # bytes that the longest of them takes, and some

TOOLS = {  # in lower case: folders and files that programs leave among images. What begins with a dot is hidden anyway.
    *("@eadir", "#recycle", "#snapshot"),  # Synology
    *("@recycle", "@recently-snapshot"),  # QNAP
    *("$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),  # Windows
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("lost+found", "~snapshot", "__pycache__"),
}

_SHOWN = 8  # kinds of what is left that are told apart

THREADS = 16  # a scan waits for the file system, not for a core


@dataclass
class Rest:
    """What a listing left where it lies."""

    unread: Counter[str] = field(default_factory=Counter)  # files, by ending
    aside: Counter[str] = field(default_factory=Counter)  # tools' and hidden files and folders, by name
    first: dict[str, str] = field(default_factory=dict)  # ending -> the path of one such file

    def leave(self, path: str) -> None:
        """Count a file that is not read."""
        ending = _ending(path)
        self.unread[ending] += 1
        self.first.setdefault(ending, path)

    def leave_loose(self, path: str) -> None:
        """Count an image that has no class."""
        self.unread[f"{_ending(path)} beside the class folders"] += 1

    def add(self, other: Rest) -> None:
        self.unread.update(other.unread)
        self.aside.update(other.aside)
        self.first = other.first | self.first

    def of_images(self) -> list[str]:
        """Of the commonest endings those of which a file begins like an image; one file an ending is looked into."""
        commonest = (ending for ending, _ in _commonest(self.unread)[:_SHOWN])
        return [ending for ending in commonest if ending in self.first and begins_like_an_image(self.first[ending])]

    def __str__(self) -> str:
        parts = []
        if self.unread:
            parts.append(f"left unread: {_files(self.unread.total())}: {_few_of(self.unread)}")
        if self.aside:
            parts.append(f"left out as hidden or a tool's: {_few_of(self.aside)}")
        return "; ".join(parts)


class Listing(NamedTuple):
    """The images of a split, as names relative to it."""

    loose: list[str]  # those directly in it
    folders: dict[str, list[str]]  # those of each of its folders, at any depth
    rest: Rest
    rests: dict[str, Rest]  # of each folder


def list_images(folder: Path, by_content: bool) -> Listing:
    """Scan a split. No file is touched, unless its content is to say whether it is an image.

    Raises:
        UsageError: a folder cannot be listed.
    """
    above, rest = _above(folder), Rest()
    files, names = _sorted_entries(str(folder), "", above, rest, by_content)

    def walk(name: str) -> tuple[list[str], Rest]:
        left = Rest()
        return list(_walk(f"{folder}/{name}", name, above, left, by_content)), left

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, pool.map(walk, names), strict=True))
    folders = {name: images for name, (images, _) in found.items()}
    rests = {name: left for name, (_, left) in found.items()}
    if by_content:
        files = _images_among(folder, files, rest)
        folders = {name: _images_among(folder, names, rests[name]) for name, names in folders.items()}
    for left in rests.values():
        rest.add(left)
    return Listing(files, folders, rest, rests)


def folders_of(path: Path) -> list[str]:
    """Names of the folders in ``path`` that are not hidden, nor a tool's, sorted."""
    return _sorted_entries(str(path), "", _above(path), Rest(), False)[1]


def begins_like_an_image(path: str, unreadable: bool = False) -> bool:
    """Whether a file begins like one of the formats that the loaders decode, whatever its name.

    Args:
        unreadable: what to say of a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return _IMAGE.match(file.read(_BEGINNING)) is not None
    except OSError:
        return unreadable


def in_threads(function: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
    """``function`` of every name, in order: a slice of them a thread."""
    size = max(1, -(-len(names) // THREADS))

    def of_slice(start: int) -> list[T]:
        return [function(names[index]) for index in range(start, min(start + size, len(names)))]

    with ThreadPoolExecutor(THREADS) as pool:
        for part in pool.map(of_slice, range(0, len(names), size)):
            yield from part


def _walk(path: str, relative: str, above: tuple[str, ...], rest: Rest, by_content: bool) -> Iterator[str]:
    above = (*above, path)
    files, folders = _sorted_entries(path, f"{relative}/", above, rest, by_content)
    yield from files
    for name in folders:
        yield from _walk(f"{path}/{name}", f"{relative}/{name}", above, rest, by_content)


def _above(folder: Path) -> tuple[str, ...]:
    return str(folder), *map(str, Path(os.path.realpath(folder)).parents)


def _sorted_entries(
    path: str, prefix: str, above: tuple[str, ...], rest: Rest, by_content: bool
) -> tuple[list[str], list[str]]:
    """Files that may be images, with ``prefix``, and names of folders; the rest is counted."""
    files, folders = [], []
    for entry in _scan(path):
        name = entry.name
        if name.startswith(manifest.NAME):
            continue
        if name.startswith(".") or name.lower() in TOOLS:
            rest.aside["._*" if name.startswith("._") else "hidden" if name.startswith(".") else name] += 1
            continue
        kind = _kind(entry, above)
        if kind == "folder":
            folders.append(name)
        elif kind == "circle":
            rest.aside["links to a folder that they lie in"] += 1
        elif kind == "special":
            rest.unread["pipes, sockets or devices"] += 1
        elif by_content or _ends_like_an_image(name):
            files.append(prefix + name)
        else:
            rest.leave(entry.path)
    return sorted(files), sorted(folders)


def _kind(entry: os.DirEntry[str], above: tuple[str, ...]) -> str:
    """folder, circle (a link to a folder above it, to be followed for ever), file, or special.

    But for links the file system's listing says so, and nothing is asked. A link that leads nowhere is a file: whether
    it is shown is decided where files are read.
    """
    try:
        if entry.is_dir():
            return "circle" if entry.is_symlink() and _leads_to(entry.path, above) else "folder"
        if entry.is_file():
            return "file"
        os.stat(entry.path)
        return "special"
    except OSError:
        return "file"


def _leads_to(link: str, folders: Iterable[str]) -> bool:
    target = os.stat(link)
    return any(os.path.samestat(target, os.stat(folder)) for folder in folders)


def _scan(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UsageError(f"cannot list the folder '{path}': {error.strerror}") from None


def _images_among(folder: Path, names: list[str], rest: Rest) -> list[str]:
    """Those whose content is an image's; the others are counted. One that cannot be read is what its ending says."""

    def is_image(name: str) -> bool:
        return begins_like_an_image(os.path.join(folder, name), unreadable=_ends_like_an_image(name))

    images = []
    for name, taken in zip(names, in_threads(is_image, names), strict=True):
        if taken:
            images.append(name)
        else:
            rest.leave(os.path.join(folder, name))
    return images


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "without ending"


def _ends_like_an_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _commonest(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _few_of(counts: Counter[str]) -> str:
    shown, others = _commonest(counts)[:_SHOWN], _commonest(counts)[_SHOWN:]
    text = ", ".join(f"{count:,} {name}" for name, count in shown)
    return text + (f" and {sum(count for _, count in others):,} of {len(others)} other kinds" if others else "")


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


__all__ = [
    "EXTENSIONS",
    "SIGNATURES",
    "TOOLS",
    "Listing",
    "Rest",
    "begins_like_an_image",
    "folders_of",
    "in_threads",
    "list_images",
]
