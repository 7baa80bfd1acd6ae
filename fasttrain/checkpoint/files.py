"""A checkpoint on disk: written under a temporary name, sealed, renamed; read only where every seal holds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from fasttrain.errors import UsageError

FORMAT = 2
MANIFEST = "manifest.json"
STATE, MODEL, OPTIMIZER, RANKS = "state.json", "model.safetensors", "optimizer.safetensors", "ranks.safetensors"
FILES = (STATE, MODEL, OPTIMIZER, RANKS)


class Damaged(Exception):
    """What is wrong with a checkpoint."""


class Checkpoint(NamedTuple):
    """A whole checkpoint, in memory: the very bytes whose hashes were right."""

    path: Path
    files: dict[str, bytes]

    @property
    def state(self) -> dict[str, Any]:
        """What ``state.json`` says.

        Raises:
            UsageError: it was written in a format this version does not know.
        """
        try:
            state = json.loads(self.files[STATE])
        except (ValueError, RecursionError):
            state = None
        found = state.get("format") if isinstance(state, dict) else None
        if found != FORMAT:
            raise UsageError(
                f"{self.path} has format {found}, this version reads {FORMAT}: use the version that wrote it"
            )
        return state

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of one of the ``.safetensors`` files, on the host."""
        return safetensors.torch.load(self.files[name])


def write(folder: Path, step: int, contents: Iterable[tuple[str, bytes]]) -> Path:
    """Publish the checkpoint of ``step``: nothing bears its name before all of it is on the disk.

    Args:
        contents: (file, bytes), taken one after another.

    Raises:
        OSError: it cannot be written; what was written of it is removed, and the other checkpoints are untouched.
    """
    partial, final = folder / f".step-{step:08d}.partial", folder / f"step-{step:08d}"
    remove(partial)
    try:
        partial.mkdir(parents=True)
        seals = {}
        for file, data in contents:
            _write(partial / file, data)
            seals[file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write(partial / MANIFEST, json.dumps(seals, indent=1).encode())
        _sync(partial)
        remove(final)
        os.replace(partial, final)
        _write(folder / ".latest.partial", final.name.encode())
        os.replace(folder / ".latest.partial", folder / "latest")
        _sync(folder)
    except BaseException:
        for leftover in (partial, folder / ".latest.partial"):
            with suppress(OSError):
                remove(leftover)
        raise
    return final


def remove(path: Path) -> None:
    """Take a checkpoint's name away first, then its files: a kill on the way leaves no half of one."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith("."):
        path = path.rename(path.with_name(f".{path.name}.removed"))
    shutil.rmtree(path)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for leftover in [*folder.glob(".step-*"), *folder.glob(".latest.partial")]:
        with suppress(OSError):
            remove(leftover)


def find(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint in ``folder`` (None when it has none at all), and a line for each that is damaged.

    Raises:
        UsageError: there are checkpoints and none is whole; a run never starts over silently.
    """
    complaints = []
    for path in steps(folder):
        try:
            return read(path), complaints
        except Damaged as damage:
            complaints.append(f"checkpoint {path} is damaged and passed over: {damage}")
    if complaints:
        raise UsageError(
            f"no checkpoint in {folder} is whole ({complaints[0]}): restore one, or start over with another run.dir"
        )
    return None, []


def read(path: Path) -> Checkpoint:
    """The checkpoint at ``path``; each file is read once, and what is returned is what was checked.

    Raises:
        Damaged: a file is missing, is no regular file, or has not the size or hash that the manifest gives.
    """
    return Checkpoint(path, dict(_checked(path)))


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``, or None."""
    try:
        for _ in _checked(path):
            pass
    except Damaged as damage:
        return str(damage)
    return None


def steps(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first."""
    return sorted(folder.glob("step-*"), key=lambda path: path.name, reverse=True)


def _checked(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        seals = json.loads(_read(path / MANIFEST))
        if not isinstance(seals, dict) or seals.keys() != set(FILES):
            raise Damaged(f"its manifest does not list {', '.join(FILES)}")
        for file in FILES:
            data = _read(path / file)
            if len(data) != seals[file]["size"]:
                raise Damaged(f"{file} has {len(data)} bytes, not {seals[file]['size']}")
            if hashlib.sha256(data).hexdigest() != seals[file]["sha256"]:
                raise Damaged(f"{file} does not match its SHA-256")
            yield file, data
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def _read(path: Path) -> bytes:
    # neither a link to elsewhere nor a pipe that would wait for a writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Damaged(f"{path.name} is not a regular file")
        return file.read()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
