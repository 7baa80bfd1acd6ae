"""Tables of results, ours beside the paper's, and whether what the paper claims shows in them."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.errors import UsageError
from fasttrain.experiments.commands import Plan, filled, wild
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
    paper: float | None  # the contrast of the paper's values, where it gives them
    why: str | None


def tables_of(plan: Plan) -> list[Table]:
    """All tables, of what is done; cells of what is not are empty.

    Raises:
        UsageError: a column's result is of no evaluation, or its value no number; the paper has values of another row
            than the table's, or fewer or more of a row than there are columns.
    """
    found = [_table(name, table, plan) for name, table in plan.recipe.tables.items()]
    return [table for table in found if table.rows]


def _table(name: str, table: TableRecipe, plan: Plan) -> Table:
    rows: dict[str, list[Cell]] = {}
    for row in table.paper.keys() - table.rows.keys():
        raise UsageError(f"tables.{name}.paper: there is no row '{row}'; they are {', '.join(table.rows)}")
    for row, values in table.rows.items():
        if any(value not in plan.scale.each.get(variable, [value]) for variable, value in values.items()):
            continue  # at another scale
        paper = table.paper.get(row) or [None] * len(table.columns)
        if len(paper) != len(table.columns):
            raise UsageError(
                f"tables.{name}.paper: '{row}' has {len(paper)} values for {len(table.columns)} columns: give one each"
            )
        variables = plan.places | values
        results = [filled(column.result, variables) for column in table.columns.values()]
        for result in results:
            if not any(fnmatchcase(result, f"{wild(template)}*") for template in plan.recipe.evaluations):
                raise UsageError(f"tables.{name}: '{result}' is no evaluation; they are {', '.join(plan.results)}")
        if plan.results.keys().isdisjoint(results):
            continue  # for want of data, or at another scale
        ways = [filled(column.value, variables) for column in table.columns.values()]
        ours = [_value(plan, result, way, table.factor) for result, way in zip(results, ways, strict=True)]
        rows[row] = [Cell(*cell) for cell in zip(ours, paper, strict=True)]
    return Table(name, table.title, table.unit, list(table.columns), rows, table.note)


def _value(plan: Plan, result: str, way: str, factor: float) -> Value | None:
    jobs = [job for job in plan.results.get(result, []) if job.name in plan.jobs]
    if not jobs or not all(is_done(job, plan.jobs) for job in jobs):
        return None
    return value_of([read(job.result) for job in jobs], way, factor)


def verdicts_of(plan: Plan, tables: list[Table]) -> list[Verdict]:
    """Of all findings, where the scale looks for them.

    Raises:
        UsageError: as :func:`verdict`.
    """
    found = [verdict(finding, plan, tables) for finding in plan.recipe.findings]
    return found if plan.scale.findings else []


def verdict(finding: Finding, plan: Plan, tables: list[Table]) -> Verdict:
    """Whether Σ coefficient · cell is as the paper claims.

    The standard error is √Σ (coefficient · sd)² / n. What lies within two of them of the border cannot be told.

    Raises:
        UsageError: a cell that no table has at any scale.
    """
    cells = {name: _cell(name, plan, tables) for name in finding.contrast}
    unit = plan.recipe.tables[next(iter(cells)).partition("/")[0]].unit
    paper, value, squares = 0.0, 0.0, 0.0
    for name, cell in cells.items():
        coefficient = finding.contrast[name]
        if cell.ours is None:
            return Verdict(finding.claim, None, None, None, unit, None, f"{name} is not there")
        value += coefficient * cell.ours.mean
        paper += math.nan if cell.paper is None else coefficient * cell.paper
        squares += math.nan if cell.ours.sd is None else (coefficient * cell.ours.sd) ** 2 / cell.ours.n
    error = None if math.isnan(squares) else math.sqrt(squares)
    theirs = None if math.isnan(paper) else paper
    margin = value if finding.within is None else finding.within - abs(value)
    if error is not None and abs(margin) <= 2 * error:
        return Verdict(finding.claim, None, value, error, unit, theirs, "within two standard errors of the border")
    return Verdict(finding.claim, margin > 0, value, error, unit, theirs, None if error is not None else "of one seed")


def _cell(name: str, plan: Plan, tables: list[Table]) -> Cell:
    """An empty one where there is none at the scale.

    Raises:
        UsageError: there is none at any.
    """
    table, _, rest = name.partition("/")
    row, _, column = rest.partition("/")
    recipe = plan.recipe.tables.get(table)
    if recipe is None or row not in recipe.rows or column not in recipe.columns:
        raise UsageError(f"findings: '{name}' is no table/row/column of {', '.join(plan.recipe.tables) or 'any table'}")
    for one in tables:
        if one.name == table and row in one.rows:
            return one.rows[row][one.columns.index(column)]
    return Cell(None, None)


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
    return ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]


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
    paper = f", paper {verdict.paper:+.2f}" if verdict.paper is not None else ""
    why = f"; {verdict.why}" if verdict.why else ""
    return f"{word}: {verdict.claim} ({verdict.value:+.2f}{error} {verdict.unit}{paper}{why})"


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


__all__ = [
    "Cell",
    "Table",
    "Verdict",
    "figures",
    "markdown",
    "said",
    "shown",
    "summary",
    "tables_of",
    "verdict",
    "verdicts_of",
]
