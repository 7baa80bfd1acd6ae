"""Where a command puts its result: tried before the work, written whole after it."""

from __future__ import annotations

import os
from pathlib import Path

from fasttrain.errors import UsageError
from fasttrain.run import replace_file

TRIAL = bytes(4096)
"What is written to see whether there is room: an empty file fits on a full disk."


def try_output(path: Path, remedy: str) -> None:
    """See that ``path`` can be written, its folder made if need be; nothing is left there, nor changed.

    Args:
        remedy: what else to do, "choose another place with output=…" say.

    Raises:
        UsageError: it is a folder, or its folder cannot be made or written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _is_device(path):
            trial = _place(path).with_name(f".{path.name}.trial")
            try:
                trial.write_bytes(TRIAL)
            finally:
                trial.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error, remedy) from None


def write_output(path: Path, content: str | bytes, remedy: str) -> None:
    """Write ``content`` to ``path``, whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        if _is_device(path):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            replace_file(_place(path), content)
    except OSError as error:
        raise _unwritable(path, error, remedy) from None


def _place(path: Path) -> Path:
    """Where a link leads: the file changes, and not what the link is."""
    return Path(os.path.realpath(path))


def _is_device(path: Path) -> bool:
    """Whether it is written as it is: ``/dev/stdout``, a pipe."""
    return path.exists() and not path.is_file()


def _unwritable(path: Path, error: OSError, remedy: str) -> UsageError:
    return UsageError(f"'{path}' cannot be written ({error.strerror or error}): {remedy}")


__all__ = ["try_output", "write_output"]
