"""The whole battery, at full counts or at a share of them.

python -m tests.faults                       all rows; hours on 2 cores
python -m tests.faults --share 0.1 --only killed_at_random told_to_stop
python -m tests.faults --output faults.md    where the table goes (faults.md by default)
"""

from __future__ import annotations

import argparse
import datetime
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fasttrain.environment import hardware
from tests.faults import scenarios
from tests.faults.scenarios import Row

FULL: dict[str, Callable[[Path, float, random.Random], Iterator[Row]]] = {
    "killed_at_random": lambda f, share, draw: scenarios.killed_at_random(f, count(100, share), draw),
    "killed_while_saving": lambda f, share, draw: scenarios.killed_while_saving(f, count(50, share), draw),
    "told_to_stop": lambda f, share, draw: scenarios.told_to_stop(f, count(50, share), draw),
    "told_to_stop_evaluating": lambda f, share, draw: scenarios.told_to_stop_evaluating(f, count(50, share), draw),
    "corrupted": lambda f, share, draw: scenarios.corrupted(f, count(1000, share), count(20, share), draw),
    "malicious": lambda f, share, draw: scenarios.malicious(f),
    "failing_disk": scenarios.failing_disk,
    "bad_images": lambda f, share, draw: scenarios.bad_images(f),
    "not_finite": lambda f, share, draw: scenarios.not_finite(f),
    "left_alone": lambda f, share, draw: scenarios.left_alone(f, 60 * share),
    "rank_lost": lambda f, share, draw: scenarios.rank_lost(f, count(10, share), draw),
    "host_lost": lambda f, share, draw: scenarios.tested(
        "two hosts (network namespaces): started three ways, packets lost and delayed, one cut off for good",
        "tests/test_two_hosts.py",
    ),
    "restarted": lambda f, share, draw: scenarios.tested(
        "SIGTERM to the launcher; a rank killed under `torchrun --max-restarts`", "tests/test_launch.py"
    ),
    "resized": lambda f, share, draw: scenarios.tested(
        "1 -> 2 -> 4 -> 1 ranks with ZeRO 0 -> 1 -> 2 -> 0: weights and optimiser state bit for bit, order kept",
        "tests/test_failures.py::test_another_world_size_and_stage_loads_the_same_bits_and_keeps_the_order",
    ),
}
OF_TESTS = {"host_lost", "restarted", "resized"}
"Those that only run tests which are there anyway."


def count(full: int, share: float) -> int:
    """At least one."""
    return max(1, round(full * share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts")
    parser.add_argument("--only", nargs="+", choices=FULL, default=list(FULL), metavar="NAME", help=", ".join(FULL))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("faults.md"))
    given = parser.parse_args()
    command = shlex.join(["python", "-m", "tests.faults", *sys.argv[1:]])
    ran = f"{hardware()}; torch {torch.__version__}; {datetime.date.today()}; `{command}`"
    lines = [ran, "", "| fault | tried | outcome | figures |", "| --- | --- | --- | --- |"]
    print("\n".join(lines), flush=True)
    for name in given.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for row in FULL[name](Path(folder), given.share, random.Random(given.seed)):
                lines.append(row.markdown)
                print(f"{row.markdown}  ({time.monotonic() - began:.0f} s)", flush=True)
                for line in row.broken[1:]:
                    print(f"    {line}", flush=True)
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
