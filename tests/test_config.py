"""Defaults < YAML < key=value, and a line for each mistake."""

from __future__ import annotations

import pytest
from pydantic import Field

from fasttrain.config import Config, describe, differences, load, to_yaml
from fasttrain.errors import UsageError


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
