"""The benchmark runs, and its table says what it timed."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.attacks import apgd
from fasttrain.attacks.losses import squared_distance
from fasttrain.benchmarks import attack, gpu, kernels, record, step, train, truth
from fasttrain.benchmarks.attack import THREAT, no_lower, published_apgd
from fasttrain.benchmarks.cases import OURS, PYTORCH, Case, contrastive, layers
from fasttrain.benchmarks.ceilings import COPY, PRODUCT, Work, ceilings
from fasttrain.benchmarks.network import NetworkConfig, plain, setting
from fasttrain.benchmarks.profile import of_spans
from fasttrain.benchmarks.timing import Comparison, Report, StepTiming, Stopwatch, alternate, alternate_steps, table
from fasttrain.benchmarks.truth import TruthConfig
from fasttrain.config import load
from fasttrain.errors import UsageError
from fasttrain.models import ModelConfig
from tests.test_launch import ROOT, environment, script

CPU = torch.device("cpu")


def test_contestants_take_turns_after_a_warm_up():
    turns = []

    def contestant(name):
        def run():
            turns.append(name)
            return 10

        return run

    *_, timings = alternate({"a": contestant("a"), "b": contestant("b")}, rounds=2)
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert [len(timing.rates) for timing in timings] == [2, 2]
    printed = table(timings, "images", {"a": "uint8", "b": "float32"})
    assert "| a |" in printed and printed.endswith("| float32 |") and "| uint8 |\n" in printed


NETWORK = NetworkConfig(
    model=ModelConfig(arch="resnet18", stem="cifar", width=0.25, zero_init_residual=False),
    size=16,
    batch=8,
    precision="fp32",
)


def run(task: str, tmp_path, *arguments: str) -> dict:
    module = script("bench")
    schema = module.TASKS[task].schema
    given = [f"task={task}", "quick=true", f"output={tmp_path / 'bench.json'}", *arguments]
    module.bench(load(schema, given, module.base))
    assert (tmp_path / "bench.png").stat().st_size > 1000
    return json.loads((tmp_path / "bench.json").read_text())


def test_steps_match_the_plain_ones_and_are_all_in_the_table(tmp_path, capsys):
    found = run("step", tmp_path, "precision=fp32")
    rows = {row["name"]: row for row in found["rows"]}
    peers = [f"plain, {name}" for name in contrastive.nt_xent_peers(0.5, 8, CPU)]
    assert list(rows) == [
        "plain",
        "plain, PyTorch",
        "penalty, double backward",
        "penalty, PyTorch",
        "penalty, finite difference",
        "adversarial view, PGD-5",
        "structured view, colour",
        *peers,
        "FARE, APGD-10",
        "FARE, published code",
        "F: forward",
        "F + G: forward, input gradient",
        "F + B: forward, backward",
        "FARE's floor",
    ]
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in rows if name != "FARE's floor")
    assert "DOES NOT MATCH" not in printed
    assert printed.count("times as fast as") == 3 + len(peers)
    assert set(rows["FARE, APGD-10"]["shares"]) == {"forward", "reference", "attack", "backward", "optimiser"}
    assert set(rows["structured view, colour"]["shares"]) == {"forward", "view", "backward", "optimiser"}
    assert found["config"]["model"]["width"] == 0.25 and found["config"]["rounds"] == 1


def test_attacks_are_all_in_the_table(tmp_path, capsys):
    found = run("attack", tmp_path, "precision=bf16", "iterations=3")
    names = [row["name"] for row in found["rows"]]
    ours = "ours (folded, channels-last, bf16 autocast)"
    assert names[:7] == [
        "forward, PyTorch",
        "forward and input gradient, PyTorch",
        f"forward, {ours}",
        f"forward and input gradient, {ours}",
        f"APGD-3, {ours}",
        "APGD-3, ours on the plain network",
        "APGD-3, published code",
    ]
    losses = [row["final_loss"] for row in found["rows"][5:7]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in names)


def test_a_wrong_penalty_gets_no_speed_up(tmp_path, monkeypatch, capsys):
    right = step.gradient_penalty
    monkeypatch.setattr(step, "gradient_penalty", lambda of, weight, *a, **k: right(of, 1.01 * weight, *a, **k))
    run("step", tmp_path, "precision=fp32", "pgd_steps=1")
    printed = capsys.readouterr().out
    assert "penalty, double backward DOES NOT MATCH penalty, PyTorch" in printed
    assert "penalty, double backward: " not in printed


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_published_attack_and_ours_go_the_same_way(steps):
    place = setting(NETWORK)
    encoder, batch = plain(place.encoder).double().eval(), place.batch(1)
    images = batch.images[0].double()
    targets = encoder(images).features.detach()

    def loss(x):
        return squared_distance(encoder(x).features, targets)

    start = THREAT.start(images, batch.index)
    theirs = published_apgd(loss, images, start, THREAT.eps, steps)
    assert (theirs - images).abs().max() <= THREAT.eps + 1e-12
    assert torch.allclose(theirs, apgd(THREAT, steps)(loss, images), rtol=0, atol=1e-9)
    assert (loss(theirs) > loss(start)).all()


def test_the_plain_network_is_the_same_function():
    place = setting(NETWORK)
    twin = plain(place.encoder)
    ours = {"fasttrain.models.batchnorm", "fasttrain.models.convolution"}
    assert not any(type(module).__module__ in ours for module in twin.modules())
    assert twin.state_dict().keys() == place.encoder.state_dict().keys()
    for mode in (True, False):
        found, expected = twin.train(mode)(place.images), place.encoder.train(mode)(place.images)
        assert torch.allclose(found.projections, expected.projections, rtol=1e-4, atol=1e-4)


def test_a_lower_attack_is_told_from_noise():
    base = torch.linspace(10, 20, 64)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert no_lower("a", "b", {"a": base + noise, "b": base}).agrees
    assert not no_lower("a", "b", {"a": 0.95 * base, "b": base}).agrees
    assert no_lower("a", "b", {"a": 1.05 * base, "b": base}).agrees


def test_parts_of_a_step_add_up():
    def contestant(stopwatch: Stopwatch) -> None:
        stopwatch.mark("first")
        stopwatch.mark("second")
        stopwatch.mark("first")

    *_, standing = alternate_steps({"a": contestant}, rounds=3, steps=2, device=torch.device("cpu"))
    timing = standing.timings["a"]
    assert len(timing.parts) == len(timing.cpu) == 3 and set(timing.parts[0]) == {"first", "second"}
    assert sum(timing.shares().values()) == pytest.approx(1, abs=0.2)
    slow = StepTiming("slow", [{"all": 4.0}, {"all": 6.0}, {"all": 1.0}], [8.0, 8.0, 8.0])
    fast = StepTiming("fast", [{"all": 2.0}], [2.0])
    assert slow.over(fast) == 2 and slow.cpu_over(fast) == 4 and slow.spread == "1,000.0 to 6,000.0"
    sentence = Comparison("fast", "slow", True, "").sentence({"fast": fast, "slow": slow})
    assert "2.00 times as fast as slow, 4.00 by CPU time" in sentence


def test_keys_of_another_task_are_refused():
    module = script("bench")
    with pytest.raises(UsageError, match="unknown key 'loader"):
        load(module.StepBench, ["task=step", "loader.kind=ffcv"])


def test_kernels_are_timed_beside_their_references_and_the_ceilings(tmp_path, capsys):
    found = run("kernels", tmp_path)
    rows = {(row["kernel"], row["passes"], row["name"]): row for row in found["rows"]}
    assert all(row["task"] == "kernels" and row["seconds"] > 0 and row["share"] > 0 for row in rows.values())
    assert {kernel for kernel, _, _ in rows} == {
        "NT-Xent",
        "SupCon",
        "BatchNorm + residual + ReLU",
        "3 x 3 convolution",
        "APGD step, linf",
        "APGD step, l2",
        "augmentation",
    }
    double = rows["NT-Xent", "forward, backward, double backward", "ours"]
    assert set(double["errors"]) == {"loss", "gradient", "Hessian product"} and double["agrees"]
    assert double["over_ours"] == 1 and max(double["errors"].values()) < 1e-5
    assert rows["NT-Xent", "forward, backward", "two products and exponentials"]["agrees"] is None
    for kernel, passes in {key[:2] for key in rows}:
        assert rows[kernel, passes, PRODUCT]["share"] == rows[kernel, passes, COPY]["share"] == 1
        assert rows[kernel, passes, PRODUCT]["over_ours"] is None
    printed = capsys.readouterr().out
    assert "DOES NOT MATCH" not in printed and "does not run" not in printed
    assert "| what | ms, median | least to greatest | over ours | of the ceiling | peak MiB" in printed
    assert (tmp_path / "bench.md").read_text() == printed
    assert printed.startswith("# Kernels on ") and f"torch {torch.__version__}" in printed
    assert found["versions"]["torch"] == torch.__version__ and len(found["date"]) == 10


def test_every_task_in_one_go(images, tmp_path, capsys):
    module = script("bench")
    given = ["task=all", "quick=true", f"output={tmp_path / 'all.json'}", f"loader.data.root={images}"]
    given += ["loader.augment.size=16", "loader.loader.threads=1", "kernels.kernels=[apgd]", "attack.iterations=2"]
    module.bench(load(module.schema_of("all"), given, module.base))
    found = json.loads((tmp_path / "all.json").read_text())
    tasks = {"kernels", "loader", "step", "attack"}
    assert {row["task"] for row in found["rows"]} == tasks
    assert found["config"]["step"]["size"] == 16 and found["config"]["rounds"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"all.json", "all.md"} | {f"all_{task}.png" for task in tasks}
    printed = capsys.readouterr().out
    assert all(f"\n## {task.capitalize()}\n" in printed for task in tasks)


def test_the_script_takes_the_quick_flag_anywhere(tmp_path):
    output = tmp_path / "flag.json"
    arguments = ["--quick", "attack", "iterations=1", f"output={output}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/bench.py"), *arguments], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["config"]["size"] == 16


def test_a_wrong_kernel_gets_no_speed_up(tmp_path, monkeypatch, capsys):
    right = contrastive.nt_xent

    def wrong(z, temperature, impl):
        return right(z, temperature * (1.001 if impl == "auto" else 1), impl=impl)

    monkeypatch.setattr(contrastive, "nt_xent", wrong)
    found = run("kernels", tmp_path, "kernels=[nt_xent]", "images=8")
    assert all(row["over_ours"] is None for row in found["rows"])
    assert [row["agrees"] for row in found["rows"] if row["name"] == "reference"] == [True, True]
    printed = capsys.readouterr().out
    assert printed.count("ours DOES NOT MATCH float64") == 2
    assert "times as fast" not in printed and "times the time" not in printed


def test_a_peer_that_fails_or_errs_is_named_and_gets_no_ratio():
    def fails():
        raise RuntimeError("out of memory\nand more")

    def returns(value):
        return lambda: (torch.tensor([value]),)

    contestants = {OURS: returns(2.0), PYTORCH: returns(2.0), "wrong": returns(2.1), "broken": fails}
    case = Case("k", "forward", "1", torch.float32, Work(8, 8), ("y",), returns(2.0), contestants)
    (report,) = kernels.compare(case, ceilings(torch.float32, CPU, 32, 1), 1, CPU)
    rows = {row["name"]: row for row in report.rows}
    assert rows["wrong"]["over_ours"] is None and rows[PYTORCH]["over_ours"] > 0
    assert "- broken does not run: out of memory\n" in report.text + "\n"
    assert "- wrong DOES NOT MATCH float64: y 5.0e-02 off" in report.text
    assert "times as fast as PyTorch" in report.text


def test_agreement_allows_twice_the_usual_error_and_no_more():
    def errors(ours, usual):
        contestants = {OURS: lambda: (torch.tensor([1 + ours]),), PYTORCH: lambda: (torch.tensor([1 + usual]),)}
        truth = lambda: (torch.ones(1, dtype=torch.float64),)  # noqa: E731
        found, _ = kernels.agreement(Case("k", "", "", torch.float32, Work(0, 1), ("y",), truth, contestants))
        return found[OURS].agrees

    assert errors(5e-6, 0) and not errors(1e-4, 0)
    assert errors(1.9e-3, 1e-3) and not errors(2.1e-3, 1e-3)
    assert not errors(float("nan"), 1e-3)


def test_floating_point_operations_against_a_count_of_the_products():
    z, u = torch.randn(2, 6, 4)
    g = torch.randn(6, 6)
    with FlopCounterMode(display=False) as first:
        _ = z @ z.T, (g + g.T) @ z
    with FlopCounterMode(display=False) as second:
        _ = z @ z.T, (g + g.T) @ z, u @ z.T, (g + g.T) @ u, (g + g.T) @ z
    assert contrastive.work(6, 4, 4, False) == (first.get_total_flops(), 2 * 6 * 4 * 4) == (2 * 2 * 6 * 6 * 4, 192)
    assert contrastive.work(6, 4, 4, True) == (second.get_total_flops(), 3 * 6 * 4 * 4)
    (case,) = layers.convolution_cases((2, 3, 5, 5), torch.float32, CPU)
    assert case.work.flops == 4 * 2 * (2 * 3 * 5 * 5) * (3 * 3 * 3)  # four passes, a product of 27 an output


def test_ceilings_are_what_was_asked_for():
    limits = ceilings(torch.float32, CPU, side=64, mib=1)
    assert limits.work == {PRODUCT: (2 * 64**3, 3 * 64**2 * 4), COPY: (0, 2 * 2**20)}
    timings = {PRODUCT: StepTiming(PRODUCT, [{"all": 2.0}], []), COPY: StepTiming(COPY, [{"all": 1.0}], [])}
    slow = StepTiming("slow", [{"all": 4.0}], [])
    assert limits.share(Work(64**3, 2**20), slow, timings) == (0.25, PRODUCT)  # 1 s of products, 0.5 s of copying
    assert limits.share(Work(64**3, 4 * 2**20), slow, timings) == (0.5, COPY)


@pytest.mark.parametrize("kernel", ["nt_xent", "sup_con"])
def test_the_truth_in_blocks_is_that_of_the_whole_matrix(kernel, monkeypatch):
    monkeypatch.setattr(contrastive, "TRUTH_ROWS", 5)
    cases = getattr(contrastive, f"{kernel}_cases")(7, 3, 0.5, torch.float32, CPU)
    for case in cases:
        loss = case.contestants[PYTORCH].args[0]
        z = case.contestants[PYTORCH].args[1].double()
        whole = contrastive.differentiate(loss, z, len(case.results) == 3)
        for found, expected in zip(case.truth(), whole, strict=True):
            assert torch.allclose(found, expected, rtol=1e-5 if found.dim() else 1e-12, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is Linux's")
def test_peak_memory_counts_what_was_freed_and_what_is_not_torchs():
    """In a process of its own: the mark is the whole process's, and other tests' threads live on."""
    program = """
import numpy as np, torch
from fasttrain.benchmarks.memory import peak_memory

def work():
    first = torch.ones(6 * 2**20)  # 24 MiB
    del first
    return np.ones(2 * 2**20)  # 16 MiB

small = lambda: [torch.ones(2**16) for _ in range(64)]  # 16 MiB, which the C library keeps when freed
for run in (work, work, work, small):
    run()
    print(peak_memory(run, torch.device("cpu")) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [float(line) for line in done.stdout.split()] == pytest.approx([24, 24, 24, 16], abs=2)


def test_short_contestants_run_until_a_round_is_filled():
    calls = []

    def contestant(stopwatch: Stopwatch) -> None:
        calls.append(1)
        stopwatch.mark("all")

    *_, standing = alternate_steps({"a": contestant}, rounds=2, steps=None, device=CPU, memory=True)
    timing = standing.timings["a"]
    assert len(calls) == 1 + 1 + 2 * 100 and timing.memory is not None


def test_what_fails_leaves_and_the_others_go_on():
    def step(seconds_until_it_fails: float):
        calls = []

        def run(stopwatch: Stopwatch) -> None:
            calls.append(1)
            if len(calls) > seconds_until_it_fails:
                raise torch.OutOfMemoryError("out of memory: tried to allocate\nmuch")
            stopwatch.mark("all")

        return run

    contestants = {"at once": step(0), "when measured": step(1), "later": step(3), "never": step(99)}
    standings = list(alternate_steps(contestants, rounds=3, steps=1, device=CPU, memory=True))
    assert [list(standing.timings) for standing in standings] == [["later", "never"], ["never"], ["never"]]
    assert standings[-1].refusals == dict.fromkeys(
        ["at once", "when measured", "later"], "out of memory: tried to allocate"
    )
    assert len(standings[-1].timings["never"].parts) == 3
    with pytest.raises(RuntimeError, match="out of memory"):
        list(alternate_steps({"ours": step(1)}, rounds=3, steps=1, device=CPU, needed={"ours"}))


def test_attacks_of_a_round_start_at_the_same_points_drawn_before_it():
    images = torch.rand(3, 3, 8, 8)
    starts = attack.Starts(images)
    found = []
    for _ in range(2):
        starts.draw()
        found.append((starts.round, starts.threat.start(images, torch.arange(3))))
        assert torch.equal(found[-1][1], starts.threat.start(images, torch.arange(3)))
    assert [number for number, _ in found] == [0, 1] and not torch.equal(found[0][1], found[1][1])
    distance = (found[0][1] - images).abs()
    assert distance.max() <= THREAT.eps + 1e-6 and found[0][1].min() >= 0 and found[0][1].max() <= 1


def test_torchattacks_starts_where_ours_do():
    pytest.importorskip("torchattacks")
    place = setting(NETWORK)
    reference, images = plain(place.encoder).eval(), place.batch(1).images[0]
    with torch.no_grad():
        targets = reference(images).features
    starts = attack.Starts(images)
    starts.draw()
    state = torch.get_rng_state()
    theirs = attack.torchattacks_apgd(reference, images, targets, 2)(starts.uniform)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    loss = lambda x: squared_distance(reference(x).features, targets)  # noqa: E731
    ours = published_apgd(loss, images, starts.threat.start(images, torch.arange(len(images))), THREAT.eps, 2)
    assert loss(theirs).mean().item() == pytest.approx(loss(ours).mean().item(), rel=0.02)


def reports_of(rows: int):
    """As a task gives them: each with all that is found so far."""
    for count in range(1, rows + 1):
        found = [{"name": str(number), "seconds": float("nan")} for number in range(count)]
        yield Report(f"{count} rows", found, {"0": 1.0}, "s")


def test_what_is_found_is_written_as_it_is_found_and_says_that_it_is_not_all(tmp_path):
    places = {name: tmp_path / f"b.{suffix}" for name, suffix in (("numbers", "json"), ("table", "md"), ("t", "png"))}
    kept = record.Record(places, "Title", ["command"], {"date": "today"})
    for count, report in enumerate(reports_of(3), 1):
        kept.keep({"t": report})
        found = json.loads((tmp_path / "b.json").read_text(), parse_constant=pytest.fail)  # no NaN: it is null
        assert len(found["rows"]) == count and found["rows"][0] == {"task": "t", "name": "0", "seconds": None}
        assert not found["complete"] and "**Incomplete**" in (tmp_path / "b.md").read_text()
    kept.finish({"t": report})
    assert json.loads((tmp_path / "b.json").read_text())["complete"]
    assert (tmp_path / "b.md").read_text() == "# Title\n\ncommand\n\n3 rows\n" and (tmp_path / "b.png").exists()


def test_a_benchmark_that_is_killed_leaves_what_it_had_found(tmp_path):
    output = tmp_path / "killed.json"
    arguments = ["kernels", "quick=true", "rounds=9999", "kernels=[apgd]", f"output={output}"]
    program = [sys.executable, str(ROOT / "launch/bench.py"), *arguments]
    with subprocess.Popen(program, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not output.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
    found = json.loads(output.read_text())
    assert not found["complete"] and found["rows"][0]["kernel"] == "APGD step, linf"


def test_the_device_is_busy_once_where_streams_overlap():
    spans = [("a", 0.0, 10.0), ("b", 5.0, 12.0), ("a", 20.0, 22.0), ("nchwToNhwc", 30.0, 31.0)]
    found = of_spans(spans, steps=2)
    assert found.launches == 2 and found.tiny == 1
    assert found.busy == pytest.approx((12 + 2 + 1) / 2 / 1e6) and found.layout == pytest.approx(0.5e-6)
    assert found.heaviest[0] == ("a", pytest.approx(6e-6), 1)


def test_the_loop_is_held_against_its_parts(tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    found = run("train", tmp_path)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [train.LOOP, train.FED, train.CEILING, train.LOADER]
    assert all(row["images_per_second"] > 0 for row in rows.values())
    assert 0 <= rows[train.LOOP]["data_wait"] <= 1
    assert rows[train.FED]["launches"] > rows[train.CEILING]["launches"] > 100  # of operations, on a CPU
    assert "- the loop reaches " in capsys.readouterr().out


def test_a_runs_own_settings_are_what_is_timed(tmp_path):
    module = script("bench")
    recipe = str(ROOT / "configs/pretrain/simclr_cifar10.yaml")
    config = load(module.TrainBench, ["train", recipe, "quick=true"], module.base, ("task",))
    assert config.optimizer.lr == 0.06 and config.train.batch == 512 and config.window == 1


@pytest.mark.parametrize("section", ["kernels", "waits", "colours", "modes", "steps", "graph"])
def test_the_sections_of_the_truth_run(section):
    config = TruthConfig(sections=(section,), steps=("plain",))
    *_, report = truth.tell_truth(config, 1)
    assert report.passed and report.rows and all(row["section"] == section for row in report.rows)
    assert report.text.startswith(f"### {section.capitalize()}\n\n- ")


def test_a_section_that_fails_takes_no_other_with_it(monkeypatch):
    monkeypatch.setattr(truth, "colours", lambda device: (1 / 0 for _ in range(2)))
    *_, report = truth.tell_truth(TruthConfig(sections=("colours", "graph")), 1)
    assert not report.passed and "- FAILS, fails: ZeroDivisionError: division by zero" in report.text
    assert "graphs: need a GPU" in report.text or torch.cuda.is_available()


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_parts_end_at_their_limits_and_the_rest_goes_on(tmp_path, monkeypatch, capfd):
    left_behind = tmp_path / "left"
    forks = f"import os, time, pathlib\nif not os.fork(): time.sleep(2); pathlib.Path({str(left_behind)!r}).touch()"
    result = json.dumps({"rows": [{"name": "a"}]})
    writes = f"from pathlib import Path\nPath('{tmp_path}/step.json').write_text({result!r})\n"
    writes += f"Path('{tmp_path}/step.md').write_text('# T\\n\\nc\\n\\nv.\\n\\n| table |')"
    parts = {
        "facts": gpu.Part(20, [python("print('so it is')")]),
        "tests": gpu.Part(20, [python("print('at work', flush=True); 1 / 0"), python("print('never')")]),
        "truth": gpu.Part(1, [python(f"{forks}\nprint('begun', flush=True); time.sleep(60)")]),
        "train": gpu.Part(20, [], (), "DALI is not installed"),
        "step": gpu.Part(20, [python(writes)], ("step",)),
    }
    monkeypatch.setattr(gpu, "parts_of", lambda *arguments: parts)
    *_, report = gpu.run_parts(gpu.GpuBenchConfig(parts=tuple(parts)), 1, True, tmp_path, ROOT / "launch/bench.py")
    status = {row["name"]: row["status"] for row in report.rows if "status" in row}
    assert status["facts"] == status["step"] == "passed" and status["train"] == "DALI is not installed"
    assert status["tests"] == "failed with code 1" and status["truth"] == "did not end within 1 s"
    assert not report.passed and report.rows[-1] == {"part": "step", "name": "a"}
    assert "tests failed with code 1; its last lines:\n\n    at work\n" in report.text
    assert "    ZeroDivisionError: division by zero\n" in report.text and "never" not in report.text
    assert report.text.endswith("## Step\n\n| table |") and (tmp_path / "facts.log").read_text() == "so it is\n"
    assert "truth: begun\n" in capfd.readouterr().err
    time.sleep(1.5)
    assert not left_behind.exists()
    monkeypatch.setattr(gpu, "LEAST", 100.0)
    *_, report = gpu.run_parts(gpu.GpuBenchConfig(parts=("facts",), minutes=1), 1, True, tmp_path, ROOT)
    assert report.rows[0]["status"] == "no time left" and not report.passed


def test_one_command_says_all_of_a_machine(tmp_path):
    """From a checkout, wherever one stands; on a CPU, so tiny."""
    arguments = ["gpu", "quick=true", "parts=[facts]", f"output={tmp_path / 'all/gpu.json'}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/bench.py"), *arguments],
        env=environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "| facts | passed | " in done.stdout and "- ok, deepspeed: imports " in done.stdout
    found = json.loads((tmp_path / "all/gpu.json").read_text())
    assert found["complete"] and found["rows"][0]["name"] == "facts" and len(found["rows"]) > 10
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        f"{name}.{suffix}" for name in ("gpu", "facts") for suffix in ("json", "md")
    } | {"facts.log"}


def test_every_part_of_the_command_is_one_that_runs(tmp_path):
    module = script("bench")
    for tiny in (False, True):
        for name, part in gpu.parts_of(1, tiny, tmp_path, ROOT / "launch/bench.py", tmp_path).items():
            assert part.seconds > 0 and part.commands, name
            for command in part.commands:
                if command[1].endswith("bench.py"):
                    config = load(module.schema_of(command[2]), command[2:], module.base, ("task",))
                    assert any(config.output == f"{tmp_path / result}.json" for result in part.results)
    assert all((ROOT / place).exists() for place in gpu.CHOSEN)
