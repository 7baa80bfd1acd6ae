"""A benchmark's files, written whole again whenever something is found: a time limit loses nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fasttrain.benchmarks.timing import Report, bars
from fasttrain.errors import UsageError
from fasttrain.output import try_output, write_output

ELSEWHERE = "choose another place with output=…"
INCOMPLETE = "**Incomplete**: written while it ran; what is missing here was not measured, or not in all rounds."


class Record:
    """What is found, as JSON and as a Markdown table, and in the end a chart a task.

    Args:
        places: where "numbers" and "table" go, and each task's chart.
        title: of the table.
        lines: below it.
        facts: what the JSON says beside the rows.

    Raises:
        UsageError: one of the places cannot be written.
    """

    def __init__(self, places: Mapping[str, Path], title: str, lines: list[str], facts: Mapping[str, Any]) -> None:
        self._places, self._head, self._facts = places, [f"# {title}", *lines], facts
        for place in places.values():
            try_output(place, ELSEWHERE)

    def keep(self, reports: Mapping[str, Report]) -> None:
        """Write what is there so far, by task; that it cannot be written is said at the end."""
        with suppress(UsageError):
            self._write(reports, complete=False)

    def finish(self, reports: Mapping[str, Report]) -> None:
        """Print and write all of it.

        Raises:
            UsageError: it cannot be written.
        """
        print(self._text(reports, complete=True), flush=True)
        self._write(reports, complete=True)
        for task, report in reports.items():
            if report.unit:
                write_output(self._places[task], bars(report.bars, report.unit), ELSEWHERE)

    def _text(self, reports: Mapping[str, Report], complete: bool) -> str:
        lines = self._head if complete else [*self._head, INCOMPLETE]
        for task, report in reports.items():
            lines = [*lines, *[f"## {task.capitalize()}"] * (len(reports) > 1), report.text]
        return "\n\n".join(lines)

    def _write(self, reports: Mapping[str, Report], complete: bool) -> None:
        rows = [{"task": task} | row for task, report in reports.items() for row in report.rows]
        numbers = plain({**self._facts, "complete": complete, "rows": rows})
        write_output(self._places["table"], self._text(reports, complete) + "\n", ELSEWHERE)
        write_output(self._places["numbers"], json.dumps(numbers, indent=1, allow_nan=False) + "\n", ELSEWHERE)


def plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["ELSEWHERE", "Record", "plain"]
