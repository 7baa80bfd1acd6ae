"""What runs and results were made on and with: those of one machine and equal versions together."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from fasttrain.printable import printable
from fasttrain.report.collect import Found


class Group(NamedTuple):
    """Of equal environments."""

    facts: dict[str, str]  # machine, versions, …
    members: list[str]


class Fact(NamedTuple):
    """A row: a machine or a version in each group."""

    name: str
    values: list[str]  # "": a group lacks it
    differs: bool


def groups(found: Found) -> tuple[list[Group], list[str]]:
    """The groups, the largest first, and the names of what says nothing of it."""
    together: dict[str, Group] = {}
    silent = []
    for kind, member, said in _members(found):
        name = f"{kind} {found.name(member)}"
        facts = _facts(said)
        if not facts:
            silent.append(name)
            continue
        together.setdefault(json.dumps(facts, sort_keys=True), Group(facts, [])).members.append(name)
    return sorted(together.values(), key=lambda group: -len(group.members)), silent


def facts(groups: list[Group]) -> list[Fact]:
    """A row for each of what groups say."""
    names = dict.fromkeys(name for group in groups for name in group.facts)
    rows = [(name, [group.facts.get(name, "") for group in groups]) for name in names]
    return [Fact(name, values, len(set(values)) > 1) for name, values in rows]


def _members(found: Found) -> list[tuple[str, Any, dict[str, Any]]]:
    runs = [("run", run.path, run.environment) for run in found.runs]
    return runs + [("result", result.path, result.values) for result in found.results]


def _facts(said: dict[str, Any]) -> dict[str, str]:
    versions = said.get("versions")
    named = {"machine": said.get("machine"), **(versions if isinstance(versions, dict) else {})}
    return {printable(name): printable(value) for name, value in named.items() if value is not None}


def of_run(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """What a start says of itself beyond machine and versions."""
    git, hosts = environment.get("git"), environment.get("hosts")
    code = (
        f"{str(git.get('commit'))[:12]}{', changed since' * bool(git.get('changed'))}" if isinstance(git, dict) else ""
    )
    earlier = environment.get("earlier")
    said = {
        "started": environment.get("started"),
        "done": environment.get("done"),
        "starts before this one": len(earlier) if isinstance(earlier, list) and earlier else None,
        "ranks": environment.get("ranks"),
        "hosts": ", ".join(map(str, hosts)) if isinstance(hosts, dict) else None,
        "code": code,
        "started in": environment.get("cwd"),
        "SLURM job": environment.get("slurm_job"),
    }
    return [(name, printable(value)) for name, value in said.items() if value not in (None, "")]


__all__ = ["Fact", "Group", "facts", "groups", "of_run"]
