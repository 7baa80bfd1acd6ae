"""Tables of results, ours beside the paper's, and whether what the paper claims shows in them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.errors import UsageError
from fasttrain.experiments.commands import Plan, filled
from fasttrain.experiments.recipe import Finding, TableRecipe
from fasttrain.experiments.results import Value, is_done, read, value_of


class Cell(NamedTuple):
    """Ours, and the paper's; None: there is none."""

    ours: Value | None
    paper: float | None


class Table(NamedTuple):
    """Rows of those that there are at the scale."""

    name: str
    title: str
    unit: str
    columns: list[str]
    rows: dict[str, list[Cell]]
    note: str | None


class Verdict(NamedTuple):
    """Of a claim: whether it shows in our cells. None: it cannot be told."""

    claim: str
    shown: bool | None
    value: float | None  # of the contrast
    error: float | None  # its standard error; None: a cell is of one value
    unit: str
    why: str | None


def tables_of(plan: Plan) -> list[Table]:
    """All tables, of what is done; cells of what is not are empty.

    Raises:
        UsageError: a column's result is of no evaluation, or its value no number; a row has fewer or more of the paper's
            values than there are columns.
    """
    found = [_table(name, table, plan) for name, table in plan.recipe.tables.items()]
    return [table for table in found if table.rows]


def _table(name: str, table: TableRecipe, plan: Plan) -> Table:
    rows = {}
    for row, values in table.rows.items():
        if any(value not in plan.scale.each.get(variable, [value]) for variable, value in values.items()):
            continue  # at another scale
        paper = table.paper.get(row) or [None] * len(table.columns)
        if len(paper) != len(table.columns):
            raise UsageError(
                f"tables.{name}.paper: '{row}' has {len(paper)} values for {len(table.columns)} columns: give one each"
            )
        cells, variables = [], plan.places | values
        for column, theirs in zip(table.columns.values(), paper, strict=True):
            ours = _value(plan, filled(column.result, variables), filled(column.value, variables), table.factor)
            cells.append(Cell(ours, theirs))
        rows[row] = cells
    return Table(name, table.title, table.unit, list(table.columns), rows, table.note)


def _value(plan: Plan, result: str, way: str, factor: float) -> Value | None:
    jobs = [job for job in plan.results.get(result, []) if job.name in plan.jobs]
    if not jobs or not all(is_done(job, plan.jobs) for job in jobs):
        return None
    return value_of([read(job.result) for job in jobs], way, factor)


def verdict(finding: Finding, tables: list[Table]) -> Verdict:
    """Whether Σ coefficient · cell is as the paper claims.

    The standard error is √Σ (coefficient · sd)² / n. What lies within two of them of the border cannot be told.

    Raises:
        UsageError: a cell's name has not three parts.
    """
    value, squares, unit = 0.0, 0.0, ""
    for name, coefficient in finding.contrast.items():
        parts = name.split("/")
        if len(parts) != 3:
            raise UsageError(f"findings: '{name}' is no table/row/column")
        table = next((table for table in tables if table.name == parts[0]), None)
        cell = _cell(table, *parts[1:])
        if table is None or cell is None:
            return Verdict(finding.claim, None, None, None, unit, f"{name} is not there")
        value, unit = value + coefficient * cell.mean, table.unit
        squares += math.nan if cell.sd is None else (coefficient * cell.sd) ** 2 / cell.n
    error = None if math.isnan(squares) else math.sqrt(squares)
    margin = value if finding.within is None else finding.within - abs(value)
    if error is not None and abs(margin) <= 2 * error:
        return Verdict(finding.claim, None, value, error, unit, "within two standard errors")
    return Verdict(finding.claim, margin > 0, value, error, unit, None if error is not None else "of one seed each")


def _cell(table: Table | None, row: str, column: str) -> Value | None:
    if table is None or row not in table.rows or column not in table.columns:
        return None
    return table.rows[row][table.columns.index(column)].ours


def markdown(plan: Plan, tables: list[Table], verdicts: list[Verdict]) -> str:
    """A page of all tables, findings and figures, for those who read text."""
    recipe = plan.recipe
    lines = [f"# {recipe.title}", "", f"{recipe.source}", "", f"Scale `{recipe.scale}`: {plan.scale.about}", ""]
    for table in tables:
        lines += [f"## {table.title}", "", *_rows(table), ""]
        lines += [table.note, ""] if table.note else []
    if verdicts:
        lines += ["## Does it show?", ""]
        lines += [f"- {said(one)}" for one in verdicts] + [""]
    for name, _, picture in figures(plan):
        lines += [f"## {name}", "", f"![{name}]({picture.name})", ""]
    return "\n".join(lines)


def _rows(table: Table) -> list[str]:
    head = [table.title.partition(":")[0], *[f"{column} ({table.unit})" for column in table.columns]]
    rows = [head, ["---"] * len(head)]
    rows += [[name, *map(shown, cells)] for name, cells in table.rows.items()]
    return ["| " + " | ".join(row) + " |" for row in rows]


def shown(cell: Cell) -> str:
    """``71.90 ± 0.31 (n = 3), paper 71.9``."""
    ours = "–" if cell.ours is None else f"{cell.ours} (n = {cell.ours.n})"
    return ours + (f", paper {cell.paper:g}" if cell.paper is not None else "")


def said(verdict: Verdict) -> str:
    """``shown: <claim> (+3.10 ± 0.42 %)``."""
    word = {True: "shown", False: "not shown", None: "not told"}[verdict.shown]
    if verdict.value is None:
        return f"{word}: {verdict.claim} ({verdict.why})"
    error = f" ± {verdict.error:.2f}" if verdict.error is not None else ""
    why = f"; {verdict.why}" if verdict.why else ""
    return f"{word}: {verdict.claim} ({verdict.value:+.2f}{error} {verdict.unit}{why})"


def figures(plan: Plan) -> list[tuple[str, Path, Path]]:
    """The paper's figures that there are: name, the result, its picture."""
    found = []
    for name, result in plan.recipe.figures.items():
        for job in plan.results.get(result, []):
            picture = job.result.with_suffix(".png")
            if is_done(job, plan.jobs) and picture.is_file():
                found.append((name, job.result, picture))
    return found


def summary(plan: Plan, tables: list[Table], verdicts: list[Verdict]) -> dict[str, Any]:
    """The same as JSON has it, paths relative to the experiment's folder."""
    recipe = plan.recipe
    return {
        "experiment": recipe.name,
        "title": recipe.title,
        "source": recipe.source,
        "scale": recipe.scale,
        "about": plan.scale.about,
        "tables": [
            {
                "name": table.name,
                "title": table.title,
                "unit": table.unit,
                "columns": table.columns,
                "note": table.note,
                "rows": [{"name": row, "cells": list(map(_plain, cells))} for row, cells in table.rows.items()],
            }
            for table in tables
        ],
        "findings": [one._asdict() for one in verdicts],
        "figures": [
            {
                "name": name,
                "about": read(result).get("about", ""),
                "result": result.name,
                "picture": picture.name,
            }
            for name, result, picture in figures(plan)
        ],
    }


def _plain(cell: Cell) -> dict[str, Any] | None:
    if cell.ours is None and cell.paper is None:
        return None
    ours = cell.ours._asdict() if cell.ours is not None else {"mean": None, "sd": None, "n": 0}
    return {**ours, "paper": cell.paper}


__all__ = ["Cell", "Table", "Verdict", "figures", "markdown", "said", "shown", "summary", "tables_of", "verdict"]
