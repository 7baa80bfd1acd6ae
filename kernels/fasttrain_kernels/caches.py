"""Where compiled code and other caches are kept, also by a user who has no home that can be written.

A container often runs as a user without a name, whose home is ``/`` or another's, with packages that root installed.
Numba, Triton, Matplotlib and PyTorch each look for a place below the home folder, and each fails in its own way.
:func:`settle` runs when this package is imported, before anything is compiled.
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path

TOOLS = {"NUMBA_CACHE_DIR": None, "TRITON_HOME": "~", "MPLCONFIGDIR": "~/.config/matplotlib"}
"""Variables of libraries that do not keep to ``XDG_CACHE_HOME``, and where each looks without its own.

Numba does, where its variable is not set: beside the source file or there.
"""


def settle() -> None:
    """Make ``XDG_CACHE_HOME`` and the :data:`TOOLS` name places that can be written, and the user have a name.

    What cannot be written is replaced by a folder of this user's own among the temporary files, the same at every
    start, so that what was compiled is kept. A line says so, once a job. Child processes inherit the places.

    Raises:
        SystemExit: there is no temporary folder that can be written either.
    """
    _have_name()
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if trouble := _why_not(cache):
        try:
            kept = private_folder()
        except OSError as error:
            _say(
                f"error: neither {cache} ({trouble}) nor a temporary folder can be written ({error.strerror}): "
                "set XDG_CACHE_HOME and TMPDIR to folders that can be"
            )
            raise SystemExit(2) from None
        _say(
            f"WARNING: {cache} cannot be written ({trouble}): compiled kernels, the default data set and manifests are "
            f"kept in {kept}, until it is emptied: set XDG_CACHE_HOME to a folder that can be written"
        )
        os.environ["XDG_CACHE_HOME"] = cache = kept
    for variable, default in TOOLS.items():
        given = os.environ.get(variable)
        place = given or default
        if place is not None and (trouble := _why_not(place)):
            os.environ[variable] = os.path.join(cache, variable.lower())
            if given:
                _say(f"WARNING: {variable}={given} cannot be written ({trouble}): {os.environ[variable]} is used")


def _have_name() -> None:
    """PyTorch asks for the name of the user, and fails where the system knows none of this number."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())


def _why_not(place: str) -> str | None:
    """Why nothing can be written in the folder ``place``, which is made if it is missing; None where it can."""
    path = os.path.expanduser(place)
    if path.startswith("~"):
        return "this user has no home"
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))  # on a full disk a file can often still be made
    except OSError as error:
        return error.strerror or str(error)
    return None


def private_folder() -> str:
    """A folder among the temporary files that only this user can read or write: what is loaded from it is run.

    Raises:
        OSError: there is no temporary folder that can be written.
    """
    folder, name = Path(tempfile.gettempdir()), f"fasttrain-{os.getuid()}"
    for path in [folder / name, *sorted(folder.glob(f"{name}-*"))]:
        if _ours(path):
            return str(path)
    return tempfile.mkdtemp(prefix=f"{name}-", dir=folder)


def _ours(path: Path) -> bool:
    """Whether it is a folder (made if missing), not a link, that nobody else may enter and that can be written."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError:
        return False
    found = path.lstat()
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return private and _why_not(str(path)) is None


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
