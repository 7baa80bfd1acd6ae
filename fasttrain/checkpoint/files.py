"""A checkpoint on disk: written under a temporary name, sealed, renamed; read only where every seal holds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fasttrain.errors import UsageError

FORMAT = 2
MANIFEST = "manifest.json"
STATE, MODEL, OPTIMIZER, RANKS = "state.json", "model.safetensors", "optimizer.safetensors", "ranks.safetensors"
FILES = (STATE, MODEL, OPTIMIZER, RANKS)
KEYS = {"format": int, "step": int, "world_size": int, "optimizer_scalars": dict}
"What every ``state.json`` has, whatever the run; and what kind of value."


class Damaged(Exception):
    """What is wrong with a checkpoint."""


class Checkpoint(NamedTuple):
    """A whole checkpoint, in memory: the very bytes whose hashes were right."""

    path: Path
    files: dict[str, bytes]

    @property
    def state(self) -> dict[str, Any]:
        """What ``state.json`` says."""
        return json.loads(self.files[STATE])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of one of the ``.safetensors`` files, on the host."""
        return safetensors.torch.load(self.files[name])

    def shapes(self, name: str) -> dict[str, list[int]]:
        """Of the tensors of one of the ``.safetensors`` files."""
        return {key: tensor["shape"] for key, tensor in safetensors.deserialize(self.files[name])}


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
    """Remove what a killed run left half written or half removed.

    Raises:
        UsageError: a folder is where the name of the newest checkpoint goes.
    """
    if (folder / "latest").is_dir() and not (folder / "latest").is_symlink():
        raise UsageError(f"{folder / 'latest'} is a folder, where the newest checkpoint's name goes: move it away")
    for leftover in [*folder.glob(".step-*"), *folder.glob(".latest.partial")]:
        with suppress(OSError):
            remove(leftover)


def find(folder: Path, check: Callable[[Checkpoint], None] = lambda _: None) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint in ``folder`` (None when it has none at all), and a line for each that is damaged.

    Args:
        check: raises :class:`Damaged` where a checkpoint, whole as it is, does not hold what is needed of it.

    Raises:
        UsageError: there are checkpoints and none is whole; a run never starts over silently.
        OSError: the folder cannot be read.
    """
    complaints = []
    for path in steps(folder):
        try:
            found = read(path)
            check(found)
            return found, complaints
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
        Damaged: a file is missing, is no regular file, has not the size or hash that the manifest gives, or holds
            something else than its name says.
        UsageError: it was written in a format this version does not know.
    """
    found = Checkpoint(path, dict(_checked(path)))
    _check_contents(found)
    return found


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``, or None."""
    try:
        for _ in _checked(path):
            pass
    except Damaged as damage:
        return str(damage)
    return None


def steps(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first; none where there is no folder.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        names = [name for name in os.listdir(folder) if re.fullmatch(r"step-\d+", name)]
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names, key=lambda name: int(name[5:]), reverse=True)]


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


def require(state: Any, kinds: dict[str, type]) -> None:
    """Whether ``state`` has these keys, with values of these kinds; it is :class:`Damaged` if not."""
    for key, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise Damaged(f"{STATE} has no '{key}' that is a {kind.__name__}")


def _check_contents(found: Checkpoint) -> None:
    """Hashes tell what changed after it was sealed, and not what was sealed."""
    try:
        state = found.state
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{STATE} is not JSON: {error}") from None
    require(state, KEYS)
    if state["format"] != FORMAT:
        raise UsageError(
            f"{found.path} has format {state['format']}, this version reads {FORMAT}: use the version that wrote it"
        )
    for name in (MODEL, OPTIMIZER, RANKS):
        try:
            found.shapes(name)
        except SafetensorError as error:
            raise Damaged(f"{name} is not a safetensors file: {error}") from None


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
