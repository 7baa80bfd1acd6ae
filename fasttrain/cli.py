"""How every script in launch/ starts and ends: arguments in, one line on a mistake, an exit code out."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from inspect import getfile
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from fasttrain import distributed, environment
from fasttrain.config import Config, describe, doubts, load, to_yaml
from fasttrain.errors import UsageError, explained
from fasttrain.watchdog import EXIT_RANK_LOST

C = TypeVar("C", bound=Config)

EXIT_MISTAKE = 2
"The command, the configuration or the data is wrong; the last line says what and how to mend it."
EXIT_FAILED = 1
"Something broke that is not the user's doing; there is a traceback."
EXIT_SAVED_ON_SIGNAL = 75
"SIGTERM, SIGUSR1 or Ctrl-C: a checkpoint was saved; the same command goes on from it (EX_TEMPFAIL of sysexits.h)."
EXIT_INTERRUPTED = 130
"""Ctrl-C where nothing is being trained, or a second one: ended at once, without saving; a checkpoint that is being
written is finished."""

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
    _outlive_readers()
    given = environment.arguments()
    flags = {a for a in given if a in ("--help", "-h", "--print-config", "--debug")}
    arguments = [a for a in given if a not in flags]
    if flags & {"--help", "-h"}:
        text = "\n".join([doc.strip(), FLAGS, "", "keys:", *_described(schema, given)])
        sys.exit(_exit_code(lambda: print(text) or 0, debug=False))

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
        code = run()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _end_soon(EXIT_INTERRUPTED)
        if distributed.rank() == 0:
            print("interrupted: ended at once; what was saved before stands", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except Exception as failure:
        error = explained(failure)
        if error is not failure:
            _end_soon(EXIT_FAILED if error is None else EXIT_MISTAKE)
        if debug or error is None:
            traceback.print_exc()
        if error is None:
            return EXIT_FAILED
        if distributed.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not error.everywhere:
            print(f"error: rank {distributed.rank()}: {error}", file=sys.stderr, flush=True)
        return EXIT_MISTAKE
    finally:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is said: Ctrl-C while Python is leaving just ends it
        distributed.finalize()


class _Output(io.FileIO):
    """Standard output, or error: ``--help | head`` is no mistake, and a full disk one, said once."""

    lost = False
    before: io.TextIOBase

    def write(self, data: bytes) -> int:
        try:
            return len(data) if self.lost else super().write(data)
        except OSError as error:
            self.lost = True
            if isinstance(error, BrokenPipeError):
                return len(data)
            raise OSError(error.errno, error.strerror, "what is printed") from None


def _outlive_readers() -> None:
    """Let printing end nothing: that nobody reads it any more, or that the locale cannot write a name."""
    for name in ("stdout", "stderr"):
        before = getattr(sys, name)
        try:
            number = before.fileno()
        except (AttributeError, OSError, ValueError):  # closed from the start, or no file
            continue
        before.flush()
        output = _Output(number, "w", closefd=False)
        output.before = before  # which would close the file when nobody holds it
        buffered = io.BufferedWriter(output)
        text = {"encoding": before.encoding, "errors": "backslashreplace", "line_buffering": before.line_buffering}
        setattr(sys, name, io.TextIOWrapper(buffered, **text, write_through=before.write_through))


def _end_soon(code: int) -> None:
    """Leaving the process group may wait for ranks that do not answer: no longer than :data:`STUCK`."""
    cut = threading.Timer(STUCK, os._exit, [code])
    cut.daemon = True
    cut.start()


__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_MISTAKE", "EXIT_RANK_LOST", "EXIT_SAVED_ON_SIGNAL", "main"]
