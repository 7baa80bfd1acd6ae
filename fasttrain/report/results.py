"""What the page says of each evaluation and each paper: plain values for the templates, whatever the files hold."""

from __future__ import annotations

import base64
import itertools
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.config import flatten
from fasttrain.printable import printable
from fasttrain.report.collect import FileFound, Found, mapping
from fasttrain.report.runs import duration

PNG = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"
ABOUT_IT = (
    "task",
    "about",
    "source",
    "lines",
    "command",
    "seconds",
    "date",
    "machine",
    "ranks",
    "versions",
    "settings",
    "arrays",
)
"Of a result's fields those that are not what it found."
VERDICTS = {True: "shown", False: "not shown", None: "not told apart"}
FIRST_LINES = 3


class Picture(NamedTuple):
    """In the page itself."""

    data: str  # a data URI
    alt: str
    anchor: str


class Evaluation(NamedTuple):
    """A result as the page shows it."""

    name: str
    task: str
    about: str
    lines: list[str]  # the table as it was printed
    scalars: list[tuple[str, str]]  # where it was not kept: the plain fields
    picture: Picture | None
    shown_above: str | None  # the anchor of the picture, where a paper has it
    facts: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    command: str


class Pictures:
    """The pictures of a page, and where they are in it."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.embedded: dict[Path, str] = {}  # the first anchor of each
        self._numbers = itertools.count(1)

    def embed(self, path: Path, alt: str) -> Picture | None:
        """The picture, where there is one that is whole."""
        try:
            content = path.read_bytes()
        except (FileNotFoundError, ValueError):  # the latter of a name that no file can have
            return None
        except OSError as error:
            self.found.complain(path, f"cannot be read ({error.strerror}): left out")
            return None
        if not (content.startswith(PNG) and content.endswith(PNG_END)):
            self.found.complain(path, "is no whole PNG picture: left out")
            return None
        anchor = f"picture-{next(self._numbers)}"
        self.embedded.setdefault(path.resolve(), anchor)
        return Picture("data:image/png;base64," + base64.b64encode(content).decode(), printable(alt), anchor)


def evaluation(result: FileFound, found: Found, pictures: Pictures) -> Evaluation:
    """What a result says."""
    values, above = result.values, pictures.embedded.get(result.picture.resolve())
    lines = _lines(values)
    settings = flatten(mapping(values.get("settings")))
    return Evaluation(
        name=found.name(result.path),
        task=printable(values["task"]),
        about=text(values.get("about")),
        lines=lines,
        scalars=[] if lines else _scalars(values),
        picture=None if above else pictures.embed(result.picture, _in_words(values)),
        shown_above=above,
        facts=_facts(values),
        settings=[(printable(key), text(value)) for key, value in settings.items()],
        command=text(values.get("command")),
    )


def _lines(values: dict[str, Any]) -> list[str]:
    return [printable(line) for line in listed(values.get("lines"))]


def _in_words(values: dict[str, Any]) -> str:
    """What a result's picture shows, for those who do not see it: what it is about, of what, and its first lines."""
    sources = ", ".join(Path(text(one)).name for one in listed(values.get("source"))) or "no source"
    lines = [" ".join(line.split()) for line in _lines(values)]
    said = (lines or [f"{name} {value}" for name, value in _scalars(values)])[:FIRST_LINES]
    return f"{text(values.get('about')) or values['task']}, of {sources}. {'; '.join(said)}"


def _facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """How and on what it was made."""
    seconds = number_of(values.get("seconds"))
    splits = {split: values[split] for split in ("train", "val") if isinstance(values.get(split), dict)}
    data = [(f"{name} images", f"{text(of.get('images'))} of {text(of.get('where'))}") for name, of in splits.items()]
    versions = ", ".join(f"{name} {version}" for name, version in mapping(values.get("versions")).items())
    said = [
        ("sources", ", ".join(text(one) for one in listed(values.get("source")))),
        *data,
        ("date", text(values.get("date"))),
        ("took", duration(seconds) if seconds is not None else ""),
        ("machine", text(values.get("machine"))),
        ("ranks", text(values.get("ranks"))),
        ("versions", printable(versions)),
    ]
    return [(name, value) for name, value in said if value]


def _scalars(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Of what it found, the plain numbers and texts; shares in percent where they are accuracies."""
    found = []
    for key, value in values.items():
        if key not in ABOUT_IT and isinstance(value, str | int | float) and not isinstance(value, bool):
            share = "top" in key and isinstance(value, float) and math.isfinite(value)
            found.append((printable(key), f"{100 * value:.2f} %" if share else text(value)))
    return found


def paper(file: FileFound, found: Found, pictures: Pictures) -> dict[str, Any]:
    """A paper's tables, findings, figures and commands."""
    values = file.values
    commands = [
        {
            **{key: text(one.get(key)) for key in ("name", "command", "state", "why")},
            "seconds": duration(seconds) if (seconds := number_of(one.get("seconds"))) is not None else "",
        }
        for one in map(mapping, listed(values.get("commands")))
    ]
    return {
        "name": found.name(file.path),
        "title": text(values.get("title")) or printable(values["experiment"]),
        **{key: text(values.get(key)) for key in ("source", "about", "scale", "date", "command")},
        "tables": [_table(mapping(one)) for one in listed(values.get("tables"))],
        "findings": [_finding(mapping(one)) for one in listed(values.get("findings"))],
        "figures": [_figure(mapping(one), file, found, pictures) for one in listed(values.get("figures"))],
        "commands": commands,
        "states": Counter(one["state"] for one in commands).most_common(),
    }


def _figure(figure: dict[str, Any], file: FileFound, found: Found, pictures: Pictures) -> dict[str, Any]:
    """A paper's figure; its alternative text says what its result says, where that is among the results."""
    name, about = text(figure.get("name")), text(figure.get("about"))
    place = os.path.abspath(file.path.parent / str(figure.get("result")))
    shown = next((_in_words(one.values) for one in found.results if os.path.abspath(one.path) == place), about)
    path = figure.get("picture")
    picture = pictures.embed(file.path.parent / path, f"{name}: {shown}") if isinstance(path, str) else None
    return {"name": name, "about": about, "picture": picture}


def _table(table: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {"name": text(row.get("name")), "cells": [_cell(mapping(cell)) for cell in listed(row.get("cells"))]}
        for row in map(mapping, listed(table.get("rows")))
    ]
    said = {key: text(table.get(key)) for key in ("name", "title", "unit", "note")}
    columns = [text(column) for column in listed(table.get("columns"))]
    compared = any(cell["paper"] for row in rows for cell in row["cells"])
    return {**said, "columns": columns, "rows": rows, "compared": compared}


def _cell(cell: dict[str, Any]) -> dict[str, str]:
    mean, sd, theirs = (number_of(cell.get(key)) for key in ("mean", "sd", "paper"))
    return {
        "mean": "" if mean is None else short(mean),
        "sd": "" if sd is None else short(sd),
        "n": text(cell.get("n")),
        "paper": "" if theirs is None else short(theirs),
    }


def _finding(finding: dict[str, Any]) -> dict[str, str]:
    value, error, theirs = (number_of(finding.get(key)) for key in ("value", "error", "paper"))
    shown = finding.get("shown") if isinstance(finding.get("shown"), bool) else None
    said = "" if value is None else f"{value:+.4g}" + ("" if error is None else f" ± {short(error)}")
    return {
        "claim": text(finding.get("claim")),
        "verdict": "no result yet" if shown is None and value is None else VERDICTS[shown],
        "value": f"{said} {text(finding.get('unit'))}".strip() if said else "",
        "paper": "" if theirs is None else f"{theirs:+.4g}",
        "why": text(finding.get("why")),
    }


def short(value: float) -> str:
    """To two decimals where that says something, else to three digits."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def text(value: Any) -> str:
    """On one line; nothing of nothing."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else printable(value)


def number_of(value: Any) -> float | None:
    """A number that can be shown; None: it is none."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_one and math.isfinite(value) else None


def listed(value: Any) -> list[Any]:
    """A list as it is, nothing as none, and one thing as the only one."""
    return value if isinstance(value, list) else [] if value is None else [value]


__all__ = ["Evaluation", "Picture", "Pictures", "evaluation", "listed", "paper", "text"]
