"""What a full verification of an ImageFolder split found, kept beside the split so that no run need look again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fasttrain.errors import UsageError

NAME = ".fasttrain-manifest.json"
VERSION = 3  # 2 went by Pillow's word


@dataclass(frozen=True)
class Manifest:
    """The verified state of one split.

    ``listing`` is the hash of all relative file names. Only names are compared when a run starts: that takes a scan of
    the folders and no ``stat`` of each file, and holds for a copy on another disk. A file that was changed under its
    old name is noticed when it is read, by its number of bytes, or because it does not decode.
    """

    listing: str
    classes: list[str]
    excluded: list[tuple[int, str, str]]  # position in the listing, relative name, reason
    heights: list[int]  # pixels, one per file in listing order; 0 where excluded
    widths: list[int]
    nbytes: list[int] = field(default_factory=list)  # of each file; 0 where excluded
    names: list[str] = field(default_factory=list)  # relative to the split, in listing order
    by_content: bool = False  # DataConfig's
    version: int = VERSION

    @property
    def sizes(self) -> np.ndarray:
        """[full, 2] int32 (height, width)."""
        return np.stack([np.asarray(self.heights, np.int32), np.asarray(self.widths, np.int32)], axis=1)

    def check(self) -> None:
        """See that its parts are what they should be and fit each other: a file may hold anything.

        Raises:
            ValueError: which does not.
        """
        count = len(self.heights) if isinstance(self.heights, list) else 0
        for key in ("heights", "widths", *(["nbytes"] if self.nbytes else [])):
            numbers = np.asarray(getattr(self, key) or np.zeros(0, np.int64))
            if numbers.dtype.kind != "i" or numbers.shape != (count,) or (numbers < 0).any():
                raise ValueError(f"its {key} are not one number a file")
            if key != "nbytes" and (numbers >= 2**31).any():
                raise ValueError(f"its {key} are too large")
        for key in ("classes", "names"):
            texts = getattr(self, key)
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"its {key} are no list of names")
        if self.names and len(self.names) != count:
            raise ValueError(f"it has {len(self.names):,} names and {count:,} sizes")
        if self.classes and not {name.partition("/")[0] for name in self.names} <= set(self.classes):
            raise ValueError("it names files of classes that it does not list")
        for entry in self.excluded if isinstance(self.excluded, list) else [None]:
            position, *texts = entry if isinstance(entry, list | tuple) and len(entry) == 3 else (None,)
            known = type(position) is int and 0 <= position < count
            if not known or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"what it excludes is no list of position, name and reason: {entry!r}"[:200])

    def missing(self, present: Sequence[str]) -> int:
        """How many of its files are not ``present``; 0 where others are that it does not list."""
        lost = len(self.names) - len(present)
        return lost if lost > 0 and set(self.names).issuperset(present) else 0


def places(folder: Path, cache: Path) -> list[Path]:
    """Where the manifest of ``folder`` may lie: inside it, else (a read-only disk) in the cache, keyed by its path."""
    key = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=10).hexdigest()
    name = os.fsdecode(os.fsencode(folder.name)[:200])  # a file's may have 255 bytes
    return [folder / NAME, cache / "manifests" / f"{name}-{key}.json"]


def find(folder: Path, cache: Path) -> tuple[Manifest | None, str | None]:
    """The manifest of ``folder`` if there is one, and a complaint if there is one that cannot be read."""
    complaint = None
    for path in reversed(places(folder, cache)):  # one in the cache is there because the other cannot be replaced
        try:
            manifest = Manifest(**json.loads(path.read_text()))
            if manifest.version == VERSION:
                manifest.check()
                return manifest, None
            complaint = f"the manifest '{path}' is not of version {VERSION}: run launch/prepare.py again"
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError, TypeError, RecursionError) as error:
            complaint = f"the manifest '{path}' cannot be read ({error}): run launch/prepare.py again"
    return None, complaint


def try_save(folder: Path, cache: Path) -> None:
    """See that :func:`save` would find a place, before the work that it saves; nothing is left there.

    Raises:
        UsageError: neither place can be written.
    """
    beside, fallback = places(folder, cache)
    for place in (beside, fallback):
        with contextlib.suppress(OSError):
            if place is fallback:
                place.parent.mkdir(parents=True, exist_ok=True)
            if not place.is_dir():
                with tempfile.TemporaryFile(dir=place.parent) as trial:
                    trial.write(bytes(4096))
                return
    raise UsageError(
        f"cannot write a manifest to '{beside}' nor to '{fallback}': make one of the folders writable, or choose "
        "another with data.cache=…"
    )


def save(manifest: Manifest, folder: Path, cache: Path) -> Path:
    """Write beside the data, or in the cache where that is read-only; whole or not at all. Returns the path.

    Raises:
        UsageError: neither place can be written.
    """
    beside, fallback = places(folder, cache)
    with contextlib.suppress(OSError):
        _write(manifest, beside)
        fallback.unlink(missing_ok=True)
        return beside
    try:
        fallback.parent.mkdir(parents=True, exist_ok=True)
        _write(manifest, fallback)
        return fallback
    except OSError as error:
        raise UsageError(f"cannot write a manifest to '{beside}' nor to '{fallback}': {error.strerror}") from None


def _write(manifest: Manifest, path: Path) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(asdict(manifest)))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


__all__ = ["NAME", "Manifest", "find", "places", "save", "try_save"]
