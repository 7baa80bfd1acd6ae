"""The page: everything found, in one HTML file that asks nothing of any network."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fasttrain.figures import COLOURS
from fasttrain.printable import printable
from fasttrain.report import environments, results, runs, series
from fasttrain.report.collect import Found

DARK = ("#5ab4f0", "#ff9a4d", "#3fcf9f", "#eba6cd", "#f5c04a", "#9bd8fb", "#ffffff", "#cfab66")
"The same colours, as they are read on a dark ground."
DASHES = ("", "7 4", "8 3 2 3", "2 3", "6 2 2 2 2 2", "1 2", "10 4", "4 2 1 2 1 2")
"Of SVG, as those of :mod:`fasttrain.figures`."
FEW_RUNS = 12
"Runs whose own pictures are in the page too."


def html(found: Found, command: str, made: str) -> bytes:
    """The file's content.

    Args:
        command: that the page is made by.
        made: when.
    """
    pictures = results.Pictures(found)
    papers = [results.paper(one, found, pictures) for one in found.papers]
    evaluations = [results.evaluation(one, found, pictures) for one in found.results]
    groups, silent = environments.groups(found)
    curves = series.curves(found)
    page = {
        "counts": counts(found),
        "papers": papers,
        "columns": runs.table(found),
        "runs": [_run(run, found, pictures) for run in found.runs],
        "few_runs": FEW_RUNS,
        "curves": {**curves, "dashes": DASHES},
        "evaluations": evaluations,
        "groups": groups,
        "facts": environments.facts(groups),
        "silent": silent,
        "complaints": found.complaints,
        "base": printable(found.base),
        "command": printable(command),
        "made": made,
        "light": COLOURS,
        "dark": DARK,
    }
    templates = Environment(
        loader=PackageLoader("fasttrain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("page.html").render(page).encode(errors="backslashreplace")


def counts(found: Found) -> str:
    """Of what, in words."""
    there = {"run": found.runs, "evaluation": found.results, "paper": found.papers}
    return ", ".join(f"{len(those)} {name}{'s' * (len(those) != 1)}" for name, those in there.items() if those)


def _run(run: Any, found: Found, pictures: results.Pictures) -> dict[str, Any]:
    """What the page says of a run beside its line in the table."""
    name = found.name(run.path)
    alt = (
        f"Curves of the run {name} as it drew them at its end: its losses, learning rate and accuracies over its steps"
    )
    return {
        "name": name,
        "command": results.text(run.environment.get("command")),
        "facts": environments.of_run(run.environment),
        "picture": pictures.embed(run.picture, alt) if len(found.runs) <= FEW_RUNS else None,
    }


__all__ = ["counts", "html"]
