"""CIFAR-10 and CIFAR-100 in their official python archives (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fasttrain.errors import UsageError


@dataclass(frozen=True)
class Edition:
    archive: str
    md5: str
    folder: str
    splits: dict[str, list[str]]
    meta: str
    names_key: str
    labels_key: str
    files: dict[str, str]  # name -> MD5

    @property
    def url(self) -> str:
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"


EDITIONS = (
    Edition(
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        splits={"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]},
        meta="batches.meta",
        names_key="label_names",
        labels_key="labels",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    Edition(
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        splits={"train": ["train"], "val": ["test"]},
        meta="meta",
        names_key="fine_label_names",
        labels_key="fine_labels",
        files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
)


@dataclass(frozen=True, eq=False)
class Cifar:
    """One split, decoded: ``pixels`` [N, 32, 32, 3] uint8, ``labels`` [N] int64."""

    pixels: np.ndarray
    labels: np.ndarray
    classes: list[str]


def find(root: Path) -> tuple[Edition, Path] | None:
    """The edition that ``root`` names or holds, and the path of its archive or extracted folder; else None."""
    for edition in EDITIONS:
        if root.name == edition.archive or _is_extracted(root, edition):
            return edition, root
        for path in (root / edition.folder, root / edition.archive):
            if (path.name == edition.archive and path.is_file()) or _is_extracted(path, edition):
                return edition, path
    return None


def load(edition: Edition, path: Path, role: Literal["train", "val"]) -> Cifar:
    """Read a split from the archive or from the extracted folder at ``path``, checking MD5 sums first.

    Raises:
        UsageError: absent, or its checksum is not the official one.
    """
    wanted = [*edition.splits[role], edition.meta]
    content = _from_folder(edition, path, wanted) if path.is_dir() else _from_archive(edition, path, wanted)
    parts = [_unpickle(content[name], f"{path}/{name}") for name in wanted]
    classes = list(parts.pop()[edition.names_key])
    pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.concatenate([np.asarray(part[edition.labels_key], np.int64) for part in parts])
    return Cifar(np.ascontiguousarray(pixels), labels, classes)


def download(edition: Edition, path: Path) -> None:
    """Fetch the archive to ``path``: to a temporary name beside it, then checked, then renamed.

    Raises:
        UsageError: no network, no place to write, or what arrived has another checksum.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(edition.url, timeout=30) as response,
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file,
        ):
            temporary = Path(file.name)
            digest = hashlib.md5(usedforsecurity=False)
            while block := response.read(1 << 20):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != edition.md5:
            raise UsageError(f"{edition.url} gave a file with MD5 {digest.hexdigest()}, not {edition.md5}: try again")
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error.strerror or error
        raise UsageError(f"cannot download {edition.url} to '{path}' ({reason}): put the file there yourself") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _is_extracted(folder: Path, edition: Edition) -> bool:
    return (folder / edition.meta).is_file() and all(
        (folder / name).is_file() for names in edition.splits.values() for name in names
    )


def _from_folder(edition: Edition, folder: Path, wanted: list[str]) -> dict[str, bytes]:
    content = {name: _read(folder / name) for name in wanted}
    for name, data in content.items():
        _check(folder / name, data, edition.files[name], edition)
    return content


def _from_archive(edition: Edition, path: Path, wanted: list[str]) -> dict[str, bytes]:
    data = _read(path)
    _check(path, data, edition.md5, edition)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        return {name: archive.extractfile(f"{edition.folder}/{name}").read() for name in wanted}  # type: ignore[union-attr]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"'{path}' does not exist: set data.download=true to fetch it") from None
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {error.strerror}") from None


def _check(path: Path, data: bytes, md5: str, edition: Edition) -> None:
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UsageError(
            f"'{path}' has MD5 {found}, the official file {md5}: it is cut off or changed; "
            f"remove it and fetch {edition.url}"
        )


# Pickled by Python 2 under the old module names; NumPy 2 moved the first to numpy._core.
_ALLOWED = {"_reconstruct": np.zeros(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")


class _PlainUnpickler(pickle.Unpickler):
    """Arrays, numbers, strings, lists and dictionaries; any other global is refused, so nothing is ever run."""

    def find_class(self, module: str, name: str) -> Any:
        if module not in _MODULES or name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[name]


def _unpickle(data: bytes, where: str) -> dict[str, Any]:
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UsageError(f"'{where}' is not a plain CIFAR batch and was not loaded: {error}") from None


__all__ = ["EDITIONS", "Cifar", "Edition", "download", "find", "load"]
