"""Which runs, results and papers there are in some folders; what cannot be read becomes a line, never an error."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fasttrain.config import listed
from fasttrain.errors import UsageError
from fasttrain.printable import printable
from fasttrain.run import read_metrics

DEPTH = 4
"Folders below a given one that are looked into."
LARGEST = 64 * 2**20
"Bytes of a JSON file that may be a result: arrays lie beside it."
PASSED_OVER = ("checkpoints", "tensorboard", "__pycache__")
RUN_FILES = ("metrics.jsonl", "environment.json", "config.yaml")
BESIDE = (".png", ".safetensors", ".parts")
NO_RESULTS = ("environment.json", "encoder.json")
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunFound:
    """A run's folder."""

    path: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    weights_step: int | None  # of the exported encoder; None: there is none

    @property
    def picture(self) -> Path:
        return self.path / "curves.png"


@dataclass(frozen=True)
class FileFound:
    """A JSON file of a result or a paper."""

    path: Path
    values: dict[str, Any]

    @property
    def picture(self) -> Path:
        return self.path.with_suffix(".png")


@dataclass
class Found:
    """All that the page shows."""

    runs: list[RunFound] = field(default_factory=list)
    results: list[FileFound] = field(default_factory=list)
    papers: list[FileFound] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    base: Path = Path()  # the folder that holds all of them
    seen: set[str] = field(default_factory=set)

    def name(self, path: Path) -> str:
        """What to call a path on the page: short, and one's own."""
        relative = os.path.relpath(os.path.abspath(path), self.base)
        return printable(path.resolve().name if relative == "." else relative)

    @property
    def members(self) -> list[RunFound | FileFound]:
        return [*self.runs, *self.results, *self.papers]

    def complain(self, path: Path, what: str) -> None:
        self.complaints.append(f"'{printable(path)}' {printable(what)}")


def collect(sources: Sequence[str]) -> Found:
    """What there is in ``sources`` and below.

    Raises:
        UsageError: nothing.
    """
    found = Found()
    foreign = [source for source in map(Path, sources) if source.is_file() and source.suffix != ".json"]
    for source in map(Path, sources):
        if source in foreign or _is_beside_a_result(source):
            continue
        before = len(found.members), len(found.complaints)
        if source.is_dir():
            _walk(source, found, DEPTH)
        elif source.is_file():
            _file(source, found)
        else:
            found.complain(source, "is not there")
        if (len(found.members), len(found.complaints)) == before and not _known(source, found):
            found.complain(source, "holds no run, no result and no experiment.json: left out")
    if strange := [repr(printable(path)) for path in foreign if not _is_beside_a_result(path)]:
        found.complaints.append(f"no folder and no JSON, and so left out: {listed(strange)}")
    if not found.members:
        said = f" ({found.complaints[0]})" if found.complaints else ""
        raise UsageError(
            f"nothing to report on in {', '.join(sources[:3])}{said}: give runs' folders, eval-*.json or both"
        )
    found.base = _common([member.path for member in found.members])
    return found


def _common(paths: list[Path]) -> Path:
    """The folder that holds all of them; of runs in it, it is none itself."""
    return Path(os.path.commonpath([path.absolute().parent for path in paths]))


def _is_beside_a_result(path: Path) -> bool:
    """What ``runs/*`` gives too: a result's picture, arrays and parts, and an earlier page."""
    return path.suffix == ".html" or (path.suffix in BESIDE and path.with_suffix(".json").is_file())


def _known(path: Path, found: Found) -> bool:
    """Given twice, or below another that was given: no mistake."""
    real, there = os.path.realpath(path), [os.path.realpath(member.path) for member in found.members]
    return any(one == real or one.startswith(real + os.sep) for one in there)


def _first_seen(path: Path, found: Found) -> bool:
    real = os.path.realpath(path)
    if real in found.seen:
        return False
    found.seen.add(real)
    return True


def _walk(folder: Path, found: Found, depth: int) -> None:
    try:
        members = sorted(folder.iterdir(), key=lambda path: _natural(path.name))
        if _is_run(folder) and _first_seen(folder, found):
            found.runs.append(_run(folder, found))
        for path in members:
            if path.suffix == ".json" and path.name not in NO_RESULTS and path.is_file():
                _file(path, found, given=False)
            elif depth and not _is_passed_over(path.name) and path.is_dir():
                _walk(path, found, depth - 1)
    except OSError as error:
        found.complain(folder, f"cannot be read ({error.strerror}): left out")


def _natural(name: str) -> list[tuple[int, str]]:
    """run_9 before run_10."""
    digits = "".join(c if c.isdecimal() and c.isascii() else " " for c in name).split()
    words, rest = [], name
    for number in digits:
        before, _, rest = rest.partition(number)
        words += [(0, before), (int(number[:18]), "")]
    return [*words, (0, rest)]


def _is_passed_over(name: str) -> bool:
    return name in PASSED_OVER or name.startswith((".", "not-finite-step-")) or name.endswith(".parts")


def _is_run(folder: Path) -> bool:
    there = [(folder / name).is_file() for name in RUN_FILES]
    return any(there[:2]) or (there[2] and (folder / "checkpoints").is_dir())


def _run(folder: Path, found: Found) -> RunFound:
    card = mapping(_read(folder / "encoder.json", found))
    return RunFound(
        path=folder,
        settings=mapping(_read(folder / "config.yaml", found)),
        environment=mapping(_read(folder / "environment.json", found)),
        metrics=_metrics(folder / "metrics.jsonl", found),
        weights_step=card["step"] if isinstance(card.get("step"), int) else None,
    )


def _metrics(path: Path, found: Found) -> list[dict[str, Any]]:
    """Its lines, and a complaint of those that cannot be read."""
    lines = read_metrics(path)
    try:
        there = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    except FileNotFoundError:
        return lines
    except OSError as error:
        found.complain(path, f"cannot be read ({error.strerror})")
        return lines
    if lost := there - len(lines):
        found.complain(path, f"has {lost:,} of {there:,} lines that cannot be read: left out")
    return lines


def _file(path: Path, found: Found, given: bool = True) -> None:
    """A JSON file: a result, a paper, or neither, of which only one that was given is worth a line."""
    before = len(found.complaints)
    values = _read(path, found) if _first_seen(path, found) else None
    if isinstance(values, dict) and isinstance(values.get("experiment"), str):
        found.papers.append(FileFound(path, values))
    elif isinstance(values, dict) and isinstance(values.get("task"), str):
        found.results.append(FileFound(path, values))
    elif len(found.complaints) == before and given and values is not None:
        found.complain(path, "is no result (it names no task) and no experiment.json: left out")


def _read(path: Path, found: Found) -> Any:
    """Of JSON or YAML; None, with a complaint unless it is just not there, of what cannot be read."""
    try:
        if path.stat().st_size > LARGEST:
            found.complain(path, f"is larger than {LARGEST >> 20} MiB: left out")
            return None
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, YAML_LOADER)
    except FileNotFoundError:
        return None
    except OSError as error:
        found.complain(path, f"cannot be read ({error.strerror}): left out")
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        found.complain(path, f"is not whole {kind} ({' '.join(str(error).split())[:80]}): left out")
    return None


def mapping(value: Any) -> dict[str, Any]:
    """A mapping as it is, and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


__all__ = ["FileFound", "Found", "RunFound", "collect", "mapping"]
