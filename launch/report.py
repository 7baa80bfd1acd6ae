"""One HTML page of everything there is: runs, evaluations and papers, in one file that needs no network.

  python launch/report.py runs/*                                 folders of runs, and what lies in them and below
  python launch/report.py runs/simclr eval-knn.json output=/tmp/page.html

It looks for runs' folders, results (JSON with a "task") and experiment.json, some levels deep. What cannot be read is
named, on the page too, and left out. The page sorts by a click, and draws the curves of several runs over each other.
"""

from __future__ import annotations

import os
from pathlib import Path

from fasttrain import cli
from fasttrain.config import Config, PathText
from fasttrain.environment import command, now
from fasttrain.output import try_output, write_output
from fasttrain.printable import printable
from fasttrain.report.collect import Found, collect
from fasttrain.report.page import counts, html

from pydantic import Field

ELSEWHERE = "choose another place with output=…"


class ReportConfig(Config):
    """Of what, and where to."""

    sources: tuple[PathText, ...] = Field(min_length=1)
    "folders of runs, folders that hold such, or results' JSON files; the arguments"
    output: PathText | None = None
    "the page; null: report.html in the folder that holds all of them, or in the current one where that is the root"


def report(config: ReportConfig) -> None:
    found = collect(config.sources)
    output = Path(config.output) if config.output is not None else place_of(found)
    try_output(output, ELSEWHERE)
    content = html(found, command(), now())
    for complaint in found.complaints:
        print(f"WARNING: {complaint}", flush=True)
    write_output(output, content, ELSEWHERE)
    print(f"{'of':16s}{counts(found)}")
    print(f"{'page':16s}{printable(output)} ({len(content) / 1e6:.1f} MB)")


def place_of(found: Found) -> Path:
    """Where the page goes that nobody said a place for."""
    shared = found.base != Path(found.base.anchor)
    return Path(os.path.relpath(found.base) if shared else ".") / "report.html"


if __name__ == "__main__":
    cli.main(ReportConfig, report, __doc__, positional=("sources",))
