"""What images there are, and what to call them: ImageFolder trees, CIFAR archives, FFCV files.

    root ── train/ ── class/ ── **/*.jpg        ImageFolder; class folders directly under the root are one split
         ── cifar-10-python.tar.gz              or cifar-10-batches-py/, and CIFAR-100's; root may name them itself
         ── train.beton, val.beton              FFCV; root may name one file itself

A sample's id is its position in the *full* sorted listing of its split, files that are left out included, so that
leaving one out renumbers nothing: the order, the augmentation and a resumed run all count in these ids.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from fasttrain.config import Config, PathText
from fasttrain.data import cifar, manifest, shapes
from fasttrain.errors import UsageError

Role = Literal["train", "val"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}

FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")  # by content; what the loaders decode. Any may be called .jpg.

_THREADS = 16  # a scan waits for the file system, not for a core


class DataConfig(Config):
    root: PathText | None = None
    """Folder <split>/<class>/*, CIFAR archive or folder, .beton file or its folder; null: the embedded data set."""
    train: PathText | None = None
    """Training split: a folder or .beton file relative to the root; null finds train."""
    val: PathText | None = None
    """Validation split, likewise; null finds val, validation, valid or test."""
    cache: PathText | None = None
    """For the embedded data set and manifests of read-only data; null: fasttrain in $XDG_CACHE_HOME or ~/.cache."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of each class's training images to use: the same ones for any seed, a larger share holds a smaller."""
    download: bool = False
    """Fetch the CIFAR archive that root names (…/cifar-10-python.tar.gz or …/cifar-100-python.tar.gz) if absent."""

    @property
    def cache_folder(self) -> Path:
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fasttrain"
        return Path(self.cache or default)


class Names(Sequence[str]):
    """An immutable list of strings in one block of memory: a million file names cost tens of MB, not hundreds."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.block = b"".join(encoded)
        self.ends = np.cumsum([0] + [len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return os.fsdecode(self.block[self.ends[index] : self.ends[index + 1]])

    def digest(self) -> str:
        return _digest(self.block, self.ends)


@dataclass(frozen=True, eq=False)
class Catalog:
    """One split, immutable but for ``sizes``, which loaders fill in as they read headers.

    ``len(catalog)`` counts the usable samples; "full" is the number of all samples listed. An FFCV file written from a
    folder has the folder's ids and fingerprint, so both give the same order and draws.
    """

    split: str
    classes: list[str]
    labels: np.ndarray  # [full] int64; -1 where an FFCV file lacks the id
    indices: np.ndarray  # [n] int64, sorted: the ids that may be used
    sizes: np.ndarray  # [full, 2] int32 (height, width); 0 where not known yet
    root: Path  # the split's folder, archive or FFCV file
    names: Names | None = None  # [full] relative to root, of encoded files
    nbytes: np.ndarray | None = None  # [full] int64 bytes of each file, as its manifest knows it
    pixels: np.ndarray | None = None  # [full, H, W, 3] uint8, of decoded ones
    beton: Path | None = None  # FFCV reads it, read() is not used
    excluded: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    notes: list[str] = field(default_factory=list)  # what a person should be told
    fingerprint: str = ""  # hash of names, classes, labels and what is left out, wherever the data lies

    def __post_init__(self) -> None:
        if not self.fingerprint:
            names = self.names.digest() if self.names is not None else ""
            digest = _digest(names, "\n".join(self.classes), self.labels, self.indices)
            object.__setattr__(self, "fingerprint", digest)

    @property
    def encoded(self) -> bool:
        """True: :meth:`read` gives a file's bytes. False: it gives pixels."""
        return self.names is not None

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        """uint8: a file's bytes [size], or pixels [H, W, 3]. Safe to call from several threads.

        Raises:
            OSError: the file cannot be read.
            ValueError: it has not as many bytes as when its manifest was made.
        """
        if self.names is not None:
            content = np.fromfile(self.path(index), np.uint8)
            if self.nbytes is not None and len(content) != self.nbytes[index]:
                before = self.nbytes[index]
                raise ValueError(f"changed since the manifest was made: {len(content):,} bytes, not {before:,}")
            return content
        if self.pixels is not None:
            return self.pixels[index]
        raise TypeError(f"'{self.root}' is read by FFCV's loader")

    def path(self, index: int) -> str:
        """What to call the sample in a message."""
        return os.path.join(self.root, self.names[index]) if self.names is not None else f"{self.root}[{index}]"

    def without(self, reasons: dict[int, str]) -> Catalog:
        """The same listing with the samples ``{id: reason}`` left out instead.

        Raises:
            UsageError: a class would have none left.
        """
        usable = np.ones(len(self.labels), bool)
        usable[list(reasons)] = False
        emptied = np.setdiff1d(self.labels, self.labels[usable])
        if len(emptied):
            first = int(np.flatnonzero(self.labels == emptied[0])[0])
            raise _unreadable_class(self, first, reasons[first])
        excluded = [(self.path(index), reason) for index, reason in reasons.items()]
        return replace(self, indices=np.flatnonzero(usable), excluded=excluded, fingerprint="")

    def thinned(self, share: float) -> Catalog:
        """``share`` of each class's usable samples, rounded up: those of the smallest random keys, which are fixed."""
        keys = np.random.Philox(key=0).random_raw(len(self.labels))[self.indices]
        labels = self.labels[self.indices]
        kept = []
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            most = math.ceil(share * len(members))
            kept.append(members[np.argsort(keys[members], kind="stable")[:most]])
        note = f"data.share={share:g}: {sum(map(len, kept)):,} of {len(self):,} usable images"
        indices = self.indices[np.sort(np.concatenate(kept))]
        return replace(self, indices=indices, notes=[*self.notes, note], fingerprint="")

    def summary(self, most: int = 5) -> str:
        """What there is and what was left out, for a person: a line, and one for each of the first ``most`` reasons."""
        lines = [f"{self.split}: {len(self):,} images of {len(self.classes)} classes in {self.root}"]
        lines += [f"  note: {note}" for note in self.notes]
        if self.excluded:
            lines.append(f"  left out: {len(self.excluded):,}")
            lines += [f"    {path}: {reason}" for path, reason in self.excluded[:most]]
            lines += [f"    and {len(self.excluded) - most:,} more"] * (len(self.excluded) > most)
        return "\n".join(lines)


def open_catalog(config: DataConfig, role: Role, use_manifest: bool = True) -> Catalog:
    """List the images of a split; of a folder, without opening more than one file a class.

    With a manifest of the same listing (``launch/prepare.py`` writes it) its sizes and quarantine are used, also where
    some of its files are missing now: so what vanishes during a run renumbers nothing when it goes on. Without one,
    empty files are left out, and each class must have a file that begins like an image.

    Raises:
        UsageError: a root, split or class without usable images, a wrong checksum, an FFCV file without FFCV installed.
    """
    catalog = _open(config, role, use_manifest)
    return catalog.thinned(config.share) if role == "train" and config.share < 1 else catalog


def _open(config: DataConfig, role: Role, use_manifest: bool) -> Catalog:
    if config.root is None:
        root = shapes.ensure(config.cache_folder)
    else:
        root = Path(config.root)
        edition = cifar.find(root)
        if edition is not None:
            return _open_cifar(config, role, *edition)
    if not root.exists():
        raise UsageError(f"data.root='{root}' does not exist: give the folder that holds the splits, or an archive")
    beton = _find_beton(config, role, root)
    if beton is not None:
        return _open_beton(beton, role)
    if not root.is_dir():
        raise UsageError(f"data.root='{root}' is neither a folder, nor a .beton file, nor a CIFAR archive by its name")
    folder = _find_split(config, role, root)
    classes = _reference_classes(config, role, root, folder)
    return _open_folder(folder, role, classes, config.cache_folder if use_manifest else None)


def header_size(encoded: np.ndarray) -> tuple[int, int]:
    """(height, width) of the pixels as stored, EXIF orientation ignored; from the header of a file's bytes, undecoded.

    JPEG (all variants) and PNG are parsed here; other formats, and headers that are not plain, go to Pillow.

    Raises:
        ValueError: no header of a known format.
    """
    data = memoryview(encoded)  # type: ignore[arg-type]
    if data[:2] == b"\xff\xd8":
        size = _jpeg_size(data)
        if size is not None:
            return size
    elif data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.height, image.width
    except UnidentifiedImageError:
        raise ValueError(f"no image header: begins with {bytes(data[:16])!r}") from None
    except Exception as error:  # Pillow's plugins raise many kinds on garbage
        raise ValueError(f"no image header: {error}") from None


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    position = 2
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF0 to SOF15
            size = (
                int.from_bytes(data[position + 5 : position + 7], "big"),
                int.from_bytes(data[position + 7 : position + 9], "big"),
            )
            return size if all(size) else None
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _open_folder(folder: Path, role: Role, classes: list[str], cache: Path | None) -> Catalog:
    names, labels = _list_images(folder, classes)
    found, complaint = manifest.find(folder, cache) if cache is not None else (None, None)
    notes = [complaint] if complaint else []
    if found is not None and found.classes == classes and (lost := found.missing(names)):
        notes.append(f"{lost:,} files of the manifest are missing: others are shown in their place")
        names, label_of = Names(found.names), {name: label for label, name in enumerate(classes)}
        labels = np.array([label_of[name.partition("/")[0]] for name in found.names], np.int64)
    if found is not None and (found.listing != names.digest() or len(found.sizes) != len(names)):
        notes.append("the manifest lists other files than are there now and is not used: run launch/prepare.py again")
        found = None
    nbytes = None
    if found is not None:
        sizes, reasons = found.sizes, {index: reason for index, _, reason in found.excluded}
        nbytes = np.array(found.nbytes) if found.nbytes else None
    else:
        sizes, reasons = np.zeros((len(names), 2), np.int32), dict.fromkeys(_empty_files(folder, names), "empty file")
    listed = Catalog(
        split=role,
        classes=classes,
        labels=labels,
        indices=np.arange(len(names)),
        sizes=sizes,
        root=folder,
        names=names,
        nbytes=nbytes,
        notes=notes,
    )
    catalog = listed.without(reasons)
    if found is None:
        _check_every_class(catalog)
    return catalog


def _list_images(folder: Path, classes: list[str]) -> tuple[Names, np.ndarray]:
    """Relative names in torchvision's order (class, folder, file) and labels [full]; hidden files are skipped."""
    present = [label for label, name in enumerate(classes) if (folder / name).is_dir()]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda label: list(_walk(os.path.join(folder, classes[label]), classes[label])), present))
    for label, files in zip(present, found, strict=True):
        if not files:
            raise UsageError(
                f"the class folder '{folder / classes[label]}' has no image: remove it, or fill it "
                f"(files ending in {' '.join(EXTENSIONS)} are taken)"
            )
    names = Names(name for files in found for name in files)
    return names, np.repeat(np.array(present, np.int64), [len(files) for files in found])


def _walk(path: str, relative: str) -> Iterator[str]:
    folders, files = [], []
    for entry in _scan(path):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(entry.name)
        elif entry.name.lower().endswith(EXTENSIONS):
            files.append(f"{relative}/{entry.name}")
    yield from sorted(files)
    for name in sorted(folders):
        yield from _walk(f"{path}/{name}", f"{relative}/{name}")


def _scan(path: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UsageError(f"cannot list the folder '{path}': {error.strerror}") from None


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in _scan(path) if not entry.name.startswith(".") and entry.is_dir())


def _empty_files(folder: Path, names: Names) -> list[int]:
    def empty(part: np.ndarray) -> list[int]:
        return [index for index in part.tolist() if _bytes_of(os.path.join(folder, names[index])) == 0]

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(empty, np.array_split(np.arange(len(names)), _THREADS))
        return [index for part in parts for index in part]


def _bytes_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # a dangling link


def _check_every_class(catalog: Catalog) -> None:
    """Where nothing was verified, each class must at least have a file that begins like an image."""
    starts = np.unique(catalog.labels[catalog.indices], return_index=True)[1]
    for members in np.split(catalog.indices, starts[1:]):
        if not any(_begins_like_an_image(catalog.path(index)) for index in members):
            raise _unreadable_class(catalog, int(members[0]), "it is not an image")


def _unreadable_class(catalog: Catalog, index: int, reason: str) -> UsageError:
    folder = catalog.root / catalog.classes[catalog.labels[index]]
    name = os.path.basename(catalog.path(index))
    return UsageError(f"the class folder '{folder}' has no readable image ('{name}': {reason}): remove or refill it")


def _begins_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb") as file, Image.open(file):
            return True
    except Exception:  # Pillow's plugins raise many kinds on garbage
        return False


def _find_split(config: DataConfig, role: Role, root: Path) -> Path:
    given = getattr(config, role)
    there = _folders(root)
    if given is not None:
        if not (root / given).is_dir():
            raise UsageError(f"data.{role}='{given}' is no folder in '{root}', which has: {_few(there)}")
        return root / given
    for name in SPLITS[role]:
        if name in there:
            return root / name
    has_splits = any(name in there for names in SPLITS.values() for name in names)
    if role == "train" and there and not has_splits:
        return root
    if not there:
        raise UsageError(f"data.root='{root}' is empty or has no folders: expected <split>/<class>/<image>.jpg in it")
    raise UsageError(
        f"data.root='{root}' has no folder {' or '.join(SPLITS[role])}, but {_few(there)}: "
        f"name the {role} split with data.{role}=… ('.' is the root itself)"
    )


def _reference_classes(config: DataConfig, role: Role, root: Path, folder: Path) -> list[str]:
    """Class names in label order: the training split's for both splits, or a label would mean two classes."""
    own = _folders(folder)
    if not own:
        raise UsageError(f"'{folder}' has no class folders: expected {folder}/<class>/<image>.jpg")
    if role == "train":
        return own
    try:
        classes = _folders(_find_split(config, "train", root))
    except UsageError:
        return own
    unknown = sorted(set(own) - set(classes))
    if unknown and classes:
        raise UsageError(f"'{folder}' has classes that the training split lacks: {_few(unknown)}")
    return classes or own


def _open_cifar(config: DataConfig, role: Role, edition: cifar.Edition, path: Path) -> Catalog:
    for name in (config.train, config.val):
        if name is not None:
            raise UsageError(f"'{path.name}' has its own splits: drop data.train and data.val ('{name}')")
    if config.download and not path.exists():
        cifar.download(edition, path)
    data = cifar.load(edition, path, role)
    count, height, width, _ = data.pixels.shape
    return Catalog(
        split=role,
        classes=data.classes,
        labels=data.labels,
        indices=np.arange(count),
        sizes=np.tile(np.array([height, width], np.int32), (count, 1)),
        root=path,
        pixels=data.pixels,
    )


def _find_beton(config: DataConfig, role: Role, root: Path) -> Path | None:
    """The split's FFCV file. A root that is one serves the split that its name says, its neighbours the other."""
    given = getattr(config, role)
    is_file = root.suffix == ".beton"
    if is_file and given is None and (root.stem in SPLITS["val"]) == (role == "val"):
        return root
    folder = root.parent if is_file else root
    if given is not None:
        return folder / given if is_file or given.endswith(".beton") else None
    if not is_file and any((root / name).is_dir() for name in SPLITS[role]):
        return None  # where both lie, image files are what the default loader reads
    found = [path for name in SPLITS[role] if (path := folder / f"{name}.beton").is_file()]
    if is_file and not found:
        raise UsageError(f"'{root}' is one FFCV file and no {role}.beton lies beside it: name one with data.{role}=…")
    return found[0] if found else None


def _open_beton(path: Path, role: Role) -> Catalog:
    from fasttrain.data.beton import read_listing  # numba and, when installed, FFCV: seconds to import

    listing = read_listing(path)
    return Catalog(
        split=role,
        classes=listing.classes,
        labels=listing.labels,
        indices=listing.ids,
        sizes=listing.sizes,
        root=path,
        beton=path,
        excluded=listing.excluded,
        fingerprint=listing.fingerprint,
    )


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def _digest(*parts: str | bytes | np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else part if isinstance(part, bytes) else part.tobytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


__all__ = ["EXTENSIONS", "FORMATS", "Catalog", "DataConfig", "Names", "header_size", "open_catalog"]
