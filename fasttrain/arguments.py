"""What a command line gives: values of the positional keys, a YAML file, and settings, as ``key=value`` or as flags."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from fasttrain.errors import UsageError
from fasttrain.nearest import advice, nearest
from fasttrain.reading import BOOLEANS, alternatives, is_section, kind_of, parse

KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
FILE = ("config", "c")
"What a YAML file may be called: --config FILE, -c FILE or config=FILE are the same as FILE alone."
YAML = (".yaml", ".yml")


class Arguments(NamedTuple):
    """What was given, sorted."""

    file: str | None
    settings: list[tuple[str, str | list[str]]]  # (dotted key, text, or several), in their order


def sort(schema: Any, arguments: list[str], positional: tuple[str, ...] = ()) -> Arguments:
    """Tell keys, flags, positional values and the YAML file apart.

    With a ``=`` in it an argument is a setting, but where a positional value or a file may be meant
    (``epoch=99-step=500.safetensors``): if what stands before the ``=`` is no setting and there is a file of the whole
    name, or if it resembles no key and a positional value is wanted. The last positional key, where it is a list's,
    takes all that is left.

    Raises:
        UsageError: what is none of these; it shows the right form.
    """
    file, settings, free = None, [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("-") and argument.strip("-"):
            key, text = _flag(schema, argument, rest)
        elif _is_setting(schema, argument) and (not positional or _is_like_a_key(schema, argument)):
            key, _, text = argument.partition("=")
        elif "." in argument and _is_leaf(schema, argument) and not _exists(argument):
            raise UsageError(_lacking(argument, argument))
        else:
            free.append((argument, any(key not in positional for key, _ in settings)))
            continue
        if key in FILE and kind_of(schema, key) is object:
            file = text
        else:
            settings.append((key, text))
    wanted = [key for key in positional if key not in dict(settings)]
    several: list[str] = []
    for argument, late in free:
        if wanted and Path(argument).suffix not in YAML and not (several and _is_setting(schema, argument)):
            if wanted == [*positional[-1:]] and _takes_several(schema, wanted[0]):
                several.append(argument)
            else:
                settings.append((wanted.pop(0), argument))
        elif _is_setting(schema, argument):
            settings.append(argument.partition("=")[::2])
        elif late or file is not None or not (Path(argument).suffix in YAML or _exists(argument)):
            raise UsageError(_misplaced(schema, argument, arguments))
        else:
            file = argument
    return Arguments(file, [*settings, *[(key, several) for key in wanted[:1] if several]])


def assign(schema: Any, values: dict[str, Any], key: str, text: str | list[str]) -> None:
    """Set the dotted ``key`` in nested ``values`` to what ``text`` says to a setting of its type, or to the list."""
    *parents, leaf = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        if not isinstance(values[parent], dict):
            raise UsageError(f"'{key}': '{parent}' is the value {values[parent]}, not a section with keys of its own")
        values = values[parent]
    values[leaf] = text if isinstance(text, list) else parse(kind_of(schema, key), text)


def _is_setting(schema: Any, argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals and KEY.fullmatch(key)) and (_is_leaf(schema, key) or not _exists(argument))


def _takes_several(schema: Any, key: str) -> bool:
    return any(get_origin(kind) in (list, tuple) for kind in alternatives(kind_of(schema, key)))


def _is_like_a_key(schema: Any, argument: str) -> bool:
    path = argument.partition("=")[0].split(".")
    return kind_of(schema, path[0]) is not object or nearest(schema, path) is not None


def _is_leaf(schema: Any, key: str) -> bool:
    kind = kind_of(schema, key)
    return kind is not object and not any(map(is_section, alternatives(kind)))


def _exists(argument: str) -> bool:
    return os.path.exists(os.path.expanduser(argument))


def _flag(schema: Any, argument: str, rest: list[str]) -> tuple[str, str]:
    """(key, text) of ``--key=text``, ``--key text``, or ``--key`` of a switch; what follows is taken from ``rest``."""
    flag, equals, text = argument.partition("=")
    key = flag.lstrip("-")
    if (kind := kind_of(schema, key)) is object:
        key = key.replace("-", "_")
        kind = kind_of(schema, key)
    if not equals and bool in alternatives(kind):
        return key, rest.pop(0) if rest and rest[0].lower() in BOOLEANS else "true"
    following = text if equals else rest.pop(0) if rest else ""
    if kind is object and key not in FILE:
        found = nearest(schema, key.split("."))
        meant = f"; did you mean {found}={following or '…'}?" if found else advice(schema, key.split("."))
        raise UsageError(f"unknown flag '{flag}'{meant}")
    if not equals and (not following or following.startswith("--")):
        raise UsageError(f"'{flag}' lacks its value: write {flag} FILE" if key in FILE else _lacking(flag, key))
    return key, following


def _misplaced(schema: Any, argument: str, arguments: list[str]) -> str:
    before = arguments[arguments.index(argument) - 1] if arguments.index(argument) else ""
    key = KEY.match(argument)
    if key and _is_leaf(schema, key[0]):
        return _lacking(argument, key[0])
    if before.endswith("="):
        return f"'{before}' and '{argument}' are two arguments: write {before}{argument}, without a space"
    if not argument:
        return "an argument is empty (an unset variable?)"
    missing = "" if _exists(argument) else "; there is no such file either"
    return f"argument '{argument}' is neither the first (a YAML file) nor of the form key=value{missing}"


def _lacking(argument: str, key: str) -> str:
    return f"'{argument}' lacks its value: write {key}=…"


__all__ = ["Arguments", "assign", "sort"]
