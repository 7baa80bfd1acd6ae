"""The fourth paper, killed on the way and run again; in a file of its own, to run beside the others."""

from __future__ import annotations

import time

from tests.test_papers import check, started


def test_a_paper_that_is_killed_goes_on(tmp_path):
    process = started("contrast", tmp_path)
    log = tmp_path / "logs/supervised_0.log"  # its third command's
    while not log.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*_0/environment.json")}
    assert len(before) == 2
    time.sleep(2)
    process.kill()
    process.communicate()  # until what was under way, which the kernel tells, has ended too
    again = started("contrast", tmp_path)
    assert "2 of 7 are done" in check(again, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # they were not run again
