"""What a paper's file says: runs, evaluations of them, tables and figures of those, and at which scales.

::

    runs:
      simclr-{penalty}:                     a name; each run's folder is <folder>/<name>_<seed>
        config: pretrain/tikhonov_simclr_cifar10.yaml
        each: {penalty: [0, 0.1, 1, 10]}    a run a value, in names and settings as {penalty}
        set: {terms: {simclr: {penalty: {weight: "{penalty}"}}}}
    evaluations:
      labels: {task: labels, of: [simclr-0], set: {shares: [1, 0.1, 0.01]}}
    scales:
      small: {seeds: [0, 1], set: {pretrain: {model: {width: 0.125}}}}

``set`` holds settings as a YAML file of that script would; ``{name}`` in any of them is a variable of ``each``, a
constant, a place of ``data``, ``{seed}`` or ``{folder}``, and a setting that is a place which is not given is left out.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from fasttrain.config import Config, PathText

Script = Literal["pretrain", "finetune"]
SCRIPTS = ("pretrain", "finetune", "eval")


class RunRecipe(Config):
    """A run, or one for each value of its variables; each with all seeds."""

    script: Script = "pretrain"
    "which of launch/ trains it"
    config: PathText | None = None
    "its YAML file, from here or from configs/"
    needs: list[str] = Field([])
    "places of data; where one is not given the run is left out, and what is of it alone"
    source: str | None = None
    "what it starts from: the name of a run above (of the same seed), or anyone's weights"
    each: dict[str, list[str]] = Field({})
    "variables, each with its values; a run for each combination"
    set: dict[str, Any] = Field({})
    "settings"
    label: str | None = None
    "what it is called in tables and pictures; null: its name"


class EvaluationRecipe(Config):
    """An evaluation of runs, or one for each value of its variables."""

    task: str
    "which, of launch/eval.py"
    of: list[str] = Field(min_length=1)
    "names of runs, * and ? stand for anything; all their seeds"
    source: str = "{dir}"
    "what it is given of each run: {dir} is the run's folder, {run} that folder's name"
    apart: bool = False
    """a command for each run and seed, of tasks that take one source (knn, linear, robust); tables find its results,
    those of all seeds together, under <name>-<run>"""
    needs: list[str] = Field([])
    "names of evaluations that must be done before"
    each: dict[str, list[str]] = Field({})
    "variables, each with its values; an evaluation for each combination"
    set: dict[str, Any] = Field({})
    "settings"


class ColumnRecipe(Config):
    """A column of a table: in which evaluation's result its values are, and where in it."""

    result: str
    "the evaluation's name; variables of the row in braces"
    value: str
    """the way to the value in its JSON, parts separated by /: a key, #n (what has the n-th key, from #0), a number
    (of a list), key=value (those of a list that have it), * (all of them), or key@other=value (the value of a list that
    stands where the list other has it)"""


class TableRecipe(Config):
    """A table: ours beside the paper's."""

    title: str
    "what it shows"
    unit: str = "%"
    "of all values"
    factor: float = 1.0
    "on our values: 100 for shares"
    columns: dict[str, ColumnRecipe] = Field(min_length=1)
    "by name"
    rows: dict[str, dict[str, str]] = Field(min_length=1)
    "by name, the variables' values in it"
    paper: dict[str, list[float | None]] = Field({})
    "by row, the paper's values in the order of the columns"
    note: str | None = None
    "below it"


class Finding(Config):
    """What a paper claims, as a contrast of cells: Σ coefficient · cell is above zero, or near it."""

    claim: str
    "in a sentence"
    contrast: dict[str, float] = Field(min_length=1)
    "coefficients, by table/row/column"
    within: float | None = Field(None, gt=0)
    "the claim is that it is at most so far from zero; null: that it is above zero"


class ScaleRecipe(Config):
    """How large all of it is."""

    about: str = ""
    "what it takes"
    constants: dict[str, str] = Field({})
    "values of constants, instead of the recipe's"
    seeds: list[int] = Field([0], min_length=1)
    "of every run"
    needs: list[str] = Field([])
    "places of data that must be given"
    each: dict[str, list[str]] = Field({})
    "which values of a variable are left; of one that is not named, all"
    set: dict[str, dict[str, Any]] = Field({})
    """settings over those of runs and evaluations, by pretrain, finetune, eval, a task, or names (* and ? stand for
    anything); later ones hold"""
    without: list[str] = Field([])
    "names of runs and evaluations (* and ? stand for anything) that are left out"
    launch: dict[str, str] = Field({})
    "what starts pretrain, finetune and eval; python where it says nothing"
    findings: bool = True
    "whether the paper's claims are looked for"


class Recipe(Config):
    """A paper, at a scale."""

    name: str
    "of the experiment"
    title: str
    "what is reproduced"
    source: str = ""
    "the paper"
    scale: str = "paper"
    "which of the scales"
    folder: PathText = "runs/{name}-{scale}"
    "where runs and results go"
    print: Literal["commands", "all", "tables"] | None = None
    """null: run what is not done; commands: print what can be run now, a line each, for a queue; all: print what is not
    done in the order it must be run in; tables: print the tables of what is there"""
    only: list[str] | None = None
    "names of runs and evaluations (* and ? stand for anything) that are wanted, and what they need; null: all"
    seeds: list[int] | None = None
    "of every run; null: the scale's"
    launch: dict[str, str] = Field({})
    """what starts pretrain, finetune and eval, instead of what the scale says:
    launch.pretrain="torchrun --nproc-per-node 8" """
    data: dict[str, PathText | None] = Field({"root": None})
    "places of data sets, by name; root is the one that runs train on"
    constants: dict[str, str] = Field({})
    "variables of one value, for names and settings"
    runs: dict[str, RunRecipe] = Field({})
    "what is trained, by name"
    evaluations: dict[str, EvaluationRecipe] = Field({})
    "of them, by name"
    tables: dict[str, TableRecipe] = Field({})
    "of results, by name"
    figures: dict[str, str] = Field({})
    "the paper's figures, by name: which evaluation's picture it is"
    findings: list[Finding] = Field([])
    "what the paper claims"
    scales: dict[str, ScaleRecipe] = Field({"paper": ScaleRecipe()}, min_length=1)
    "by name"

    @field_validator("runs", "evaluations")
    @classmethod
    def _are_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if "/" in name or not name.strip(". "):
                raise ValueError(f"'{name}' names a folder: give a name without /")
        return named


__all__ = [
    "SCRIPTS",
    "ColumnRecipe",
    "EvaluationRecipe",
    "Finding",
    "Recipe",
    "RunRecipe",
    "ScaleRecipe",
    "Script",
    "TableRecipe",
]
