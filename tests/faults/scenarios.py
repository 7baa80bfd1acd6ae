"""What is done to a run, and what must be true afterwards; each scenario gives one row of the table."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fasttrain import checkpoint, cli
from fasttrain.data.catalog import DataConfig, open_catalog
from fasttrain.errors import UsageError
from fasttrain.run import read_metrics
from tests.faults.job import Job
from tests.faults.trainee import ROOT, Fault, Poison, seen
from tests.test_bad_data import SIX_KINDS, encode, spoil

STEPS, INTERVAL = 40, 5
SMALL = [
    "augment.size=16",
    "model.width=0.0625",
    "model.head.width=8",
    "model.head.out=8",
    "train.batch=8",
    f"train.steps={STEPS}",
    "train.precision=fp32",
    "train.device=cpu",
    "optimizer.warmup_epochs=0",
    "run.log_every=1",
    f"run.save_every={INTERVAL}",
    "loader.threads=1",
    "loader.kind=dali",
    "evaluate.every_epochs=0",
]
ERRORS = ("ENOSPC", "EIO", "EROFS")


class Row(NamedTuple):
    """One line of the table."""

    fault: str
    tried: int
    broken: list[str]  # what did not come out as it has to, one line each
    figures: str  # what was measured

    @property
    def markdown(self) -> str:
        verdict = "holds" if not self.broken else f"**{len(self.broken)} broken**: {self.broken[0]}"
        return f"| {self.fault} | {self.tried} | {verdict} | {self.figures} |"


class Undisturbed(NamedTuple):
    """What a run gives that nothing happens to."""

    seconds: float
    seen: dict[int, list[int]]
    digests: dict[str, str]


def undisturbed(folder: Path, *more: str, world: int = 1) -> Undisturbed:
    """One run from its start to its end."""
    began = time.monotonic()
    with job(folder, *more, world=world) as run:
        codes = run.wait()
    if codes != [0] * world:
        raise RuntimeError(f"the undisturbed run ended with {codes}:\n{run.log()}")
    return Undisturbed(time.monotonic() - began, dict(seen(folder)), digests(folder))


def job(folder: Path, *more: str, world: int = 1, fault: Fault | None = None, poison: Poison | None = None) -> Job:
    """The same command each time: what a user, or a scheduler, starts again."""
    return Job(folder, [*SMALL, f"run.dir={folder / 'run'}", *more], world, fault, poison)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights and the optimiser's state that the run ended with."""
    newest = max((folder / "run" / "checkpoints").glob("step-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    return {name: manifest[name]["sha256"] for name in ("model.safetensors", "optimizer.safetensors")} | {
        "step": newest.name
    }


def killed_at_random(folder: Path, count: int, draw: random.Random) -> Iterator[Row]:
    """``kill -9`` at uniformly random instants of a run, which is then started again until it ends; and again."""
    undisturbed(folder / "first")  # which compiles kernels and fills caches, and takes longer than any other
    truth = undisturbed(folder / "truth")
    broken: list[str] = []
    wrong_order: list[str] = []
    lost: list[int] = []
    kills = runs = most = 0
    while kills < count:
        here, kills_before = folder / f"run-{runs}", kills
        while True:
            with job(here) as run:
                (code,) = run.wait(draw.uniform(0, truth.seconds) if kills < count else 120)
            broken += whole(here)
            if code is not None:
                break
            kills += 1
            lost.append(steps_lost(here))
        if code != 0 or digests(here) != truth.digests:
            broken.append(
                f"run {runs} ended with {code} and other weights than the undisturbed one: {run.log()[-300:]}"
            )
        taken = seen(here)
        if dict(taken) != truth.seen or any(ids != truth.seen[position] for position, ids in taken):
            wrong_order.append(f"run {runs} saw other samples")
        runs, most = runs + 1, max(most, kills - kills_before)
        shutil.rmtree(here)
    # one interval, and the steps taken while a checkpoint is written, which is shorter than an interval even here
    over = [f"{steps} steps lost" for steps in lost if steps >= 2 * INTERVAL]
    yield Row(
        "`kill -9` at uniformly random instants",
        kills,
        broken + over,
        f"{runs} runs ended bit-identical, steps lost at most {max(lost)} (interval {INTERVAL})",
    )
    yield Row(
        "several kills in one epoch: sample indices", runs, wrong_order, f"up to {most} kills in one run's only epoch"
    )


def killed_while_saving(folder: Path, count: int, draw: random.Random) -> Iterator[Row]:
    """``kill -9`` at each file operation of the second save, or up to 5 ms after it, ``count`` times each."""
    truth = undisturbed(folder / "truth")
    broken: list[str] = []
    first, last = operations_of_a_save(folder / "count")
    tried = 0
    for operation in range(first, last + 1):
        for attempt in range(count):
            here = folder / f"run-{operation}-{attempt}"
            delay = draw.uniform(0, 0.005) if attempt % 2 else 0.0
            with job(here, fault=Fault(operation, "SIGKILL", delay)) as run:
                run.wait()
            broken += whole(here)
            with job(here) as run:
                (code,) = run.wait()
            if code != 0 or digests(here) != truth.digests:
                broken.append(f"killed at operation {operation}: ended with {code}: {run.log()[-300:]}")
            tried += 1
            shutil.rmtree(here)
    yield Row("`kill -9` inside every phase of a save", tried, broken, f"{last + 1 - first} phases, {count} times each")


def told_to_stop(folder: Path, count: int, draw: random.Random) -> Iterator[Row]:
    """SIGTERM to one random rank of two, at a random instant of training."""
    truth = undisturbed(folder / "truth")
    broken, tried = [], 0
    for attempt in range(count):
        here = folder / f"run-{attempt}"
        with job(here, world=2) as run:
            steps = draw.randrange(2, STEPS - 8)
            if not until(lambda here=here, steps=steps: len(seen(here)) >= steps, 60):
                broken.append(f"never reached step {steps}: {run.log()[-300:]}")
            time.sleep(draw.uniform(0, 0.05))
            run.signal(signal.SIGTERM, draw.randrange(2))
            codes = run.wait(60)
        taken = [len(seen(here, rank)) for rank in range(2)]
        saved = max((here / "run" / "checkpoints").glob("step-*"), default=Path("none")).name
        if codes != [cli.EXIT_SAVED_ON_SIGNAL] * 2 or saved != f"step-{taken[0]:08d}" or len(set(taken)) > 1:
            broken.append(f"exit codes {codes}, micro-batches taken {taken}, saved {saved}: {run.log()[-300:]}")
        broken += whole(here)
        tried += 1
        shutil.rmtree(here)
    yield Row(
        "SIGTERM to a random rank of two", tried, broken, f"all ranks saved the same step {tried - len(broken)} times"
    )

    broken = []
    first, last = operations_of_a_save(folder / "count")
    for attempt in range(count):
        here = folder / f"hard-{attempt}"
        fault = Fault(draw.randint(first, last), "SIGTERM then SIGKILL", draw.uniform(0, 0.05))
        with job(here, fault=fault) as run:
            run.wait()
        broken += whole(here)
        with job(here) as run:
            (code,) = run.wait()
        if code != 0 or digests(here) != truth.digests:
            broken.append(f"{fault}: ended with {code}: {run.log()[-300:]}")
        shutil.rmtree(here)
    yield Row("SIGTERM during a save, then SIGKILL", count, broken, "nothing broken, final weights bit-identical")


def told_to_stop_evaluating(folder: Path, count: int, draw: random.Random) -> Iterator[Row]:
    """SIGTERM to one random rank of two, at a random instant of the evaluation after the last step."""
    evaluated = ("evaluate.every_epochs=1000", "evaluate.bank=400", "evaluate.batch=4")

    def outcome(here: Path) -> tuple[dict[str, str], list[dict]]:
        return digests(here), [x for x in read_metrics(here / "run" / "metrics.jsonl") if "knn_top1" in x]

    undisturbed(folder / "evaluated", *evaluated, world=2)
    expected, broken, cut_short = outcome(folder / "evaluated"), [], 0
    for attempt in range(count):
        here = folder / f"evaluation-{attempt}"
        with job(here, *evaluated, world=2) as run:
            until((here / "run" / "checkpoints" / f"step-{STEPS:08d}").exists, 60)
            time.sleep(draw.uniform(0, 0.5))
            run.signal(signal.SIGTERM, draw.randrange(2))
            codes = run.wait(60)
        cut_short += codes == [cli.EXIT_SAVED_ON_SIGNAL] * 2
        if len(set(codes)) > 1 or codes[0] not in (0, cli.EXIT_SAVED_ON_SIGNAL):
            broken.append(f"told to stop while evaluating: ended with {codes}: {run.log()[-300:]}")
        with job(here, *evaluated, world=2) as run:
            codes = run.wait(60)
        if codes != [0, 0] or outcome(here) != expected:
            broken.append(f"gone on with, ended with {codes} and {outcome(here)}: {run.log()[-300:]}")
        shutil.rmtree(here)
    yield Row(
        "SIGTERM to a random rank of two during an evaluation",
        count,
        broken,
        f"cut short on both {cut_short} times; gone on with, same weights and same kNN accuracy, reported once",
    )


def corrupted(folder: Path, flips: int, cuts: int, draw: random.Random) -> Iterator[Row]:
    """The newest checkpoint's files cut, flipped, emptied, removed: the one before it must be taken."""
    undisturbed(folder)
    checkpoints = folder / "run" / "checkpoints"
    newest, before = sorted(checkpoints.glob("step-*"), reverse=True)[:2]
    files = sorted(path for path in newest.iterdir() if path.is_file())
    broken: list[str] = []

    def expect_fallback(what: str) -> None:
        try:
            found, complaints = checkpoint.find(checkpoints)
        except UsageError as error:
            broken.append(f"{what}: {error}")
            return
        if found is None or found.path != before or not any(newest.name in line for line in complaints):
            broken.append(f"{what} was not noticed")

    tried = 0
    for path in files:
        original = path.read_bytes()
        for length in {0, *(draw.randrange(len(original)) for _ in range(cuts))}:
            path.write_bytes(original[:length])
            expect_fallback(f"{path.name} cut to {length} bytes")
            tried += 1
        path.unlink()
        expect_fallback(f"{path.name} missing")
        path.write_bytes(original)
        tried += 1
    yield Row("every file cut, emptied, missing", tried, broken, f"{len(files)} files, {cuts} lengths each")

    broken = []
    sizes = [path.stat().st_size for path in files]
    for path in draw.choices(files, sizes, k=flips - len(files)) + files:
        position, bit = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
        flip(path, position, bit)
        expect_fallback(f"{path.name} with bit {bit} of byte {position} flipped")
        flip(path, position, bit)
    if checkpoint.find(checkpoints)[0].path != newest:
        broken.append("the newest checkpoint is not whole after all was put back")
    yield Row("single bits flipped", flips, broken, f"over {sum(sizes):,} bytes of {len(files)} files")


def malicious(folder: Path) -> Iterator[Row]:
    """A pickle that runs a command in place of every file of a run, one at a time; then the run is gone on with."""
    undisturbed(folder)
    proof, tried, broken = folder / "executed", 0, []

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    run_folder = folder / "run"
    for path in sorted(path for path in run_folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts):
        original = path.read_bytes()
        path.write_bytes(pickle.dumps(Payload()))
        with job(folder) as run:
            run.wait()
        if proof.exists():
            broken.append(f"{path.relative_to(run_folder)} was executed")
            proof.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(original)
        tried += 1
    yield Row("a malicious pickle in place of every file", tried, broken, "none executed")


def failing_disk(folder: Path, share: float, draw: random.Random) -> Iterator[Row]:
    """Each file operation of the second save fails, alone or with all after it; and a disk that is really full."""
    first, last = operations_of_a_save(folder / "count")
    operations = sorted(draw.sample(range(first, last + 1), max(1, round(share * (last + 1 - first)))))
    truth, broken, tried = undisturbed(folder / "truth"), [], 0
    for policy, once, code in (
        ("stop", False, cli.EXIT_MISTAKE),
        ("continue", False, cli.EXIT_MISTAKE),  # after the last step
        ("continue", True, 0),
    ):
        for operation in operations:
            for name in ERRORS:
                here = folder / f"{policy}-{once}-{operation}-{name}"
                fault = Fault(operation, name, once=once)
                with job(here, f"run.on_save_error={policy}", fault=fault) as run:
                    (ended,) = run.wait(60)
                broken += whole(here)
                if (
                    ended != code
                    or os.strerror(getattr(errno, name)) not in run.log()
                    or (policy == "continue" and len(seen(here)) != STEPS)
                    or (ended == 0 and digests(here) != truth.digests)
                ):
                    broken.append(f"{fault}, {policy}: ended with {ended}: {run.log()[-300:]}")
                tried += 1
                shutil.rmtree(here)
    yield Row(f"{', '.join(ERRORS)} at each operation of a save", tried, broken, "previous checkpoint whole, no hang")

    try:
        with small_disk(folder / "disk") as disk, job(disk, "run.on_save_error=stop", "run.keep=1000") as run:
            (ended,) = run.wait(60)
            broken = whole(disk)
            if ended != cli.EXIT_MISTAKE or os.strerror(errno.ENOSPC) not in run.log():
                broken.append(f"ended with {ended}: {run.log()[-300:]}")
        yield Row("a disk that is full", 1, broken, "previous checkpoint whole, clear error")
    except PermissionError as error:
        yield Row("a disk that is full", 0, [], f"skipped: {error}")


def bad_images(folder: Path) -> Iterator[Row]:
    """1 % of the images are bad, one of each of six kinds; one rank, two ranks and a rerun must show the same."""
    for manifest in (False, True):
        root, cache = folder / f"images-{manifest}", folder / f"cache-{manifest}"
        for number in range(620):
            path = root / ("val" if number < 10 else "train") / ("cat" if number % 2 else "dog") / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(number))
        data = DataConfig(root=str(root), cache=str(cache))
        given = f"data.root={root}", f"data.cache={cache}"
        if manifest:
            prepare = [sys.executable, str(ROOT / "launch" / "prepare.py"), *given]
            subprocess.run(prepare, check=True, capture_output=True)
        before = open_catalog(data, "train")
        bad = {Path(before.path(index)).name for index in spoil(before, SIX_KINDS)}
        catalog = open_catalog(data, "train")  # without a manifest it has what is missing no more
        broken, shown = [], []
        for name, world in (("one rank", 1), ("again", 1), ("two ranks", 2)):
            here = folder / f"{name}-{manifest}"
            with job(here, *given, "train.steps=75", world=world) as run:
                codes = run.wait()
            logs = "".join(run.log(rank) for rank in range(world))
            taken = zip(*(seen(here, rank) for rank in range(world)), strict=False)
            shown.append({parts[0][0]: [i for _, ids in parts for i in ids] for parts in taken})
            if codes != [0] * world:
                broken.append(f"{name}: ended with {codes}: {logs[-300:]}")
            names = {Path(catalog.path(index)).name for ids in shown[-1].values() for index in ids}
            broken += [f"{name}: {path} is bad and was shown" for path in bad & names]
            listed = {Path(catalog.path(int(index))).name for index in catalog.indices}
            broken += [f"{name}: {path} is not in the log" for path in bad & listed if path not in logs]
        if shown[0] != shown[1] or shown[0] != shown[2]:
            broken.append("other images were shown by a rerun, or by two ranks")
        name = f"1 % corrupt images of six kinds, {'listed in' if manifest else 'without'} a manifest"
        yield Row(name, 3, broken, f"{len(bad)} bad; one rank, its rerun and two ranks showed the same")


def not_finite(folder: Path) -> Iterator[Row]:
    """NaN on one of two ranks, in each place where it can arise: skipped by both, or stopped and replayed."""
    attacked = ["terms.simclr.view.kind=attack", "terms.simclr.view.attack.name=pgd"]
    places = {
        "image": [],
        "attack": attacked,
        "loss": [],
        "first gradient": [],
        "second gradient": ["terms.simclr.penalty.weight=0.1"],
    }
    broken = []
    for where, more in places.items():
        poison = Poison(where, 7, 1)
        here = folder / f"skip {where}"
        with job(here, *more, "train.on_non_finite=skip", world=2, poison=poison) as run:
            codes = run.wait()
        if codes != [0, 0] or run.log().count("skipped, the 1.") != 1 or len(set(map(len, _both(here)))) > 1:
            broken.append(f"{where}, skip: ended with {codes}: {run.log()[-300:]}")
        here = folder / f"stop {where}"
        with job(here, *more, world=2, poison=poison) as run:
            codes = run.wait()
        bundle = here / "run" / "not-finite-step-00000007"
        if codes != [cli.EXIT_MISTAKE] * 2 or f"python launch/replay.py {bundle}" not in run.log():
            broken.append(f"{where}, stop: ended with {codes}: {run.log()[-300:]}")
        again = poison._replace(rank=0)
        with Job(here / "again", [f"bundle={bundle}", "device=cpu"], poison=again, script="replay") as run:
            codes = run.wait()
        if codes != [1] or "again" not in run.log():
            broken.append(f"{where}, replay: ended with {codes}: {run.log()[-300:]}")
    figures = "both ranks skipped, or stopped, at the same step; its replay is not finite either"
    yield Row(f"NaN in {', '.join(places)}", 3 * len(places), broken, figures)


def _both(folder: Path) -> list[list]:
    return [seen(folder, rank) for rank in range(2)]


def rank_lost(folder: Path, count: int, draw: random.Random) -> Iterator[Row]:
    """One of two ranks killed, or stopped for good: the other has to end, and say which is gone."""
    for number in (signal.SIGKILL, signal.SIGSTOP):
        broken, longest = [], 0.0
        for attempt in range(count):
            here = folder / f"{number.name}-{attempt}"
            with job(here, "train.steps=100000", world=2) as run:
                if not until(lambda here=here: len(seen(here)) > 3, 60):
                    broken.append(f"never trained: {run.log()[-300:]}")
                lost = draw.randrange(2)
                began = time.monotonic()
                run.signal(number, lost)
                run.ranks[1 - lost].join(90)
                longest = max(longest, time.monotonic() - began)
                code, log = run.ranks[1 - lost].exitcode, run.log(1 - lost)
            if code in (None, 0) or longest > 60 or f"rank {lost}" not in log:
                broken.append(f"rank {1 - lost} ended with {code} after {longest:.0f} s: {log[-300:]}")
            shutil.rmtree(here)
        yield Row(
            f"{number.name} to one of two ranks", count, broken, f"the other ended within {longest:.0f} s and named it"
        )


def tested(fault: str, *tests: str) -> Iterator[Row]:
    """Faults that have tests of their own, marked ``faults``: those are run as they are."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfEs", "-m", "faults", "--tb=short", *tests],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = done.stdout.splitlines()
    verdict = re.sub(r"^=* ?| in [0-9.]+.*", "", lines[-1])
    tried = sum(int(number) for number in re.findall(r"(\d+) (?:passed|failed|error)", verdict))
    broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not broken:
        broken = [f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}"]
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    yield Row(fault, tried, broken, "; ".join([f"`pytest -m faults {' '.join(tests)}`: {verdict}", *skipped]))


def left_alone(folder: Path, minutes: float) -> Iterator[Row]:
    """A long run: does its memory grow, does it slow down?"""
    resident: list[tuple[float, int]] = []
    began = time.monotonic()
    with job(folder, "train.steps=100000000", "run.log_every=20", "run.save_every=200") as run:
        while time.monotonic() - began < 60 * minutes and run.ranks[0].is_alive():
            time.sleep(1)
            resident.append((time.monotonic() - began, resident_memory(run.ranks[0].pid)))
        run.signal(signal.SIGTERM)
        codes = run.wait()
    rates = [x["images_per_second"] for x in read_metrics(folder / "run" / "metrics.jsonl") if "images_per_second" in x]
    tenth = max(1, len(rates) // 10)
    tenths = [statistics.median(rates[i : i + tenth]) for i in range(0, len(rates) - tenth + 1, tenth)]
    settled = resident[len(resident) // 10 :]  # caches are full
    growth = statistics.linear_regression(*zip(*settled, strict=True)).slope * (settled[-1][0] - settled[0][0])
    share = growth / settled[0][1]
    drift = tenths[-1] / tenths[0] - 1
    broken = [] if codes == [cli.EXIT_SAVED_ON_SIGNAL] else [f"ended with {codes}: {run.log()[-300:]}"]
    broken += [f"memory grew by {share:.1%}"] * (share > 0.02) + [f"throughput changed by {drift:.1%}"] * (
        drift < -0.02
    )
    figures = (
        f"{20 * len(rates):,} steps; resident {settled[0][1] / 2**20:,.0f} MiB, trend {growth / 2**20:+.1f} MiB; "
        f"images/s of the last tenth {drift:+.1%} of the first, all tenths {min(tenths):,.0f} to {max(tenths):,.0f}"
    )
    yield Row(f"{minutes:g} minutes of training, nothing done to it", 1, broken, figures)


def resident_memory(process: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def whole(folder: Path) -> list[str]:
    """Complaints about checkpoints that are there under their final name and cannot be loaded."""
    paths = sorted((folder / "run" / "checkpoints").glob("step-*"))
    return [f"{path.name}: {damage}" for path in paths if (damage := checkpoint.verify(path)) is not None]


def steps_lost(folder: Path) -> int:
    """Steps taken in the life that just ended which no checkpoint holds."""
    positions = [position for position, _ in seen(folder)]
    newest = max((folder / "run" / "checkpoints").glob("step-*"), default=None)
    saved = int(newest.name.removeprefix("step-")) if newest else 0
    return max(0, positions[-1] - saved) if positions else 0


def operations_of_a_save(folder: Path) -> tuple[int, int]:
    """The first and the last file operation of a run's second save, in the count of :class:`Fault`."""
    counts = []
    for saves in (1, 2):
        here = folder / str(saves)
        with job(here, f"train.steps={saves * INTERVAL}", fault=Fault(10**9, "SIGKILL")) as run:
            run.wait()
        counts.append(int((here / "operations-0").read_text()))
    return counts[0] + 1, counts[1]


def flip(path: Path, position: int, bit: int) -> None:
    """One bit of one byte, in place."""
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ bit]))


def until(condition, timeout: float) -> bool:
    """Whether ``condition()`` came true in time."""
    deadline = time.monotonic() + timeout
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return true


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Path]:
    """A file system of its own on ``folder``, of ``size``."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise PermissionError(f"no file system of a given size can be mounted here ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
