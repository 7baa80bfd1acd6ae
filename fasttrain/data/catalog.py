"""What images there are, and what to call them: ImageFolder trees, CIFAR archives, FFCV files.

    root ── train/ ── class/ ── **/*.jpg        ImageFolder; class folders directly under the root are one split
         ── train/ ── **/*.jpg                  images without labels; those directly under the root likewise
         ── cifar-10-python.tar.gz              or cifar-10-batches-py/, and CIFAR-100's; root may name them itself
         ── train.beton, val.beton              FFCV; root may name one file itself

A sample's id is its position in the *full* sorted listing of its split, files that are left out included, so that
leaving one out renumbers nothing: the order, the augmentation and a resumed run all count in these ids.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fasttrain.config import Config, PathText
from fasttrain.data import cifar, manifest, shapes
from fasttrain.data.header import header_size
from fasttrain.data.listing import EXTENSIONS, Listing, Rest, begins_like_an_image, folders_of, in_threads, list_images
from fasttrain.errors import UsageError
from fasttrain.printable import printable

Role = Literal["train", "val"]

SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}


class DataConfig(Config):
    root: PathText | None = None
    """Folder <split>/<class>/* (without labels <split>/* or *), CIFAR archive or folder, .beton file or its folder;
    null: the embedded data set."""
    train: PathText | None = None
    """Training split: a folder or .beton file relative to the root; null finds train."""
    val: PathText | None = None
    """Validation split, likewise; null finds val, validation, valid or test."""
    cache: PathText | None = None
    """For the embedded data set and manifests of read-only data; null: fasttrain in $XDG_CACHE_HOME or ~/.cache."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of each class's training images to use: the same ones for any seed, a larger share holds a smaller."""
    by_content: bool = False
    """Of folders: take the files that begin like a JPEG, PNG, BMP, PPM, TIFF or WebP, whatever their names end in."""
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
    classes: list[str]  # none of images without labels
    labels: np.ndarray  # [full] int64; -1 where an FFCV file lacks the id, 0 without labels
    indices: np.ndarray  # [n] int64, sorted: the ids that may be used
    sizes: np.ndarray  # [full, 2] int32 (height, width); 0 where not known yet
    root: Path  # the split's folder, archive or FFCV file
    names: Names | None = None  # [full] relative to root, of encoded files
    nbytes: np.ndarray | None = None  # [full] int64 bytes of each file, as its manifest knows it
    pixels: np.ndarray | None = None  # [full, H, W, 3] uint8, of decoded ones
    beton: Path | None = None  # FFCV reads it, read() is not used
    excluded: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    notes: list[str] = field(default_factory=list)  # what a person should be told
    rest: Rest = field(default_factory=Rest)  # what lies among the files and is not listed
    by_content: bool = False  # DataConfig's
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
            with open(self.path(index), "rb", buffering=0) as file:  # takes half the time of np.fromfile
                content = np.frombuffer(file.read(), np.uint8)
            if self.nbytes is not None and len(content) != self.nbytes[index]:
                before = self.nbytes[index]
                raise ValueError(f"changed since the manifest was made: {len(content):,} bytes, not {before:,}")
            return content
        if self.pixels is not None:
            return self.pixels[index]
        raise TypeError(f"'{self.root}' is read by FFCV's loader")

    def path(self, index: int) -> str:
        """The file to read; of pixels, what to call the sample. Messages show it as :func:`printable`."""
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

    @property
    def unlabelled(self) -> str | None:
        """Why the labels can neither teach nor measure anything; None where they can."""
        if len(self.classes) > 1:
            return None
        what = f"are all of one class, '{self.classes[0]}'" if self.classes else "have no labels"
        return f"the images in '{self.root}' {what}"

    def require_labels(self, what: str, otherwise: str = "") -> None:
        """Refuse what makes no sense without labels.

        Raises:
            UsageError: there are none; ``otherwise`` is what else one can do.
        """
        if self.unlabelled:
            remedy = f"give data.root=… of {self.split}/<class>/<image>{otherwise}"
            raise UsageError(f"{what} needs labels, and {self.unlabelled}: {remedy}")

    def contents(self) -> str:
        """What there is and how much is not read, in a line."""
        count = len(self.classes)
        classes = f"of {count:,} class{'es' * (count != 1)}" if count else "without labels"
        rest = f"; {self.rest}" if str(self.rest) else ""
        return printable(f"{len(self):,} images {classes} in {self.root}{rest}")

    def summary(self, most: int = 5) -> str:
        """What there is and what was left out, for a person: a line, and one for each of the first ``most`` reasons."""
        lines = [f"{self.split}: {self.contents()}"]
        lines += [f"  note: {note}" for note in self.notes]
        if self.excluded:
            lines.append(f"  left out: {len(self.excluded):,}")
            lines += [f"    {path}: {reason}" for path, reason in self.excluded[:most]]
            lines += [f"    and {len(self.excluded) - most:,} more"] * (len(self.excluded) > most)
        return "\n".join(map(printable, lines))


class NoSplit(UsageError):
    """The data has no such split, and none was named."""


def open_catalog(config: DataConfig, role: Role, use_manifest: bool = True) -> Catalog:
    """List the images of a split; of a folder, without opening more than one file a class, or an ending.

    A folder of images without class folders, or with as many images outside of these as in them, has no labels.

    With a manifest of the same listing (``launch/prepare.py`` writes it) its sizes and quarantine are used, also where
    some of its files are missing now: so what vanishes during a run renumbers nothing when it goes on. Without one,
    empty files are left out, and each class must have a file that begins like an image.

    Raises:
        NoSplit: there is none of that role.
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
            _refuse_by_content(config, edition[1])
            return _open_cifar(config, role, *edition)
    if not os.path.exists(root):
        what = "is a link that leads nowhere" if os.path.islink(root) else "does not exist"
        raise UsageError(f"data.root='{root}' {what}: give the folder that holds the splits, or an archive")
    beton = _find_beton(config, role, root)
    if beton is not None:
        _refuse_by_content(config, beton)
        return _open_beton(beton, role)
    if not root.is_dir():
        raise UsageError(f"data.root='{root}' is neither a folder, nor a .beton file, nor a CIFAR archive by its name")
    folder = _find_split(config, role, root)
    catalog = _open_folder(config, folder, role, _reference_classes(config, role, root, folder), use_manifest)
    if role == "train" and folder.parent == root and (beside := _images_in(root)):
        catalog.notes.append(f"{beside:,} images beside the folders of the splits, in '{root}' itself, are not read")
    return catalog


def _refuse_by_content(config: DataConfig, path: Path) -> None:
    if config.by_content:
        raise UsageError(f"data.by_content=true is of folders of image files, and '{path}' is none: leave it out")


def _open_folder(
    config: DataConfig, folder: Path, role: Role, reference: list[str] | None, use_manifest: bool
) -> Catalog:
    listing = list_images(folder, config.by_content)
    names, classes, labels = _label(folder, listing, reference, config.by_content)
    found, complaint = manifest.find(folder, config.cache_folder) if use_manifest else (None, None)
    notes = [complaint] if complaint else []
    if found is not None and found.by_content != config.by_content and found.listing != names.digest():
        notes.append(
            f"the manifest was made with data.by_content={str(found.by_content).lower()} and is not used: run "
            f"launch/prepare.py with data.by_content={str(config.by_content).lower()}"
        )
        found = None
    if found is not None and found.classes == classes and (lost := found.missing(names)):
        notes.append(f"{lost:,} files of the manifest are missing: others are shown in their place")
        names, label_of = Names(found.names), {name: label for label, name in enumerate(classes)}
        labels = np.array([label_of.get(name.partition("/")[0], 0) for name in found.names], np.int64)
    if found is not None and (found.listing != names.digest() or len(found.sizes) != len(names)):
        notes.append("the manifest lists other files than are there now and is not used: run launch/prepare.py again")
        found = None
    if not classes and (inside := sum(map(len, listing.folders.values()))):
        loose = f"{len(listing.loose):,} images lie directly in it"
        notes.append(f"{loose} and {inside:,} in folders, which are therefore taken for no classes")
    if images := listing.rest.of_images():
        notes.append(f"some left unread begin like images ({_few(images)}): data.by_content=true takes them")
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
        rest=listing.rest,
        by_content=config.by_content,
    )
    catalog = listed.without(reasons)
    if found is None:
        _check_every_class(catalog)
    return catalog


def _label(
    folder: Path, listing: Listing, reference: list[str] | None, by_content: bool
) -> tuple[Names, list[str], np.ndarray]:
    """Names in torchvision's order (class, folder, file), classes, and labels [full].

    Args:
        reference: the classes in label order; None: the split's own folders.
    """
    inside = sum(map(len, listing.folders.values()))
    if len(listing.loose) >= inside and listing.loose:
        names = Names([*listing.loose, *(name for files in listing.folders.values() for name in files)])
        return names, [], np.zeros(len(names), np.int64)
    if not listing.folders:
        expected = f"expected {folder}/<class>/<image>.jpg, or images without labels directly in it"
        raise _no_image(f"'{folder}'", listing.rest, by_content, expected)
    for name, files in listing.folders.items():
        if not files:
            place = f"the class folder '{folder / name}'"
            raise _no_image(place, listing.rests[name], by_content, "remove it, or fill it")
    for name in listing.loose:
        listing.rest.leave_loose(name)
    classes = list(listing.folders) if reference is None else reference
    labels = [classes.index(name) for name in listing.folders]
    names = Names(name for files in listing.folders.values() for name in files)
    return names, classes, np.repeat(np.array(labels, np.int64), [len(files) for files in listing.folders.values()])


def _no_image(place: str, rest: Rest, by_content: bool, remedy: str) -> UsageError:
    taken = "that begin like an image" if by_content else f"ending in {' '.join(EXTENSIONS)}"
    what = f" ({rest})" if str(rest) else ""
    more = ", or set data.by_content=true, which takes some that are there" if rest.of_images() else ""
    return UsageError(f"{place} has no image{what}: {remedy} (files {taken} are taken){more}")


def _images_in(folder: Path) -> int:
    return sum(name.lower().endswith(EXTENSIONS) and not name.startswith(".") for name in os.listdir(folder))


def _empty_files(folder: Path, names: Names) -> list[int]:
    sizes = in_threads(lambda name: _bytes_of(os.path.join(folder, name)), names)
    return [index for index, nbytes in enumerate(sizes) if nbytes == 0]


def _bytes_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # a dangling link


def _check_every_class(catalog: Catalog) -> None:
    """Where nothing was verified, each class must at least have a file that begins like an image."""
    starts = np.unique(catalog.labels[catalog.indices], return_index=True)[1]
    for members in np.split(catalog.indices, starts[1:]):
        if not any(begins_like_an_image(catalog.path(index)) for index in members):
            raise _unreadable_class(catalog, int(members[0]), "it is not an image")


def _unreadable_class(catalog: Catalog, index: int, reason: str) -> UsageError:
    name = os.path.basename(catalog.path(index))
    place = f"'{catalog.root}'"
    if catalog.classes:
        place = f"the class folder '{catalog.root / catalog.classes[catalog.labels[index]]}'"
    return UsageError(f"{place} has no readable image ('{name}': {reason}): remove or refill it")


def _find_split(config: DataConfig, role: Role, root: Path) -> Path:
    given = getattr(config, role)
    there = folders_of(root)
    if given is not None:
        if not os.path.isdir(root / given):
            raise UsageError(f"data.{role}='{given}' is no folder in '{root}', which has: {_few(there)}")
        return root / given
    for name in SPLITS[role]:
        if name in there:
            return root / name
    has_splits = any(name in there for names in SPLITS.values() for name in names)
    if role == "train" and not has_splits:
        return root
    raise NoSplit(
        f"data.root='{root}' has no folder {' or '.join(SPLITS[role])}, but {_few(there)}: "
        f"name the {role} split with data.{role}=… ('.' is the root itself)"
    )


def _reference_classes(config: DataConfig, role: Role, root: Path, folder: Path) -> list[str] | None:
    """Class names in label order: the training split's for both splits, or a label would mean two classes.

    None where the split's own are meant.
    """
    if role == "train":
        return None
    try:
        classes = folders_of(_find_split(config, "train", root))
    except UsageError:
        return None
    unknown = sorted(set(folders_of(folder)) - set(classes))
    if unknown and classes:
        raise UsageError(f"'{folder}' has classes that the training split lacks: {_few(unknown)}")
    return classes or None


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
        raise NoSplit(f"'{root}' is one FFCV file and no {role}.beton lies beside it: name one with data.{role}=…")
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


__all__ = ["EXTENSIONS", "Catalog", "DataConfig", "Names", "NoSplit", "header_size", "open_catalog"]
