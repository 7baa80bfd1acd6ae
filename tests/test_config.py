"""Defaults < YAML < key=value, and a line for each mistake."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import pytest
from pydantic import Field

from fasttrain.attacks import AttackConfig
from fasttrain.config import Config, PathText, Where, describe, differences, doubts, listed, load, resolve, to_yaml
from fasttrain.data.catalog import DataConfig
from fasttrain.engine import TrainConfig
from fasttrain.errors import UsageError
from fasttrain.nearest import OTHERS_NAMES, all_keys, nearest
from fasttrain.optim import OptimizerConfig
from fasttrain.reading import alternatives
from fasttrain.run import RunConfig
from tests.test_launch import script


class Inner(Config):
    lr: float = Field(0.1, gt=0)
    "peak learning rate"
    name: str = "sgd"


class Outer(Config):
    inner: Inner = Inner()
    steps: int = 3
    "how many"


def test_yaml_then_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("inner:\n  lr: 0.5\nsteps: 7\n")
    assert load(Outer, [str(path), "inner.lr=1e-3"]) == Outer(inner=Inner(lr=1e-3), steps=7)


class Recipe(Config):
    inner: Inner = Inner(lr=0.7, name="lars")


def test_a_key_given_in_a_section_leaves_the_others_at_the_schemas_defaults():
    assert load(Recipe, ["inner.lr=0.2"]) == Recipe(inner=Inner(lr=0.2, name="lars"))


def test_what_is_printed_reads_back(tmp_path):
    config = load(Outer, ["inner.lr=0.25", "inner.name=lars"])
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load(Outer, [str(tmp_path / "b.yaml")]) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inner.lrr=1"], r"unknown key 'inner.lrr'; did you mean 'inner.lr'\?"),
        (["lr=1"], r"unknown key 'lr'; did you mean 'inner.lr'\?"),
        (["iner.lr=1"], r"unknown key 'iner'; did you mean 'inner"),
        (["steps=many"], r"steps='many': should be a valid integer"),
        (["inner.lr=-1"], r"inner.lr=-1: should be greater than 0"),
        (["inner=3"], r"inner='3': 'inner' is a section of keys: set inner.lr, inner.name"),
        (["steps=none"], r"steps='none': should be a valid integer$"),
        (["inner.zzz=1"], r"unknown key 'inner.zzz'; there are inner.lr, inner.name$"),
        (["inner=3", "inner.lr=3"], r"'inner.lr': 'inner' is the value 3"),
        (["missing.yaml"], r"cannot read the configuration 'missing.yaml'"),
        (["steps=1", "other.yaml"], r"'other.yaml' is neither the first"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        load(Outer, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n", "holds a list"),
        (b"text\n", "holds text"),
        (b"a: [", "is not YAML: line 1, column 5"),
        (b"", "is empty"),
        (b"# steps: 3\n", "is empty"),
        (b"steps: \xff\n", "byte 7 is not UTF-8"),
        (b"\x00\x01", "is not YAML"),
        (b"inner:\n\tlr: 1\n", "line 2, column 1: .* not tabs"),
        (b"steps: 1\ninner: {}\nsteps: 2\n", "line 3, column 1: key 'steps' is given twice"),
        (b"inner: {lr: 1, lr: 2}\n", "key 'lr' is given twice"),
        (b"? [a]\n: 1\n", "a key that is no text"),
        (b"steps: !of_ours 1\n", "line 1, column 8: .*of_ours"),
        (b"inner: &a {lr: *a}\n", "an anchor that holds its own alias"),
        (b"inner.lr: 1\n", r"unknown key 'inner.lr': in a YAML file sections are nested, inner: {lr: …}"),
    ],
)
def test_a_file_that_is_no_configuration_is_said_to_be_so_in_a_line(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load(Outer, [str(tmp_path / "c.yaml")])
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_and_the_configuration_in_it(tmp_path):
    with pytest.raises(UsageError, match=r"Is a directory$"):
        load(Outer, [str(tmp_path)])
    (tmp_path / "config.yaml").write_text("steps: 1\n")
    with pytest.raises(UsageError, match=rf"its settings are in '{tmp_path}/config.yaml'"):
        load(Outer, [str(tmp_path)])


def test_a_section_with_nothing_below_it_is_as_by_default(tmp_path):
    (tmp_path / "c.yaml").write_text("inner:\n  # lr: 0.5\n")
    assert load(Outer, [str(tmp_path / "c.yaml")]) == Outer()
    assert load(Outer, [str(tmp_path / "c.yaml"), "inner.lr=0.5"]) == Outer(inner=Inner(lr=0.5))


class Every(Config):
    """A setting of each type."""

    where: PathText = "runs"
    maybe: PathText | None = None
    name: str = "x"
    count: int = 3
    rate: float = Field(0.1, gt=0)
    least: float | None = None
    switch: bool = False
    kind: Literal["no", "yes"] = "no"
    layers: Literal[0, 2, 3] = 2
    pair: tuple[float, float] = (0.9, 0.999)
    kinds: tuple[Literal["train", "val"], ...] = ("train",)
    inner: Inner = Inner()
    parts: dict[str, Inner] = {"a": Inner()}  # noqa: RUF012


def both(tmp_path: Path, key: str, text: str, in_yaml: str | None = None) -> tuple[object, object]:
    """What the setting is by the command line, and by a file; or what is said against it."""
    (tmp_path / "every.yaml").write_text(f"{key}: {text if in_yaml is None else in_yaml}\n")
    found = []
    for arguments in ([f"{key}={text}"], [str(tmp_path / "every.yaml")]):
        try:
            found.append(getattr(load(Every, arguments), key))
        except UsageError as error:
            found.append(str(error))
    return tuple(found)


@pytest.mark.parametrize("key", ["where", "maybe", "name"])
@pytest.mark.parametrize(
    "text", ["2024-01-01", "0017", "20240101", "no", "on", "1e3", "1_000", "0x10", "1:30", ".inf", "true", "runs/a=b"]
)
def test_a_name_is_its_text(tmp_path, key, text):
    assert both(tmp_path, key, text) == (text, text)


ODD = [
    *("exp #1", "a: b", "[a]", "{b}", "*x", "&x", "!tag", "%", "trailing  ", "'quoted'", '"q"', "ünï", "a\nb", "- a"),
    *(
        "?",
        "| x",
        "> x",
        "@x",
        "`x",
        "=",
        "<<",
        "a\u2028b",
        "\ufeff",
        "\x01",
        "caf\udce9",
        "no",
        "null",
        "1e3",
        "a " * 90,
    ),
]


def test_what_the_command_line_gives_is_written_and_read_back_as_it_is(tmp_path):
    draw = random.Random(0)
    mixed = ["x" + "".join(draw.choices("".join(ODD), k=12)) for _ in range(50)]
    for text in [*ODD, *mixed]:
        config = load(Every, [f"where={text}", f"name={text}"])
        assert (config.where, config.name) == (text, text)
        (tmp_path / "c.yaml").write_text(to_yaml(config))
        assert load(Every, [str(tmp_path / "c.yaml")]) == config


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("count", "064", 64),
        ("count", "1e3", 1000),
        ("count", "128.0", 128),
        ("count", "1_000", 1000),
        ("rate", "1e-3", 1e-3),
        ("rate", "1", 1.0),
        ("least", "null", None),
        ("maybe", "null", None),
        ("switch", "yes", True),
        ("switch", "on", True),
        ("switch", "1", True),
        ("switch", "False", False),
        ("switch", "off", False),
        ("kind", "yes", "yes"),
        ("layers", "3", 3),
        ("pair", "[1e-3, 1]", (1e-3, 1.0)),
        ("kinds", "[val, train]", ("val", "train")),
        ("inner", "{lr: 1e-3, name: no}", Inner(lr=1e-3, name="no")),
        ("parts", "{no: {lr: 3}}", {"no": Inner(lr=3)}),
    ],
)
def test_a_settings_type_reads_its_text(tmp_path, key, text, value):
    assert both(tmp_path, key, text) == (value, value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("count", "true", "count='true': should be a valid integer"),
        ("count", "yes", "count='yes': should be a valid integer"),
        ("count", "64.5", "count='64.5': should be a valid integer"),
        ("count", "0x10", "count='0x10': should be a valid integer"),
        ("count", "1:30", "count='1:30': should be a valid integer"),
        ("rate", "true", "rate='true': should be a valid number"),
        ("rate", "nan", "rate=nan: should be"),
        ("rate", "inf", "rate=inf: should be a finite number"),
        ("least", "None", "least='None': should be a valid number or null"),
        ("pair", "[0.9, true]", "pair.1='true': should be a valid number"),
        ("pair", "[0.9]", "pair=[0.9]: should have 2 values"),
        ("pair", "0.9", "pair='0.9': should be a list: pair=[0.9]"),
        ("kinds", "val", "kinds='val': should be a list: kinds=[val]"),
        ("layers", "1", "layers='1': should be 0, 2 or 3"),
        ("switch", "perhaps", "switch='perhaps': should be a valid boolean"),
    ],
)
def test_what_a_type_cannot_read_is_refused_by_name(tmp_path, key, text, message):
    for said in both(tmp_path, key, text):
        assert str(said).startswith(message)


def test_booleans_from_elsewhere_are_no_numbers():
    for values in ({"count": True}, {"rate": True}, {"pair": [True, 1]}):
        with pytest.raises(UsageError, match="should be a valid"):
            resolve(Every, values)


def test_null_is_a_word_where_it_is_quoted_and_a_folder_as_a_path(tmp_path):
    assert both(tmp_path, "maybe", "./null", "'null'") == ("./null", "null")


def test_homes_are_homes_and_nothing_is_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert both(tmp_path, "where", "~/x") == ("/home/me/x",) * 2
    assert both(tmp_path, "maybe", "~/x") == ("/home/me/x",) * 2
    assert both(tmp_path, "where", "./~") == ("./~",) * 2
    assert all("where: is empty (an unset variable?)" in said for said in both(tmp_path, "where", "", "''"))
    assert all("is nobody's home" in said for said in both(tmp_path, "where", "~nobody-of-here/x"))
    (tmp_path / "c.yaml").write_text("count: 7\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(Every, ["~/c.yaml"]).count == 7
    with pytest.raises(UsageError, match="an argument is empty"):
        load(Every, [""])


def schemas() -> list[type[Config]]:
    """All that the scripts use."""
    for path in (Path(__file__).parent.parent / "launch").glob("*.py"):
        importlib.import_module(path.stem)
    found = [Config]
    for schema in found:
        found += [below for below in schema.__subclasses__() if below.__module__ != __name__]
    return found[1:]


def test_every_setting_that_names_a_place_is_a_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "launch"))
    paths, texts = set(), set()
    for schema in schemas():
        if schema.__module__ == "fasttrain.experiments.recipe":
            continue  # texts with variables in braces, which become settings of the scripts that they are given to
        for name, field in schema.model_fields.items():
            if str in alternatives(field.annotation):
                kinds = [*get_args(field.annotation), Annotated[(field.annotation, *field.metadata, None)]]
                validators = [one for kind in kinds for one in getattr(kind, "__metadata__", ())]
                (paths if PathText.__metadata__[0] in validators else texts).add(name)
    assert texts == {"keep_best", "objective", "task", "tasks"}
    assert paths >= {"dir", "root", "train", "val", "cache", "source", "output", "bundle", "folder", "deepspeed"}


class Whole(Config):
    """Much of what a run is told."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    attack: AttackConfig = AttackConfig()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("optim.lr", "optimizer.lr"),
        ("learning_rate", "optimizer.lr"),
        ("train.weight_decay", "optimizer.weight_decay"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("batch_size", "train.batch"),
        ("data.batch_size", "train.batch"),
        ("trainer.max_epochs", "train.epochs"),
        ("output_dir", "run.dir"),
        ("seed", "run.seed"),
        ("fp16", "train.precision"),
        ("epsilon", "attack.eps_255"),
        ("train.batsh", "train.batch"),
        ("optimizer.momentums", "optimizer.momentum"),
        ("zzz", None),
        ("train.zzz", None),
    ],
)
def test_the_nearest_key_is_so_by_meaning_and_then_by_letters(key, meant):
    assert nearest(Whole, key.split(".")) == meant


def test_what_others_call_a_setting_is_a_setting_of_ours(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "launch"))
    keys = [key for schema in schemas() for key in all_keys(schema)]
    unknown = {name for name in OTHERS_NAMES.values() if not any(f".{key}".endswith(f".{name}") for key in keys)}
    assert not unknown


def test_what_the_launcher_decides_is_said_to_be_so():
    for arguments in (["gpus=4"], ["--gpus", "4"], ["train.num_gpus=4"]):
        with pytest.raises(UsageError, match=r"deepspeed --num_gpus N .*, or torchrun --nproc-per-node N"):
            load(Whole, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train.batch", "64", "--train.deterministic", "--run.dir", "a=b"],
        ["--train.batch=64", "--train.deterministic=yes", "--run.dir=a=b"],
        ["--train.deterministic", "on", "train.batch=64", "run.dir=a=b"],
        ["--config", "FILE", "--train.batch", "64"],
        ["-c", "FILE", "train.batch=64"],
        ["train.batch=64", "--config=FILE"],
        ["config=FILE", "train.batch=64"],
        ["FILE", "train.batch=64"],
    ],
)
def test_flags_are_settings_too(tmp_path, arguments):
    file = tmp_path / "a=b.yaml"
    file.write_text("train: {deterministic: true, batch: 8}\nrun: {dir: a=b}\n")
    config = load(Whole, [argument.replace("FILE", str(file)) for argument in arguments])
    assert (config.train.batch, config.train.deterministic, config.run.dir) == (64, True, "a=b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "64"], r"unknown flag '--batch-size'; did you mean train.batch=64\?"),
        (["--lr=0.1"], r"unknown flag '--lr'; did you mean optimizer.lr=0.1\?"),
        (["--verbose"], r"unknown flag '--verbose'; there are run, data, "),
        (["--train.batch"], r"'--train.batch' lacks its value: write train.batch=…"),
        (["--train.batch", "--lr"], r"'--train.batch' lacks its value"),
        (["--config"], r"'--config' lacks its value: write --config FILE"),
        (["train.batch", "64"], r"'train.batch' lacks its value: write train.batch=…"),
        (["train.batch", "=", "64"], r"'train.batch' lacks its value: write train.batch=…"),
        (["train.batch:64"], r"'train.batch:64' lacks its value: write train.batch=…"),
        (["data.root=", "/data"], r"write data.root=/data, without a space"),
        (["a.yaml", "b.yaml"], r"'b.yaml' is neither the first"),
        (["+train.batch=64"], r"'\+train.batch=64' is neither"),
    ],
)
def test_what_is_no_argument_is_answered_by_the_right_form(arguments, message):
    with pytest.raises(UsageError, match=message):
        load(Whole, arguments)


class Task(Config):
    """What takes values without a name."""

    task: Literal["knn", "linear"]
    source: PathText
    batch: int = 8
    data: DataConfig = DataConfig()


@pytest.mark.parametrize(
    "arguments",
    [
        ["knn", "epoch=99-step=500.safetensors"],
        ["batch=8", "knn", "epoch=99-step=500.safetensors"],
        ["--task", "knn", "--source", "epoch=99-step=500.safetensors"],
        ["source=epoch=99-step=500.safetensors", "knn"],
    ],
)
def test_a_value_without_a_name_may_hold_an_equals_sign(arguments):
    assert load(Task, arguments, positional=("task", "source")).source == "epoch=99-step=500.safetensors"


def test_what_holds_an_equals_sign_is_a_file_a_folder_or_a_typing_error(tmp_path, monkeypatch):
    def loaded(*arguments):
        return load(Task, ["knn", *arguments], positional=("task", "source"))

    with pytest.raises(UsageError, match=r"'data.root' lacks its value: write data.root=…"):
        loaded("data.root", "/data")
    assert loaded("runs/lr=0.1").source == "runs/lr=0.1"
    with pytest.raises(UsageError, match=r"unknown key 'data.rot'; did you mean 'data.root'"):
        loaded("data.rot=/x")
    with pytest.raises(UsageError, match=r"unknown key 'zzz'"):
        loaded("runs/x", "zzz=1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bacth=3").mkdir()
    assert loaded("bacth=3").source == "bacth=3"
    (tmp_path / "task=a.yaml").write_text("batch: 9\n")
    assert loaded("runs/x", "./task=a.yaml").batch == 9


def test_a_file_for_another_script_is_said_to_be_so(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("task: knn\nsource: runs/x\n")
    with pytest.raises(UsageError, match=r"recipe.yaml' is a configuration of launch/task.py: run launch/task.py /"):
        load(Outer, [str(path)], others=lambda: {"launch/every.py": Every, "launch/task.py": Task})
    path.write_text("task: knn\ninnner: {lr: 1}\n")
    with pytest.raises(UsageError, match=r"unknown key 'innner'; did you mean 'inner.lr'"):
        load(Outer, [str(path)], others=lambda: {"launch/task.py": Task})


def test_many_complaints_are_capped():
    with pytest.raises(UsageError, match=r"^([^;]+; (there are|did you)[^;]+; ){6}and 3 more$"):
        load(Outer, [f"k{i}=1" for i in range(9)])
    assert listed(["a", "b"]) == "a; b"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eps_255": 0.031}, "attack.eps_255=0.031 is 0.031/255: for 0.031 of the range [0, 1] give 7.905"),
        ({"eps_255": 0.5, "norm": "l2"}, "attack.eps_255=0.5 is 0.5/255: for 0.5 of the range [0, 1] give 127.5"),
        ({"name": "pgd", "step_255": 0.0078}, "attack.step_255=0.0078: 10 steps of 0.0078/255 do not reach the bound"),
        ({"eps_255": 1}, None),
        ({"eps_255": 0}, None),
        ({"name": "pgd", "step_255": 0.8}, None),
        ({"eps_255": 127.5, "norm": "l2"}, None),
        ({"eps_255": 8, "norm": "l2"}, "attack.eps_255=8 bounds the l2 norm over all pixels by 0.031: 0.5 (127.5) is"),
        ({"eps_255": 127.5}, "attack.eps_255=127.5 moves each value by up to 0.5: 8 (0.031) is usual; for an l2 bound"),
        ({"eps_255": 32512.5, "norm": "l2"}, "attack.eps_255=32512.5 is an l2 norm of 127.5: 127.5 (0.5) is usual for"),
        ({"eps_255": 76.5}, None),
        ({"eps_255": 765, "norm": "l2"}, None),
    ],
)
def test_a_probable_slip_of_units_is_said(settings, said):
    found = doubts(Whole(attack=AttackConfig(**settings)))
    assert len(found) == (said is not None) and (said is None or found[0].startswith(said))


def test_differences_name_dotted_keys():
    saved = Outer(inner=Inner(lr=0.2)).model_dump(mode="json")
    del saved["steps"]
    assert differences(Outer(), saved) == ["inner.lr: 0.2 -> 0.1", "steps: (absent) -> 3"]


def test_help_shows_the_schemas_own_defaults_of_a_section():
    assert any(line.split()[:3] == ["inner.lr", "=", "0.7"] for line in describe(Recipe))


def test_help_lists_every_key_with_its_meaning():
    text = "\n".join(describe(Outer))
    assert "inner.lr" in text and "peak learning rate" in text and "steps" in text


class Partly(Config):
    kind: str = "plain"
    depth: int = 1
    size: int = 2
    inner: Inner = Inner()

    reads: ClassVar[dict[str, Where]] = {"depth": Where("kind", ("deep",)), "inner": Where("size")}


class Parts(Config):
    part: Partly = Partly(depth=5)
    named: dict[str, Partly] = Field({"a": Partly()})


def lines(*arguments: str) -> list[str]:
    said: list[str] = []
    load(Parts, list(arguments), say=said.append)
    return said


def test_what_is_given_and_nothing_reads_is_said():
    assert lines("part.depth=3") == ["WARNING: part.depth=3 is given and not used: part.kind=plain"]
    assert lines("part.size=0", "part.inner.lr=0.5") == [
        "WARNING: part.inner.lr=0.5 is given and not used: part.size=0"
    ]
    assert lines("named.a.depth=3") == ["WARNING: named.a.depth=3 is given and not used: named.a.kind=plain"]


def test_what_is_read_or_the_usual_or_not_given_is_not_said():
    assert not lines("part.depth=3", "part.kind=deep")
    assert not lines("part.depth=5") and not lines("part.kind=other") and not lines("part.size=3", "part.inner.lr=0.5")


def test_an_evaluation_takes_no_keys_of_another():
    with pytest.raises(UsageError, match="unknown key 'robust'"):
        load(script("eval").schema_of("knn"), ["task=knn", "source=x", "robust.images=5"])


@pytest.mark.parametrize(
    ("script_name", "arguments", "said"),
    [
        (
            "pretrain",
            ["optimizer.betas=[0.5,0.9]"],
            "optimizer.betas=(0.5, 0.9) is given and not used: optimizer.name",
        ),
        (
            "pretrain",
            ["optimizer.cycle_epochs=3"],
            "optimizer.cycle_epochs=3.0 is given and not used",
        ),
        (
            "pretrain",
            ["optimizer.milestones=[3,5]"],
            "optimizer.milestones=(3.0, 5.0) is given and not used: optimizer.",
        ),
        ("pretrain", ["train.steps=5", "train.epochs=7"], "train.epochs=7 is given and not used: train.steps=5"),
        (
            "pretrain",
            ["evaluate.every_epochs=0", "evaluate.knn.neighbours=3"],
            "evaluate.knn.neighbours=3 is given and not used: evaluate.every_epochs=0",
        ),
        (
            "pretrain",
            ["terms.simclr.penalty.precision=fp32"],
            "terms.simclr.penalty.precision=fp32 is given and not used: terms.simclr.penalty.weight=0",
        ),
        ("finetune", ["source=x", "optimizer.name=sgd", "optimizer.betas=[0.5,0.9]"], "optimizer.betas=(0.5, 0.9)"),
        ("finetune", ["source=x", "robust.every_steps=0", "classifier.batch=3"], "classifier.batch=3 is given and not"),
        ("eval", ["task=knn", "source=x", "augment.flip=0.1"], "augment.flip=0.1 is given and not used: augment.an"),
        ("prepare", ["beton.quality=50"], "beton.quality=50 is given and not used: beton.folder=None"),
    ],
)
def test_the_scripts_say_what_they_do_not_read(script_name, arguments, said):
    module, found = script(script_name), []
    schema = module.schema_of("knn") if script_name == "eval" else getattr(module, f"{script_name.capitalize()}Config")
    load(schema, arguments, say=found.append)
    assert len(found) == 1 and said in found[0]
    usual = [argument for argument in arguments if argument.startswith(("task", "source"))]
    load(schema, usual, say=found.append)
    assert len(found) == 1
