"""Each paper's file at the smallest scale, by the command itself; minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_launch import environment

ROOT = Path(__file__).parent.parent


def started(paper: str, folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "launch/experiment.py", f"configs/experiments/{paper}.yaml", "scale=smoke"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*words, f"folder={folder}"], cwd=ROOT, env=environment(), **pipes)


def check(process: subprocess.Popen[str], folder: Path) -> str:
    """That it ends well and leaves tables and pictures; what it said."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    facts = json.loads((folder / "experiment.json").read_text())
    assert {command["state"] for command in facts["commands"]} == {"done"}
    assert facts["figures"] and all((folder / figure["picture"]).is_file() for figure in facts["figures"])
    filled = [cell for table in facts["tables"] for row in table["rows"] for cell in row["cells"] if cell and cell["n"]]
    assert filled and facts["findings"] == []
    assert (folder / "tables.md").read_text() in said
    return said


@pytest.mark.parametrize("paper", ["adversarial_views", "fare", "tikhonov"])
def test_a_paper_from_its_file_to_its_tables(paper, tmp_path):
    check(started(paper, tmp_path), tmp_path)
