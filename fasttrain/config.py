"""YAML + ``key=value`` -> one frozen, validated object.

Every part of the library declares its own settings beside its code as a subclass of :class:`Config`; a launch script
nests the parts it needs in one such class and calls :func:`load`. Defaults < YAML < ``key=value``, resolved once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, get_args, get_origin

import pydantic
import yaml

from fasttrain.arguments import assign, sort
from fasttrain.errors import UsageError
from fasttrain.nearest import advice
from fasttrain.reading import alternatives, is_section, kind_of, read, read_yaml

C = TypeVar("C", bound="Config")


class Where(NamedTuple):
    """Where a setting is read: where another one has one of ``values``, or any value but none, 0 and false."""

    key: str  # of the same section: a setting, or a property that follows from several
    values: tuple[Any, ...] = ()
    why: str = ""  # what else to say than "key=value" where it is not read

    def unmet(self, config: Config) -> str | None:
        """Why nothing reads it in ``config``; None where something does."""
        value = getattr(config, self.key)
        read = value in self.values if self.values else bool(value)
        return None if read else self.why or f"{self.key}={value}"


class Config(pydantic.BaseModel):
    """Base of every settings object: frozen, no unknown keys, finite numbers, defaults validated like given values."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    reads: ClassVar[dict[str, Where]] = {}
    "Settings (or whole sections) that are not always read, and where they are."

    def doubts(self) -> list[str]:
        """What is allowed here and probably not meant, each as ``key=value: why``."""
        return []


def _expanded(text: str) -> str:
    """A path as the file system knows it: ``~`` and ``~user`` are homes."""
    if not text.strip():
        raise ValueError("is empty (an unset variable?): give a path, or leave the setting out")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"'{path.partition('/')[0]}' is nobody's home here: for a folder of that name give ./{path}")
    return path


PathText = Annotated[str, pydantic.AfterValidator(_expanded)]
"The type of every setting that names a place in the file system."


def load(
    schema: type[C],
    arguments: list[str],
    base: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {},
    positional: tuple[str, ...] = (),
    others: Callable[[], dict[str, type[Config]]] = dict,
    say: Callable[[str], None] = lambda _: None,
) -> C:
    """Resolve ``[file.yaml] key=value ...`` into a validated ``schema``.

    Args:
        base: from what was given, values that stand where nothing was (those of the run to evaluate, say).
        positional: keys whose values may be given without their names, before all else.
        others: what else may be run, each with its schema, to say whose a YAML file is that does not fit.
        say: is told, a line each, of what was given and nothing will read.

    Raises:
        UsageError: unreadable file, unknown key (names the nearest one), wrong type or value out of range.
    """
    file, settings = sort(schema, arguments, positional)
    values = {} if file is None else _of_file(schema, file, others)
    for key, text in settings:
        assign(schema, values, key, text)
    values = read(schema, values)
    config = resolve(schema, _merged(_merged(_section_defaults(schema, values), base(values)), values))
    for line in unread(config, values):
        say(f"WARNING: {line}")
    return config


def resolve(schema: type[C], values: dict[str, Any]) -> C:
    """Validate nested plain ``values`` against ``schema``; every mistake found becomes one ``UsageError`` line."""
    try:
        return schema.model_validate(read(schema, values))
    except pydantic.ValidationError as error:
        raise UsageError(listed([_explain(schema, mistake) for mistake in error.errors()])) from None


def listed(complaints: list[str], most: int = 6) -> str:
    """In one line, the first ``most`` of them."""
    more = [f"and {len(complaints) - most} more"] if len(complaints) > most else []
    return "; ".join(complaints[:most] + more)


def unread(config: Config, given: dict[str, Any], usual: Config | None = None, prefix: str = "") -> list[str]:
    """A line for each of the ``given`` values that nothing will read as the others stand, and that is not the usual."""
    lines: list[str] = []
    for name in given.keys() & type(config).model_fields.keys():
        key, value = prefix + name, getattr(config, name)
        field = type(config).model_fields[name]
        default = getattr(usual, name) if usual is not None else field.get_default(call_default_factory=True)
        where = type(config).reads.get(name)
        reason = where.unmet(config) if where is not None else None
        if reason is not None:
            asked, mine, theirs = (flatten({key: _plain(x)}) for x in (given[name], value, default))
            unusual = [k for k in asked if k in mine and mine[k] != theirs.get(k)]
            lines += [f"{k}={mine[k]} is given and not used: {prefix}{reason}" for k in unusual]
        elif isinstance(value, Config) and isinstance(given[name], dict):
            lines += unread(value, given[name], default if isinstance(default, type(value)) else None, f"{key}.")
        elif isinstance(value, dict):
            parts = {part: inner for part, inner in value.items() if isinstance(inner, Config)}
            for part in parts.keys() & given[name].keys():
                lines += unread(parts[part], given[name][part] or {}, None, f"{key}.{part}.")
    return sorted(lines)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Config) else value


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(ours: Config, theirs: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ, each as ``key: theirs -> ours``; a key that one side lacks counts."""
    mine, other = flatten(ours.model_dump(mode="json")), flatten(theirs)
    return [
        f"{key}: {other.get(key, '(absent)')} -> {mine.get(key, '(absent)')}"
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key, "(absent)") != other.get(key, "(absent)")
    ]


def differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted keys that all of these nested plain ``settings`` have and whose values differ, with each one's value."""
    flat = [flatten(one) for one in settings]
    shared = [key for key in flat[0] if all(key in one for one in flat)]
    values = {key: [one[key] for one in flat] for key in shared}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def doubts(config: Config, prefix: str = "") -> list[str]:
    """The doubts of ``config`` and of all its sections, with dotted keys."""
    found = [prefix + doubt for doubt in config.doubts()]
    for name in type(config).model_fields:
        value = getattr(config, name)
        parts = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        for key, part in parts.items():
            found += doubts(part, f"{prefix}{key}.") if isinstance(part, Config) else []
    return found


def describe(schema: type[Config], prefix: str = "", values: Config | None = None) -> list[str]:
    """One line a key, ``key = default  what it is``, for ``--help``; the defaults are those of ``values``, if given."""
    lines = []
    for name, field in schema.model_fields.items():
        default = getattr(values, name) if values is not None else field.get_default(call_default_factory=True)
        if is_section(field.annotation):
            lines += describe(field.annotation, f"{prefix}{name}.", default if isinstance(default, Config) else None)
        elif get_origin(field.annotation) is dict and is_section(get_args(field.annotation)[1]):
            lines += describe(get_args(field.annotation)[1], f"{prefix}{name}.<name>.", *_first(default))
        else:
            shown = "(required)" if values is None and field.is_required() else json.dumps(default)
            meaning = " ".join((field.description or "").split())
            lines.append(f"  {prefix + name:30s} = {shown:24s} {meaning}".rstrip())
    return lines


def _first(parts: Any) -> list[Any]:
    """Of a section of named parts, a default one, if there is any."""
    return list(parts.values())[:1] if isinstance(parts, dict) else []


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _section_defaults(schema: type[Config], given: dict[str, Any]) -> dict[str, Any]:
    """A schema's own defaults of its sections: a key given in a section leaves the section's others as they are.

    A section of named parts (``terms``) keeps its default parts only where no other part is given.
    """
    defaults: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Config):
            defaults[name] = default.model_dump()
        elif isinstance(default, dict) and set(given.get(name) or default) <= set(default):
            defaults[name] = {key: _plain(part) for key, part in default.items()}
    return defaults


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(below[key], above[key]) for key in above if _nested(below.get(key)) and _nested(above[key])}
    return below | above | both


def _nested(value: Any) -> bool:
    return isinstance(value, dict)


def _of_file(schema: type[Config], file: str, others: Callable[[], dict[str, type[Config]]]) -> dict[str, Any]:
    """The values of a YAML file, which is not meant for one of the ``others``."""
    try:
        values = read_yaml(Path(_expanded(file)))
    except ValueError as error:
        raise UsageError(f"the YAML file's name {error}") from None
    if foreign := [key for key in values if key not in schema.model_fields]:
        for command, other in others().items():
            if values.keys() <= other.model_fields.keys():
                raise UsageError(
                    f"'{file}' is a configuration of {command}: run {command} {file} …, or give a file of the keys "
                    f"here ('{foreign[0]}' is none; they are {', '.join(schema.model_fields)})"
                )
    return values


def _explain(schema: type[Config], mistake: Any) -> str:
    path, value = [str(part) for part in mistake["loc"]], mistake["input"]
    key = ".".join(path)
    if mistake["type"] == "extra_forbidden":
        if "." in path[-1]:
            nested = path[-1].replace(".", ": {") + ": …" + "}" * path[-1].count(".")
            return f"unknown key '{key}': in a YAML file sections are nested, {nested}"
        return f"unknown key '{key}'" + advice(schema, [*path, *_only_key(value)])
    if mistake["type"] == "missing":
        above = ".".join(path[:-1])
        if path[-1].isdigit():
            return f"{above}={_shown(value)}: should have {len(get_args(kind_of(schema, above)))} values"
        return f"'{key}' is required: set {key}=…"
    if mistake["type"] in ("model_type", "model_attributes_type", "dict_type"):
        sections = filter(is_section, alternatives(kind_of(schema, key)))
        keys = [f"{key}.{name}" for section in sections for name in section.model_fields] or [f"{key}.<name>"]
        return f"{key}={_shown(value)}: '{key}' is a section of keys: set {', '.join(keys[:3])}, …"
    reason = mistake["msg"].removeprefix("Value error, ").removeprefix("Input should be ").partition(", unable to ")[0]
    if mistake["type"] == "value_error":
        return f"{key}: {reason}" if key else reason
    if mistake["type"] in ("tuple_type", "list_type"):
        return f"{key}={_shown(value)}: should be a list: {key}=[{str(value).strip('()') if value else '…'}]"
    or_null = " or null" if type(None) in alternatives(kind_of(schema, key)) else ""
    return f"{key}={_shown(value)}: should be {reason}{or_null}"


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _only_key(value: Any) -> list[str]:
    """The one way down through sections of one key each."""
    if not isinstance(value, dict) or len(value) != 1:
        return []
    (key, below), *_ = value.items()
    return [str(key), *_only_key(below)]


__all__ = [
    "Config",
    "PathText",
    "Where",
    "describe",
    "differences",
    "differing",
    "doubts",
    "flatten",
    "listed",
    "load",
    "resolve",
    "to_yaml",
    "unread",
]
