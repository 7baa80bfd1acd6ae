"""Reproduce a paper: run what its file names, evaluate it, and make its tables and figures.

  python launch/experiment.py configs/experiments/tikhonov.yaml scale=small data.root=/data/cifar10
  python launch/experiment.py configs/experiments/tikhonov.yaml scale=smoke              a minute or two, embedded data
  python launch/experiment.py … print=commands | parallel -j 4         what can run now, a line each: for a queue
  python launch/experiment.py … print=tables                           of what is there
  python launch/experiment.py … 'only=[simclr-*]' seeds=[0,1]          a part of it

What is done is passed over, what was begun goes on: the same command again does what is missing. Each run and
evaluation is a command of its own, with a folder and a log; one that fails does not stop the others, and is named at
the end (code 1). Ctrl-C, SIGTERM and SIGUSR1 let what is under way save itself, and end with code 75. The tables are
printed and written to tables.md and experiment.json in the experiment's folder; launch/report.py makes a page of it.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from fasttrain import cli, distributed
from fasttrain.config import Config, load
from fasttrain.environment import command, now
from fasttrain.errors import UsageError
from fasttrain.experiments import queue, tables
from fasttrain.experiments.commands import Job, Plan
from fasttrain.experiments.recipe import Recipe
from fasttrain.experiments.results import read
from fasttrain.output import try_output, write_output
from fasttrain.printable import printable

ExperimentConfig = Recipe  # what other scripts call a YAML file that is meant for this one

ELSEWHERE = "choose another place with folder=…"


def experiment(recipe: Recipe) -> int:
    plan = Plan(recipe)
    tables.verdicts_of(plan, tables.tables_of(plan))  # a table that cannot be made is said before the work
    for job in plan.jobs.values():
        check(job)
    for name, why in plan.absent.items():
        distributed.say(f"{name} is left out: {why}")
    if recipe.print in ("commands", "all"):
        return print_commands(plan, recipe.print == "commands")
    try_output(plan.folder / "experiment.json", ELSEWHERE)
    jobs = queue.Queue(plan, distributed.say)
    outcomes = queue.outcomes(plan) if recipe.print == "tables" else jobs.run()
    report(plan, outcomes)
    if jobs.stopped:
        distributed.say("stopped: what was under way has saved itself, and the same command goes on")
        return cli.EXIT_SAVED_ON_SIGNAL
    return cli.EXIT_FAILED if any(outcome.state == "failed" for outcome in outcomes.values()) else 0


def check(job: Job) -> None:
    """See that the command can be meant: its keys and values are those of its script.

    Raises:
        UsageError: they are not; it names the job.
    """
    script = import_module(job.script)
    schema: type[Config]
    if job.script == "eval":
        schema, positional = script.schema_of(job.arguments[0]), ("task", "source")
    else:
        schema, positional = getattr(script, f"{job.script.capitalize()}Config"), ()
    try:
        load(schema, job.arguments, positional=positional)
    except UsageError as error:
        raise UsageError(f"{job.name}: {error}") from None


def print_commands(plan: Plan, now_only: bool) -> int:
    """A line each, on standard output; how many others there are, on standard error."""
    outcomes = queue.outcomes(plan)
    missing = [job for name, job in plan.jobs.items() if outcomes[name].state != "done"]
    ready = queue.ready(plan) if now_only else missing
    for job in ready:
        print(job.line)
    if len(ready) < len(missing):
        distributed.say(f"{len(missing) - len(ready)} others need what these make: print again when they are done")
    return 0


def report(plan: Plan, outcomes: dict[str, queue.Outcome]) -> None:
    """Print and write the tables; name what failed and what is missing."""
    found = tables.tables_of(plan)
    verdicts = tables.verdicts_of(plan, found)
    text = tables.markdown(plan, found, verdicts)
    print(text, flush=True)
    place = plan.folder / "experiment.json"
    facts: dict[str, Any] = tables.summary(plan, found, verdicts)
    facts |= {"date": now(), "command": command(), "commands": states(plan, outcomes, read(place).get("commands"))}
    write_output(plan.folder / "tables.md", text, ELSEWHERE)
    write_output(place, json.dumps(facts, indent=1, ensure_ascii=False) + "\n", ELSEWHERE)
    print(f"{'written to':16s}{printable(str(plan.folder / 'tables.md'))}")
    for state in ("failed", "missing"):
        for name, outcome in outcomes.items():
            if outcome.state == state:
                print(printable(f"{state:16s}{name}" + (f": {outcome.why}" if outcome.why else "")))
                if state == "failed":
                    print(printable(f"{'':16s}{plan.jobs[name].line}"))


def states(plan: Plan, outcomes: dict[str, queue.Outcome], before: Any) -> list[dict[str, Any]]:
    """Each command and what became of it; seconds of what was done ``before``, by what was said then."""
    known = before if isinstance(before, list) else []
    seconds = {(one.get("command"), one.get("state")): one.get("seconds") for one in known if isinstance(one, dict)}
    return [
        {"name": name, "command": job.line, **outcomes[name]._asdict()}
        | ({"seconds": seconds.get((job.line, "done"))} if outcomes[name] == queue.Outcome("done") else {})
        for name, job in plan.jobs.items()
    ]


if __name__ == "__main__":
    cli.main(Recipe, experiment, __doc__)
