"""A recipe becomes jobs: the commands a person would type, each with where its result goes and what it needs."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fasttrain.config import flatten
from fasttrain.errors import UsageError
from fasttrain.experiments.recipe import SCRIPTS, EvaluationRecipe, Recipe, RunRecipe, ScaleRecipe

VARIABLE = re.compile(r"\{([^\W\d]\w*)\}")
PLAIN = re.compile(r"[\w./+~-]+")

Variables = Mapping[str, str | None]


class Job(NamedTuple):
    """A command, of a run or of an evaluation."""

    name: str
    script: str  # pretrain, finetune or eval
    launcher: str
    arguments: list[str]
    result: Path  # a run's folder, an evaluation's JSON file
    needs: tuple[str, ...]  # names of jobs
    label: str  # what it is called in tables and pictures; of an evaluation its task

    @property
    def is_run(self) -> bool:
        return self.script != "eval"

    @property
    def line(self) -> str:
        """As a shell reads it."""
        return shlex.join([*shlex.split(self.launcher), self.path, *self.arguments])

    @property
    def path(self) -> str:
        """Of the script, from here where it is below."""
        return from_here(LAUNCH / f"{self.script}.py")

    @property
    def words(self) -> list[str]:
        """As it is started: by the programs of this Python."""
        first, *rest = shlex.split(self.launcher)
        beside = Path(sys.executable).parent / first
        first = sys.executable if first in ("python", "python3") else str(beside) if beside.exists() else first
        return [first, *rest, self.path, *self.arguments]


class Plan:
    """All jobs of a recipe at its scale, in an order in which they can run.

    Raises:
        UsageError: a name, variable, scale or place that there is not, or that nothing reads; two jobs of one name; a
            place that the scale needs and nothing gives.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        if recipe.scale not in recipe.scales:
            raise UsageError(f"scale={recipe.scale}: there is none of that name, give {', '.join(recipe.scales)}")
        self.scale: ScaleRecipe = recipe.scales[recipe.scale]
        for place in self.scale.needs:
            if recipe.data.get(place) is None:
                raise UsageError(f"scale={recipe.scale} needs data.{place}: give data.{place}=/…")
        self.folder = Path(filled(recipe.folder, {"name": recipe.name, "scale": recipe.scale}))
        self.seeds = recipe.seeds or self.scale.seeds
        self.absent: dict[str, str] = {}  # what is left out for want of data, and why
        self._runs: dict[str, list[Job]] = {}  # by their name without the seed
        self.results: dict[str, list[Job]] = {}  # of evaluations, by the name that tables know
        self.jobs: dict[str, Job] = {}
        for job in itertools.chain(self._expanded_runs(), self._expanded_evaluations()):
            if job.name in self.jobs:
                raise UsageError(f"two jobs are called '{job.name}': give them names that differ")
            self.jobs[job.name] = job
        self._check_that_all_is_read()
        if recipe.only is not None:
            self._keep(recipe.only)

    @cached_property
    def places(self) -> dict[str, str | None]:
        """Of data, and the experiment's folder; and the constants."""
        return {**self.recipe.data, "folder": str(self.folder)} | self.recipe.constants | self.scale.constants

    def values(self, variables: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
        """Each combination of the variables' values, of those that there are at the scale."""
        lists = [[v for v in values if v in self.scale.each.get(name, values)] for name, values in variables.items()]
        for combination in itertools.product(*lists):
            yield dict(zip(variables, combination, strict=True))

    def _expanded_runs(self) -> Iterator[Job]:
        for template, run in self.recipe.runs.items():
            for values in self.values(run.each):
                name = filled(template, values)
                absent = [place for place in run.needs if self.recipe.data.get(place) is None]
                if absent:
                    self.absent[name] = f"data.{absent[0]} is not given"
                if absent or left_out(self.scale, name):
                    continue
                self._runs[name] = [self._run(name, run, values, seed) for seed in self.seeds]
                yield from self._runs[name]

    def _run(self, name: str, run: RunRecipe, values: dict[str, str], seed: int) -> Job:
        variables = self.places | values | {"seed": str(seed)}
        arguments: list[str] = []
        needs: tuple[str, ...] = ()
        if run.config is not None:
            arguments.append(from_here(find_config(filled(run.config, variables))))
        if run.source is not None:
            source = filled(run.source, variables)
            if source in self._runs:
                job = self._runs[source][self.seeds.index(seed)]
                source, needs = str(job.result), (job.name,)
            arguments.append(f"{SOURCE[run.script]}={source}")
        settings = self._settings(run.set, variables, run.script, name)
        if self.recipe.data.get("root") is not None:
            settings = {"data.root": self.recipe.data["root"]} | settings
        folder = self.folder / f"{name}_{seed}"
        settings |= {"run.seed": seed, "run.dir": str(folder)}
        arguments += [f"{key}={text_of(value)}" for key, value in settings.items()]
        label = filled(run.label or name, variables)
        return Job(f"{name}_{seed}", run.script, self._launcher(run.script), arguments, folder, needs, label)

    def _expanded_evaluations(self) -> Iterator[Job]:
        for template, evaluation in self.recipe.evaluations.items():
            for values in self.values(evaluation.each):
                name = filled(template, values)
                if left_out(self.scale, name):
                    continue
                runs = self._runs_of(name, [filled(text, values) for text in evaluation.of])
                if not runs:
                    continue
                for other in (needs := [filled(other, values) for other in evaluation.needs]):
                    if other not in self.results:
                        raise UsageError(f"evaluations.{name} needs '{other}', and none before it is called so")
                waits = [job.name for other in needs for job in self.results[other]]
                if evaluation.apart:
                    found = {f"{name}-{run}": jobs for run, jobs in runs.items()}
                    single = {f"{name}-{job.name}": (called, [job]) for called, jobs in found.items() for job in jobs}
                else:
                    single = {name: (name, [job for jobs in runs.values() for job in jobs])}
                for one, (called, jobs) in single.items():
                    job = self._evaluation(one, name, evaluation, values, jobs, waits)
                    self.results.setdefault(called, []).append(job)
                    yield job

    def _runs_of(self, name: str, patterns: list[str]) -> dict[str, list[Job]]:
        """The runs, by name, that an evaluation is of; {} where all of them are left out."""
        found: dict[str, list[Job]] = {}
        for pattern in patterns:
            those = {run: jobs for run, jobs in self._runs.items() if fnmatchcase(run, pattern)}
            elsewhere = (wild(template) for template in self.recipe.runs)  # at another scale
            if not those and not any(fnmatchcase(pattern, one) or fnmatchcase(one, pattern) for one in elsewhere):
                raise UsageError(f"evaluations.{name}: no run is called '{pattern}'; they are {', '.join(self._runs)}")
            found |= those
        return found

    def _evaluation(
        self,
        name: str,
        called: str,
        evaluation: EvaluationRecipe,
        values: dict[str, str],
        jobs: list[Job],
        waits: list[str],
    ) -> Job:
        variables = self.places | values
        settings = self._settings(evaluation.set, variables, "eval", evaluation.task, called)
        if not evaluation.apart:
            settings.setdefault("names", [job.label for job in jobs])
        output = self.folder / f"eval-{name}.json"
        arguments = [evaluation.task]
        for job in jobs:
            arguments.append(filled(evaluation.source, variables | {"dir": str(job.result), "run": job.result.name}))
        arguments += [f"{key}={text_of(value)}" for key, value in settings.items()] + [f"output={output}"]
        needs = (*[job.name for job in jobs], *waits)
        return Job(name, "eval", self._launcher("eval"), arguments, output, needs, evaluation.task)

    def _settings(self, own: dict[str, Any], variables: Variables, *called: str) -> dict[str, Any]:
        """Of a run or an evaluation that is ``called`` so, by dotted keys; those of the scale are over its own."""
        settings = flatten(own)
        for pattern, over in self.scale.set.items():
            if any(fnmatchcase(name, filled(pattern, variables, strict=False)) for name in called):
                settings |= flatten(over)
        found = {key: substituted(value, variables) for key, value in settings.items()}
        return {key: value for key, value in found.items() if value is not LEFT_OUT}

    def _launcher(self, script: str) -> str:
        return self.recipe.launch.get(script) or self.scale.launch.get(script) or "python"

    def _check_that_all_is_read(self) -> None:
        """
        Raises:
            UsageError: a pattern, variable, place or constant that is given, and nothing is meant by it.
        """
        recipe, scale = self.recipe, self.scale
        templates = [*recipe.runs, *recipe.evaluations]
        names = {
            *self._runs,
            *self.jobs,
            *map(wild, templates),
            *SCRIPTS,
            *(e.task for e in recipe.evaluations.values()),
        }
        for key, patterns in (("set", scale.set), ("without", scale.without)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) or fnmatchcase(pattern, name) for name in names):
                    raise UsageError(f"scales.{recipe.scale}.{key}: nothing is called '{pattern}'")
        variables = {name for part in (*recipe.runs.values(), *recipe.evaluations.values()) for name in part.each}
        mentioned = set(VARIABLE.findall(json.dumps(recipe.model_dump(), ensure_ascii=False)))
        given = {name for name, place in recipe.data.items() if place is not None} - {"root"}
        for key, there, known in (
            (f"scales.{recipe.scale}.each", scale.each, variables),
            (f"scales.{recipe.scale}.launch", scale.launch, set(SCRIPTS)),
            ("launch", recipe.launch, set(SCRIPTS)),
            ("data", given, mentioned),
            ("constants", recipe.constants, mentioned),
            (f"scales.{recipe.scale}.constants", scale.constants, set(recipe.constants)),
        ):
            for name in sorted(set(there) - known):
                raise UsageError(f"{key}.{name} is given, and nothing reads it")

    def _keep(self, only: list[str]) -> None:
        wanted: set[str] = set()
        for pattern in only:
            found = [
                n for n, job in self.jobs.items() if fnmatchcase(n, pattern) or fnmatchcase(unseeded(job), pattern)
            ]
            if not found:
                raise UsageError(f"only=[{pattern}]: nothing is called so; there are {', '.join(self.jobs)}")
            wanted |= set(found)
        for name in reversed(self.jobs):
            if name in wanted:
                wanted |= set(self.jobs[name].needs)
        self.jobs = {name: job for name, job in self.jobs.items() if name in wanted}


LAUNCH = Path(__file__).parents[2] / "launch"
CONFIGS = LAUNCH.parent / "configs"
SOURCE = {"pretrain": "model.weights", "finetune": "source"}
"The setting that says what a run starts from."
LEFT_OUT = object()


def unseeded(job: Job) -> str:
    """A run's name without its seed."""
    return job.name.rpartition("_")[0] if job.is_run else job.name


def left_out(scale: ScaleRecipe, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in scale.without)


def wild(template: str) -> str:
    """A pattern of all names that the template gives."""
    return VARIABLE.sub("*", template)


def filled(template: str, variables: Variables, strict: bool = True) -> str:
    """``template`` with the variables' values in the place of their names in braces.

    Raises:
        UsageError: there is no such variable, or its place is not given; with ``strict``.
    """

    def value(match: re.Match[str]) -> str:
        found = variables.get(match[1])
        if found is None and strict:
            known = ", ".join(f"{{{name}}}" for name, value in variables.items() if value is not None)
            raise UsageError(f"'{template}': {match[0]} stands for nothing here ({known or 'no variable'} would)")
        return match[0] if found is None else found

    return VARIABLE.sub(value, template)


def substituted(value: Any, variables: Variables) -> Any:
    """A setting's value with its variables filled in; :data:`LEFT_OUT` where it is a place that is not given."""
    if isinstance(value, list):
        return [substituted(part, variables) for part in value]
    if not isinstance(value, str):
        return value
    alone = VARIABLE.fullmatch(value)
    if alone and alone[1] in variables and variables[alone[1]] is None:
        return LEFT_OUT
    return filled(value, variables)


def text_of(value: Any) -> str:
    """As ``key=text`` on a command line wants it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(text_of(part) if not isinstance(part, str) else quoted(part) for part in value)}]"
    return "null" if value is None else str(value)


def quoted(text: str) -> str:
    """An item of a list."""
    return text if PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def find_config(text: str) -> Path:
    """A YAML file, from here or from ``configs/``.

    Raises:
        UsageError: there is none.
    """
    for path in (Path(text), CONFIGS / text):
        if path.is_file():
            return path
    raise UsageError(f"config: {text}: there is no such file, here or in {CONFIGS}")


def from_here(path: Path) -> str:
    """As it is typed: from here where it is below, else whole."""
    absolute, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(absolute, here) if absolute.startswith(here + os.sep) else absolute


__all__ = ["Job", "Plan", "filled", "from_here", "text_of", "unseeded", "wild"]
