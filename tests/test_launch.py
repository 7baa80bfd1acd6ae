"""The scripts as a person runs them: what they leave behind, how they stop, go on and complain."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fasttrain import cli
from fasttrain.checkpoint.resume import contradictions
from fasttrain.config import load
from fasttrain.errors import UsageError

ROOT = Path(__file__).parent.parent
SMALL = [
    "augment.size=16",
    "model.width=0.0625",
    "model.head.width=8",
    "model.head.out=8",
    "train.batch=8",
    "train.steps=6",
    "train.precision=fp32",
    "train.device=cpu",
    "optimizer.warmup_epochs=0",
    "run.log_every=1",
    "loader.threads=1",
]


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if str(ROOT / "launch") not in sys.path:
        sys.path.append(str(ROOT / "launch"))  # where a script that is run finds the others
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    """Ours, without what a process group of this process left in it."""
    mine = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in mine}


def command(launcher: str, *arguments: str) -> list[str]:
    program = [str(ROOT / "launch" / "pretrain.py"), *SMALL, *arguments]
    beside = Path(sys.executable).parent
    return {
        "python": [sys.executable, *program],
        "deepspeed": [str(beside / "deepspeed"), "--num_gpus", "2", "--master_port", "29637", *program],
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "29638",
            *program,
        ],
    }[launcher]


def run(launcher: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(launcher, *arguments),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )


def pretrain_here(*arguments: str) -> int:
    module = script("pretrain")
    return module.pretrain(load(module.PretrainConfig, [*SMALL, *arguments], module.of_weights))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def undisturbed(images, tmp_path_factory) -> Path:
    """A finished run of one process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert pretrain_here(f"data.root={images}", f"run.dir={folder}") == 0
    return folder


def test_a_run_leaves_what_the_readme_says(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "curves.png"} <= names
    assert {"encoder.safetensors", "encoder.json", "environment.json"} <= names
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "knn_top1" in line] == [0, 6]
    assert {"lr", "images_per_second", "data_wait", "epoch"} <= lines[1].keys()


def test_two_ranks_under_each_launcher_train_as_one_process_does(images, undisturbed, tmp_path):
    for launcher in ("deepspeed", "torchrun"):
        folder = tmp_path / launcher
        done = run(launcher, f"data.root={images}", f"run.dir={folder}")
        assert done.returncode == 0, done.stderr
        assert "kNN accuracy" in done.stdout
        ours = [line["loss"] for line in metrics(folder) if "loss" in line]
        theirs = [line["loss"] for line in metrics(undisturbed) if "loss" in line]
        assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(images, undisturbed, tmp_path, number):
    folder = tmp_path / "run"
    arguments = [f"data.root={images}", f"run.dir={folder}"]
    with subprocess.Popen(
        command("python", *arguments), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if line.startswith("step 2/"):
                process.send_signal(number)
                break
        process.stderr.read()
    assert process.returncode == cli.EXIT_SAVED_ON_SIGNAL
    stopped_at = metrics(folder)[-1]["step"]
    assert 2 <= stopped_at < 6
    stopped = json.loads((folder / "environment.json").read_text())
    assert stopped["done"] is None and stopped["command"].endswith(f" {shlex.join(arguments)}")
    assert pretrain_here(*arguments) == 0
    finished = json.loads((folder / "environment.json").read_text())
    assert finished["done"] and finished["step"] == stopped_at
    assert [start | {"earlier": []} for start in finished["earlier"]] == [stopped]
    finished = load_file(str(folder / "checkpoints/step-00000006/model.safetensors"))
    expected = load_file(str(undisturbed / "checkpoints/step-00000006/model.safetensors"))
    assert all(finished[name].equal(expected[name]) for name in expected)
    columns = ("step", "loss", "lr", "knn_top1")
    assert [[line.get(c) for c in columns] for line in metrics(folder)] == [
        [line.get(c) for c in columns] for line in metrics(undisturbed)
    ]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_with_deterministic_algorithms_a_run_gone_on_with_ends_bit_for_bit_the_same(images, tmp_path, device):
    given = [f"data.root={images}", f"train.device={device}", "train.deterministic=true", "run.save_every=3"]
    sealed = []
    for name in ("whole", "parts"):
        done = run("python", *given, f"run.dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        sealed.append((tmp_path / name / "checkpoints/step-00000006/manifest.json").read_text())
        assert ("going on from" in done.stderr) == (name == "parts")
        if name == "whole":
            shutil.copytree(tmp_path / name, tmp_path / "parts")
            shutil.rmtree(tmp_path / "parts/checkpoints/step-00000006")
    sealed = [{file: seal["sha256"] for file, seal in json.loads(x).items() if file != "state.json"} for x in sealed]
    assert sealed[0] == sealed[1]


def copy_of(run_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_folder, tmp_path / "copy"))


def test_a_finished_run_run_again_says_so_and_changes_nothing(images, undisturbed, tmp_path):
    folder = copy_of(undisturbed, tmp_path)
    before = (folder / "metrics.jsonl").read_text()
    assert pretrain_here(f"data.root={images}", f"run.dir={folder}") == 0
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_damaged_checkpoint_is_passed_over_and_none_whole_is_an_error(images, undisturbed, tmp_path, capfd):
    folder = copy_of(undisturbed, tmp_path)
    newest = folder / "checkpoints/step-00000006"
    older = Path(shutil.copytree(newest, folder / "checkpoints/step-00000003"))
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert pretrain_here(f"data.root={images}", f"run.dir={folder}") == 0
    assert "WARNING: checkpoint" in capfd.readouterr().err
    for path in (newest, older):
        data = bytearray((path / "optimizer.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "optimizer.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match=r"is whole .*start over with another run\.dir"):
        pretrain_here(f"data.root={images}", f"run.dir={folder}")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_a_line(images, tmp_path, monkeypatch):
    from fasttrain.checkpoint import files

    def full(*arguments):
        raise OSError(28, "No space left on device")

    arguments = [f"data.root={images}", f"run.dir={tmp_path / 'run'}", "run.save_every=2"]
    for where in ("_write", "_sync"):
        monkeypatch.setattr(files, where, full)
        with pytest.raises(UsageError, match=r"checkpoint of step 2 .* No space left on device.*previous checkpoint"):
            pretrain_here(*arguments)
        monkeypatch.undo()
        assert not list((tmp_path / "run/checkpoints").glob("step-*"))
    assert pretrain_here(*arguments) == 0  # and with space again it goes on


def test_a_resume_that_contradicts_its_checkpoint_names_the_keys(images, undisturbed, tmp_path):
    folder = copy_of(undisturbed, tmp_path)
    with pytest.raises(
        UsageError, match=r"optimizer.lr: .* -> 0.07; train.steps: 6 -> 9.* made longer.*model.weights="
    ):
        pretrain_here(f"data.root={images}", f"run.dir={folder}", "optimizer.lr=0.07", "train.steps=9")
    other = Path(shutil.copytree(images, tmp_path / "other"))
    (other / "train/cat/0.jpg").unlink()
    with pytest.raises(UsageError, match="begun on other images"):
        pretrain_here(f"data.root={other}", f"run.dir={folder}")


def test_a_run_of_an_older_version_lacks_new_settings_and_goes_on(images, undisturbed, tmp_path):
    from fasttrain.checkpoint import contradictions

    module = script("pretrain")
    config = load(module.PretrainConfig, [*SMALL, f"data.root={images}"])
    saved = config.model_dump(mode="json")
    del saved["optimizer"]["schedule"], saved["export"], saved["model"]["weights"]
    assert not contradictions(config, {"config": saved})
    other = load(module.PretrainConfig, [*SMALL, f"data.root={images}", "optimizer.schedule=constant"])
    assert contradictions(other, {"config": saved}) == ["optimizer.schedule: cosine -> constant"]


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(str(folder / f"checkpoints/step-{step:08d}/model.safetensors"))


def test_a_finished_run_of_a_constant_schedule_is_made_longer(images, tmp_path, capfd):
    folder = tmp_path / "run"
    given = [f"data.root={images}", "optimizer.schedule=constant", "evaluate.every_epochs=1", f"run.dir={folder}"]
    for steps in (3, 5):
        assert pretrain_here(*given, f"train.steps={steps}") == 0
    assert "step-00000003 (read and checked" in capfd.readouterr().err
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and len({line["lr"] for line in lines}) == 1
    assert json.loads((folder / "encoder.json").read_text())["step"] == 5
    with pytest.raises(UsageError, match=r"has taken 5 steps, and train.steps or train.epochs ask for 4"):
        pretrain_here(*given, "train.steps=4")


def test_pretraining_starts_from_a_runs_weights_and_goes_on_without_them(images, undisturbed, tmp_path, capfd):
    source, folder = copy_of(undisturbed, tmp_path), tmp_path / "run"
    given = [f"data.root={images}", f"run.dir={folder}", f"model.weights={source}", "train.steps=2"]
    given += ["run.save_every=1", "optimizer.lr=1e-9", "export.normaliser=inside"]
    assert pretrain_here(*given) == 0
    assert "the backbone starts from" in capfd.readouterr().err
    first, theirs = weights_of(folder, 1), weights_of(undisturbed, 6)
    backbone = [name for name in theirs if name.startswith("encoder.backbone.") and "weight" in name]
    assert all(torch.allclose(first[name], theirs[name], atol=1e-5) for name in backbone)
    assert not torch.allclose(first["encoder.head.0.weight"], theirs["encoder.head.0.weight"], atol=1e-3)
    card = json.loads((folder / "encoder.json").read_text())
    assert card["model"]["weights"] == str(source) and card["input"]["normaliser"] == "inside"
    shutil.rmtree(source)
    shutil.rmtree(folder / "checkpoints/step-00000002")
    assert pretrain_here(*given) == 0
    assert metrics(folder)[0]["knn_top1"] == metrics(undisturbed)[-1]["knn_top1"]
    with pytest.raises(UsageError, match=r"model.weights: .* -> .*other"):
        pretrain_here(*given, f"model.weights={tmp_path / 'other'}")


def test_a_finetuning_run_in_a_pretraining_runs_folder_is_told_whose_it_is(images, undisturbed, tmp_path):
    folder, module = copy_of(undisturbed, tmp_path), script("finetune")
    given = ["train.steps=1", "train.batch=8", "optimizer.warmup_steps=0", "robust.every_steps=0", "loader.threads=1"]
    given += ["train.device=cpu"]
    given += [f"source={folder}", f"run.dir={folder}", f"data.root={images}", "train.precision=fp32"]
    with pytest.raises(UsageError, match=r"is the folder of a run of launch/pretrain.py, .*another with run.dir=…$"):
        module.finetune(load(module.FinetuneConfig, given, module.of_source))


def test_a_home_is_the_same_place_in_all_settings(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(images)
    given = ["data.root=~/data", "run.dir=~/run", "train.steps=1", "evaluate.every_epochs=0"]
    assert pretrain_here(*given) == 0
    assert not (tmp_path / "~").exists() and (tmp_path / "run/encoder.json").exists()

    config = load(script("pretrain").PretrainConfig, [*SMALL, *given])
    saved = json.loads((tmp_path / "run/checkpoints/step-00000001/state.json").read_text())["config"]
    assert saved["data"]["root"] == config.data.root == str(tmp_path / "data")
    saved["data"]["root"], saved["run"]["dir"] = "~/data", "~/run"  # as runs of before would have it
    assert contradictions(config, {"config": saved}) == []

    module = script("eval")
    given = ["knn", "~/run", "output=~/knn.json", "device=cpu"]
    config = load(module.schema_of("knn"), given, module.of_run, ("task", "source"))
    assert config.data.root == str(tmp_path / "data") and config.augment.size == 16
    assert not module.evaluate(config) and (tmp_path / "knn.json").exists()


def test_a_folder_that_a_live_run_holds_is_refused(images, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="held by a live run"):
            pretrain_here(f"data.root={images}", f"run.dir={tmp_path / 'run'}")


def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_replayed(images, tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(UsageError, match=r"the loss of step \d is (nan|inf)"):
        pretrain_here(f"data.root={images}", f"run.dir={folder}", "optimizer.lr=1e30")
    (evidence,) = folder.glob("not-finite-step-*")
    report = json.loads((evidence / "step.json").read_text())
    assert len(report["ranks"][0]["index"][0]) == 8 and (evidence / "weights.safetensors").exists()
    assert not list((folder / "checkpoints").glob("step-*"))

    module = script("replay")
    assert module.replay(load(module.ReplayConfig, [f"bundle={evidence}", "device=cpu"])) == 1
    assert f"step {report['step']} is" in (said := capsys.readouterr().out) and "not finite:\n  " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.root=/nowhere"], r"data.root='/nowhere' does not exist"),
        (["train.batch=1000"], r"batch of 1000 is larger than the data set's 24 images"),
        (["train.device=cuda"], r"train.device=cuda, but PyTorch sees no GPU"),
        (["run.dir=/dev/null/run"], r"run.dir=/dev/null/run cannot be written"),
        (["terms.simclr.temperature=-1"], r"terms.simclr.temperature=-1: should be greater than 0"),
        (["train.batsh=8"], r"unknown key 'train.batsh'; did you mean 'train.batch'\?"),
        (["train.epochs=ten"], r"train.epochs='ten': should be a valid integer"),
        (["train.zero_stage=3"], r"zero_stage=3 is refused"),
        (["optimizer.warmup_epochs=90"], r"steps of warm-up in a run of 6"),
        (["optimizer.implementation=apex", "optimizer.name=adamw"], r"git clone https://github.com/NVIDIA/apex"),
    ],
)
def test_a_mistake_names_the_value_and_the_remedy(images, tmp_path, arguments, message):
    import torch

    if "train.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=message) as caught:
        pretrain_here(f"data.root={images}", f"run.dir={tmp_path / 'run'}", *arguments)
    assert "\n" not in str(caught.value)


def test_a_class_without_a_readable_image_is_named(images, tmp_path):
    root = Path(shutil.copytree(images, tmp_path / "bad"))
    for path in (root / "train/dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="dog"):
        pretrain_here(f"data.root={root}", f"run.dir={tmp_path / 'run'}")


def test_a_mistake_ends_all_ranks_with_one_line_and_its_code(tmp_path):
    began = time.monotonic()
    done = run("deepspeed", "data.root=/nowhere", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == cli.EXIT_MISTAKE
    assert done.stderr.count("error: data.root='/nowhere' does not exist") == 1
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 120


def test_help_and_the_resolved_configuration():
    helped = run("python", "--help")
    assert helped.returncode == 0 and "optimizer.lr " in helped.stdout and "key=value" in helped.stdout
    printed = run("python", "--print-config", "optimizer.lr=0.125")
    assert printed.returncode == 0 and "  lr: 0.125\n" in printed.stdout


def test_a_probable_slip_and_a_file_of_another_script_are_said_from_the_command_line(tmp_path):
    def launched(name: str, *arguments: str) -> subprocess.CompletedProcess:
        program = [sys.executable, str(ROOT / "launch" / name), *arguments]
        return subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=240)

    warned = launched("finetune.py", "source=x", "--print-config", "attack.eps_255=0.031")
    assert warned.returncode == 0 and "  eps_255: 0.031\n" in warned.stdout
    assert "WARNING: attack.eps_255=0.031 is 0.031/255: for 0.031 of the range [0, 1] give 7.905" in warned.stderr
    refused = launched("finetune.py", "source=x", "--config", str(ROOT / "configs/pretrain/simclr_cifar10.yaml"))
    assert refused.returncode == cli.EXIT_MISTAKE
    assert "simclr_cifar10.yaml' is a configuration of " in refused.stderr
    assert "launch/pretrain.py: run " in refused.stderr and refused.stderr.count("error: ") == 1
    helped = launched("pretrain.py", "--help", "optimizer")
    assert "\n  optimizer.lr " in helped.stdout and "\n  train.batch " not in helped.stdout


def test_evaluation_of_a_run_agrees_with_the_run(undisturbed, tmp_path, capsys):
    module = script("eval")
    for task, key in (("knn", "top1"), ("linear", "val_top1")):
        given = [f"task={task}", f"source={undisturbed}", f"output={tmp_path / task}.json", "device=cpu"]
        given += ["linear.l2=[0.1]"] * (task == "linear")
        assert not module.evaluate(load(module.schema_of(task), given, module.of_run))
        table = json.loads((tmp_path / f"{task}.json").read_text())
        assert 0 <= table[key] <= 1 and table["val"]["images"] == 12
        if task == "knn":
            assert table["top1"] == pytest.approx(metrics(undisturbed)[-1]["knn_top1"])
    assert "top1" in capsys.readouterr().out


def evaluate_here(task: str, source: Path, *given: str) -> dict:
    module = script("eval")
    arguments = [f"task={task}", f"source={source}", "device=cpu", *given]
    module.evaluate(load(module.schema_of(task), arguments, module.of_run))
    places = [text.partition("=")[2] for text in given if text.startswith("output=")]
    return json.loads(Path(*places or [source / f"eval-{task}.json"]).read_text())


def test_a_run_that_diverges_has_no_best_and_its_weights_are_refused(images, tmp_path, capfd):
    """Its loss stays finite: in evaluation mode its features are not."""
    folder = tmp_path / "run"
    given = ["optimizer.lr=1e8", "evaluate.every_epochs=1", "run.keep=1", "run.keep_best=max:knn_top1"]
    assert pretrain_here(f"data.root={images}", f"run.dir={folder}", *given) == 0
    said = capfd.readouterr()
    assert re.search(r"kNN accuracy +not finite trained, \d+\.\d % the same encoder untrained", said.out)
    assert "WARNING: knn_top1 of step 3 cannot be measured: the features of 24 of 24 train images are " in said.err
    assert "running_var is not finite" in said.err and "none is kept as the best" in said.err
    found = {line["step"]: line["knn_top1"] for line in metrics(folder) if "knn_top1" in line}
    assert found[0] is not None and found[3] is None and found[6] is None
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000006"]
    for task in ("knn", "linear", "robust"):
        with pytest.raises(UsageError, match=r"cannot be used: .*running_var is not finite \(\d+ of \d+ values\)"):
            evaluate_here(task, folder, f"output={tmp_path / 'o.json'}")
    assert not (tmp_path / "o.json").exists()


def test_the_place_of_an_evaluation_is_tried_first_and_the_table_printed_in_any_case(
    undisturbed, tmp_path, capfd, monkeypatch
):
    table = evaluate_here("knn", undisturbed, f"output={tmp_path / 'new/knn.json'}")
    assert table["source"] == str(undisturbed) and not list(undisturbed.glob("eval-*"))
    capfd.readouterr()

    module = script("eval")
    config = load(module.schema_of("knn"), ["task=knn", f"source={undisturbed}", f"output={tmp_path}"], module.of_run)
    monkeypatch.setattr(module, "EvaluationData", None)  # it comes to no work
    with pytest.raises(UsageError, match=r"cannot be written \(it is a folder\): choose another place with output=…"):
        module.evaluate(config)
    assert "top1" not in capfd.readouterr().out

    with pytest.raises(UsageError, match=r"'/dev/full' cannot be written \(No space .* output=…"):  # found at the end
        evaluate_here("knn", undisturbed, "output=/dev/full")
    assert "top1 " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "schema", "given", "work"),
    [
        ("prepare", "PrepareConfig", "beton.folder", "verify"),
        ("bench", "StepBench", "output", "TASKS"),
    ],
)
def test_places_of_results_are_tried_before_the_work(images, tmp_path, monkeypatch, name, schema, given, work):
    (tmp_path / "file").write_text("")
    module = script(name)
    arguments = [f"{given}={tmp_path / 'file/there.json'}"]
    arguments += [f"data.root={images}"] if name == "prepare" else ["task=step"]
    config = load(getattr(module, schema), arguments)
    monkeypatch.setattr(module, work, None)  # it comes to none
    remedy = f"choose another place with {given}=…"
    with pytest.raises(UsageError, match=rf"/file/there.* cannot be written \(.*{re.escape(remedy)}"):
        getattr(module, name)(config)
    assert not (images / "train/.fasttrain-manifest.json").exists()


def test_a_benchmark_writes_no_two_results_to_one_place(tmp_path):
    with pytest.raises(UsageError, match="name the numbers' file"):
        script("bench").places_of(tmp_path / "bench.md", ["step"])


def test_a_cut_card_and_an_unreadable_configuration_fall_back_on_the_checkpoint(undisturbed, tmp_path, capfd):
    expected = evaluate_here("knn", undisturbed, f"output={tmp_path / 'whole.json'}")
    folder = copy_of(undisturbed, tmp_path)
    card = folder / "encoder.json"
    for content in (card.read_bytes()[:20], b"\xff\x00", b"[]", b"{}"):
        card.write_bytes(content)
        (folder / "config.yaml").write_bytes(b"\xff" + content)
        found = evaluate_here("knn", folder)
        assert (found["top1"], found["val"]) == (expected["top1"], expected["val"])
        said = capfd.readouterr().err
        assert "config.yaml' cannot be read" in said and "step-00000006 says is taken instead" in said
        assert "has no encoder.json that can be read: the weights of" in said
        assert "step-00000006 are taken instead" in said


def ranks_of(launcher: subprocess.Popen, count: int) -> dict[int, int]:
    """Process ids by rank, of the Python processes below the launcher that run the script."""
    found = {}
    below = [launcher.pid]
    while below:
        pid = below.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            below += map(int, task.read_text().split())
        try:
            place = dict(x.partition("=")[::2] for x in Path(f"/proc/{pid}/environ").read_text().split("\0"))
            if "pretrain.py" in Path(f"/proc/{pid}/cmdline").read_text() and "LOCAL_RANK" in place:
                found[int(place["RANK"])] = pid
        except OSError:
            continue
    return found if len(found) == count else {}


def steps_seen(process: subprocess.Popen, step: int) -> str:
    """Its stderr up to the report of ``step``."""
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith(f"step {step}/"):
            return said
    raise AssertionError(said)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


LONG = ["train.steps=400", "run.save_every=5", "evaluate.every_epochs=0", "run.heartbeat_timeout=10"]


@pytest.mark.faults
def test_after_sigterm_to_deepspeed_itself_no_rank_is_left_and_the_run_is_saved(images, tmp_path):
    """Its runner passes the signal on to nobody and ends; its launcher and the ranks would live on."""
    folder = tmp_path / "run"
    arguments = command("deepspeed", *LONG, f"data.root={images}", f"run.dir={folder}")
    with subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        steps_seen(process, 3)
        ranks = ranks_of(process, 2)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()  # to the end of the last process that writes there
    assert len(ranks) == 2 and not any(map(alive, ranks.values()))
    assert "the launcher is gone" in said and "stopped by a signal; saved in" in said


@pytest.mark.faults
@pytest.mark.parametrize(("launcher", "code"), [("python", 75), ("torchrun", 1), ("deepspeed", -signal.SIGINT)])
def test_ctrl_c_saves_under_every_launcher(images, tmp_path, launcher, code):
    """A terminal sends SIGINT to all processes of the job; deepspeed's runner ends at once, and the ranks save."""
    folder = tmp_path / "run"
    arguments = command(launcher, *LONG, "model.width=0.125", f"data.root={images}", f"run.dir={folder}")
    pipes = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(arguments, env=environment(), **pipes) as process:
        steps_seen(process, 6)
        os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == code, said
    assert "interrupted: saving and ending" in said and "stopped by a signal; saved in" in said


@pytest.mark.faults
def test_two_jobs_of_the_same_command_on_one_host_do_not_meet(images, tmp_path):
    """Neither names a port, and deepspeed's launcher has one for all."""
    jobs, more = [], ("model.width=0.125", "evaluate.every_epochs=0", f"data.root={images}")
    for name in ("first", "second"):
        arguments = command("deepspeed", *more, f"run.dir={tmp_path / name}")
        del arguments[(port := arguments.index("--master_port")) : port + 2]
        jobs.append(subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True))
    assert [(job.communicate()[1], job.returncode)[1] for job in jobs] == [0, 0]


@pytest.mark.faults
@pytest.mark.parametrize("lost", [0, 1])
def test_torchrun_goes_on_by_itself_after_a_rank_was_killed(images, tmp_path, lost):
    folder = tmp_path / "run"
    arguments = command("torchrun", *LONG, "train.steps=40", f"data.root={images}", f"run.dir={folder}")
    arguments.insert(arguments.index("--nproc-per-node"), "--max-restarts=2")
    with subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        steps_seen(process, 12)
        began = time.monotonic()
        os.kill(ranks_of(process, 2)[lost], signal.SIGKILL)
        said = steps_seen(process, 15)
        assert time.monotonic() - began < 120
        said += process.stderr.read()
    assert process.returncode == 0 and "going on from" in said, said
    assert f"rank {lost} (process" in said
