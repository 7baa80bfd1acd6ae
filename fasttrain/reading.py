"""Text becomes values: the type of a setting decides how its text is read, on the command line as in a YAML file.

YAML by itself takes ``no`` for false, ``0017`` for 15, ``1:30`` for 90 and ``1e-3`` for text, whatever the setting is.
Here scalars stay text until the setting is known: a name is the text as it is, ``064`` images are 64, and what is no
number is refused where one is wanted.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import yaml

from fasttrain.errors import UsageError

BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def read(kind: Any, value: Any) -> Any:
    """``value`` with each text in it read as its setting's type would have it; what does not fit stays as it is.

    Args:
        kind: type of the setting, or the schema of the section.
        value: text, or dictionaries and lists of it; what is no text is left alone, but for booleans, which are no
            numbers.
    """
    if value is None and is_section(kind):
        return {}  # "data:" with nothing below it
    if isinstance(value, dict):
        return {key: read(part(kind, key), below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [read(part(kind, i), below) for i, below in enumerate(value)]
    if isinstance(value, bool) and bool not in alternatives(kind):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    for one in alternatives(kind):
        try:
            return _scalar(one, value)
        except ValueError:
            continue
    return value


def parse(kind: Any, text: str) -> Any:
    """What ``key=text`` gives to :func:`read`: sections and lists are written as in YAML, ``null`` is nothing."""
    if text == "null" and type(None) in alternatives(kind):
        return None
    if any(is_section(one) or get_origin(one) in (dict, list, tuple) for one in alternatives(kind)):
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError:
            return text
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's keys and values, scalars as their text.

    Raises:
        UsageError: the file cannot be read, is not YAML, holds no mapping, or gives a key twice.
    """
    try:
        values = yaml.load(path.read_bytes().decode(), _Loader)
    except OSError as error:
        inside = f"; its settings are in '{path / 'config.yaml'}'" if (path / "config.yaml").is_file() else ""
        raise UsageError(f"cannot read the configuration '{path}': {error.strerror}{inside}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not YAML: byte {error.start} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UsageError(f"'{path}' is not YAML: {_where(error)}") from None
    try:
        json.dumps(values, default=str)
    except ValueError:
        raise UsageError(f"'{path}' has an anchor that holds its own alias") from None
    if values is None:
        raise UsageError(f"'{path}' is empty: a configuration is a mapping of keys to values")
    if not isinstance(values, dict):
        kind = "text" if isinstance(values, str) else f"a {type(values).__name__}"
        raise UsageError(f"'{path}' holds {kind}; a configuration is a mapping of keys to values")
    return values


def is_section(kind: Any) -> bool:
    """Whether ``kind`` is a schema, with keys of its own."""
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def alternatives(kind: Any) -> list[Any]:
    """The types of which ``kind`` is a union; the bounds of an ``Annotated`` one are left out."""
    if get_origin(kind) is Annotated:
        return alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [one for argument in get_args(kind) for one in alternatives(argument)]
    return [kind]


def part(kind: Any, key: Any) -> Any:
    """The type of what a section has under ``key``, or a list at that position; ``object`` where there is none."""
    for one in alternatives(kind):
        arguments = get_args(one)
        if is_section(one) and key in one.model_fields:
            return one.model_fields[key].annotation
        if get_origin(one) is dict:
            return arguments[1]
        if get_origin(one) in (list, tuple) and isinstance(key, int):
            same = get_origin(one) is list or Ellipsis in arguments
            return arguments[0] if same else arguments[key] if key < len(arguments) else object
    return object


def kind_of(schema: Any, key: str) -> Any:
    """The type of the setting with the dotted ``key``; ``object`` where there is none."""
    for name in key.split("."):
        schema = part(schema, name)
    return schema


def _scalar(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
    elif kind in (int, float):
        return _number(kind, text)
    elif get_origin(kind) is Literal:
        for choice in get_args(kind):
            if str(choice) == text:
                return choice
    raise ValueError(text)


def _number(kind: type, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if kind is int and not number.is_integer():
        raise ValueError(text)
    return int(number) if kind is int else number


class _Loader(yaml.SafeLoader):
    """Scalars stay text, but for null; a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's name, never changed)
        first: [resolver for resolver in resolvers if resolver[0].rpartition(":")[2] in ("null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":null"):
                raise yaml.MarkedYAMLError(problem="a key that is no text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _where(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    hint = " (indent by spaces, not tabs)" if "'\\t'" in str(error.problem) else ""
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{hint}"


__all__ = ["BOOLEANS", "alternatives", "is_section", "kind_of", "parse", "part", "read", "read_yaml"]
