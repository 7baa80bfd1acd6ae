"""How every script in launch/ starts and ends: arguments in, one line on a mistake, an exit code out."""

from __future__ import annotations

import io
import os
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from inspect import getfile
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from fasttrain import distributed
from fasttrain.config import Config, describe, doubts, load, to_yaml
from fasttrain.errors import UsageError
from fasttrain.watchdog import EXIT_RANK_LOST

C = TypeVar("C", bound=Config)

EXIT_MISTAKE = 2
"The command, the configuration or the data is wrong; the last line says what and how to mend it."
EXIT_FAILED = 1
"Something broke that is not the user's doing; there is a traceback."
EXIT_SAVED_ON_SIGNAL = 75
"SIGTERM or SIGUSR1: a checkpoint was saved; the same command goes on from it (EX_TEMPFAIL of sysexits.h)."
EXIT_INTERRUPTED = 130
"Ctrl-C: ended at once, without saving; a checkpoint that is being written is finished."

STUCK = 30.0  # seconds

FLAGS = """
  --help           this text, with every key, its default and its meaning; --help SECTION lists that section's alone
  --print-config   print the resolved configuration as YAML and exit
  --debug          on a mistake, print the traceback too"""


def main(
    schema: type[C],
    body: Callable[[C], int | None],
    doc: str,
    positional: tuple[str, ...] = (),
    base: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {},
) -> None:
    """Run ``body(config)`` and exit: 0, or what ``body`` returns, or one of this module's codes.

    ``sys.argv`` holds values of the ``positional`` keys, an optional YAML path, and ``key=value``; what launchers add
    (``--local_rank=N``) is ignored in favour of the environment. ``base`` is :func:`fasttrain.config.load`'s.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # that the locale cannot write a name is no reason to end
    given = [a for a in sys.argv[1:] if not a.replace("-", "_").startswith("__local_rank=")]
    flags = {a for a in given if a in ("--help", "-h", "--print-config", "--debug")}
    arguments = [a for a in given if a not in flags]
    if flags & {"--help", "-h"}:
        print("\n".join([doc.strip(), FLAGS, "", "keys:", *_described(schema, given)]))
        sys.exit(0)

    def run() -> int:
        try:
            config = load(schema, arguments, base, positional, lambda: _scripts_beside(getfile(body)), distributed.say)
        except UsageError as error:  # every rank was given the same arguments
            raise UsageError(str(error), everywhere=True) from error
        for doubt in doubts(config):
            distributed.say(f"WARNING: {doubt}")
        if "--print-config" not in flags:
            return body(config) or 0
        if distributed.rank() == 0:
            print(to_yaml(config), end="")
        return 0

    sys.exit(_exit_code(run, debug="--debug" in flags))


def _described(schema: type[Config], given: list[str]) -> list[str]:
    """All keys; those of a section alone where its name stands behind ``--help``."""
    lines = describe(schema)
    asked = [name for flag, name in pairwise(given) if flag in ("--help", "-h")]
    return [line for line in lines if f"{line.split()[0]}.".startswith(tuple(f"{name}." for name in asked))] or lines


def _scripts_beside(script: str) -> dict[str, type[Config]]:
    """The schemas of the other scripts in its folder, by what runs them."""
    others = [path for path in sorted(Path(script).parent.glob("*.py")) if not path.samefile(script)]
    schemas = {path: getattr(import_module(path.stem), f"{path.stem.capitalize()}Config", None) for path in others}
    return {os.path.relpath(path): schema for path, schema in schemas.items() if schema is not None}


def _exit_code(run: Callable[[], int], debug: bool) -> int:
    try:
        return run()
    except UsageError as error:
        if debug:
            traceback.print_exc()
        if distributed.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not error.everywhere:
            print(f"error: rank {distributed.rank()}: {error}", file=sys.stderr, flush=True)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        _end_soon(EXIT_INTERRUPTED)
        print("interrupted: the last checkpoint stands; the same command goes on from it", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except Exception:
        _end_soon(EXIT_FAILED)
        traceback.print_exc()
        return EXIT_FAILED
    finally:
        distributed.finalize()


def _end_soon(code: int) -> None:
    """Leaving the process group may wait for ranks that do not answer: no longer than :data:`STUCK`."""
    cut = threading.Timer(STUCK, os._exit, [code])
    cut.daemon = True
    cut.start()


__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_MISTAKE", "EXIT_RANK_LOST", "EXIT_SAVED_ON_SIGNAL", "main"]
