"""Each paper's file at the smallest scale, by the command itself; minutes. One is killed on the way and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_launch import environment

ROOT = Path(__file__).parent.parent


def started(paper: str, folder: Path) -> subprocess.Popen:
    words = [sys.executable, "launch/experiment.py", f"configs/experiments/{paper}.yaml", "scale=smoke"]
    return subprocess.Popen(
        [*words, f"folder={folder}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("paper", ["contrast", "adversarial_views", "fare", "tikhonov"])
def test_a_paper_from_its_file_to_its_tables(paper, tmp_path):
    process = started(paper, tmp_path)
    if paper == "fare":  # in the middle of its third command
        while not (tmp_path / "logs/alpha-0.1_0.log").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*_0/environment.json")}
        assert len(before) == 2
        time.sleep(3)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(5)  # what was under way is told by the kernel, and saves itself
        process = started(paper, tmp_path)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    if paper == "fare":
        assert "2 of 6 are done" in said
        assert {path: path.stat().st_mtime_ns for path in before} == before  # they were not run again
    facts = json.loads((tmp_path / "experiment.json").read_text())
    assert {command["state"] for command in facts["commands"]} == {"done"}
    assert facts["figures"] and all((tmp_path / figure["picture"]).is_file() for figure in facts["figures"])
    filled = [cell for table in facts["tables"] for row in table["rows"] for cell in row["cells"] if cell and cell["n"]]
    assert filled and facts["findings"] == []
    assert (tmp_path / "tables.md").read_text() in said
