"""Who may import whom, walked over the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"accuracies", "printable", "figures"},
    {"errors", "precision", "processes"},
    {"reading", "rendezvous"},
    {"nearest"},
    {"arguments"},
    {"config"},
    {"experiments"},
    {"distributed"},
    {"environment"},
    {"data", "models", "run", "stop", "watchdog"},
    {"objectives", "attacks", "optim", "output", "weights"},
    {"views"},
    {"step"},
    {"gradient_cache", "checkpoint"},
    {"nonfinite", "cuda_graph"},
    {"export", "inherited"},
    {"report"},
    {"engine", "evaluation", "plots", "cli", "benchmarks", "doctor"},
]
"A part may import its own layer's data and models, and any layer before it."
NEVER = [
    ("engine", "evaluation"),
    ("evaluation", "engine"),
    ("objectives", "attacks"),
    ("attacks", "objectives"),
    ("data", "models"),
    ("models", "data"),
]


def imports(path: Path) -> set[str]:
    """Parts of fasttrain that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name.split(".")[1] for name in found if name.startswith("fasttrain.")}


def files(part: str) -> list[Path]:
    folder = ROOT / "fasttrain" / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def parts() -> set[str]:
    return {path.stem for path in (ROOT / "fasttrain").iterdir() if path.stem not in ("__init__", "__pycache__", "py")}


def test_every_part_has_a_layer():
    assert parts() <= set().union(*LAYERS)


@pytest.mark.parametrize("part", sorted(set().union(*LAYERS) & {p.stem for p in (ROOT / "fasttrain").iterdir()}))
def test_imports_point_one_way(part):
    level = next(i for i, layer in enumerate(LAYERS) if part in layer)
    allowed = set().union(*LAYERS[: level + 1])
    for path in files(part):
        found = imports(path) & set().union(*LAYERS)
        assert found <= allowed, f"{path} imports {found - allowed}"
        assert not [pair for pair in NEVER if pair[0] == part and pair[1] in found], path


def test_kernels_know_nothing_of_fasttrain():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imports(path), path


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.stem)
def test_launch_scripts_import_fasttrain_before_torch(script):
    """It says how OpenMP's threads wait, which is read when torch is imported."""
    names = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.parse(script.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    parts = [name.partition(".")[0] for name in names]
    assert "fasttrain" in (parts[: parts.index("torch")] if "torch" in parts else parts)


def test_threads_of_openmp_sleep_while_they_wait():
    """Spinning, they lose their time to whoever else is busy; see fasttrain_kernels/threads.py."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--help", "run"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    assert "GOMP_SPINCOUNT = '0'" in said


def test_launch_scripts_shadow_no_module():
    import sys

    for path in (ROOT / "launch").glob("*.py"):
        assert path.stem not in sys.stdlib_module_names


def test_every_configuration_resolves():
    from fasttrain.config import load
    from fasttrain.objectives import check_term
    from tests.test_launch import script

    schema = script("pretrain").PretrainConfig
    protocols = sorted((ROOT / "configs/protocols").glob("*.yaml"))
    assert len(protocols) == 3
    for path in [*sorted((ROOT / "configs/pretrain").glob("*.yaml")), *protocols]:
        config = load(schema, [str(path), *(["model.weights=x"] if path in protocols else [])])
        given = yaml.safe_load(path.read_text())
        assert list(config.terms) == list(given["terms"]), path  # none of the defaults' terms is left
        for term in config.terms.values():
            check_term(term, config.model, config.augment.views, config.model.classes or 10, config.train.batch)
