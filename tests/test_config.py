"""Defaults < YAML < key=value, and a line for each mistake."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import Field

from fasttrain.config import Config, Where, describe, differences, load, to_yaml
from fasttrain.errors import UsageError
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
        (["inner=3", "inner.lr=3"], r"'inner.lr': 'inner' is the value 3"),
        (["missing.yaml"], r"cannot read the configuration 'missing.yaml'"),
        (["steps=1", "other.yaml"], r"'other.yaml' is neither the first"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        load(Outer, arguments)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_a_mapping(tmp_path):
    for text, message in [("- 1\n", "holds a list"), ("a: [", "is not YAML")]:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            load(Outer, [str(tmp_path / "c.yaml")])


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
        ("eval", ["task=knn", "source=x", "robust.images=5"], "robust.images=5 is given and not used: task=knn"),
        ("eval", ["task=knn", "source=x", "augment.flip=0.1"], "augment.flip=0.1 is given and not used: augment.an"),
        ("prepare", ["beton.quality=50"], "beton.quality=50 is given and not used: beton.folder=None"),
    ],
)
def test_the_scripts_say_what_they_do_not_read(script_name, arguments, said):
    module, found = script(script_name), []
    schema = getattr(module, f"{script_name.capitalize()}Config")
    load(schema, arguments, say=found.append)
    assert len(found) == 1 and said in found[0]
    usual = [argument for argument in arguments if argument.startswith(("task", "source"))]
    load(schema, usual, say=found.append)
    assert len(found) == 1
