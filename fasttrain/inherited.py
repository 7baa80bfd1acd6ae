"""What a command takes over from a run's folder where nothing else is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from fasttrain import checkpoint, distributed
from fasttrain.data.catalog import DataConfig
from fasttrain.data.loader import LoaderConfig
from fasttrain.errors import UsageError


def settings_of(folder: Any) -> dict[str, dict[str, Any]]:
    """The sections of the configuration of the run in ``folder``; {} where it is no run's.

    They are read from ``config.yaml``, and where that cannot be read, with a line, from the newest whole checkpoint.

    Raises:
        UsageError: neither can be read.
    """
    folder = Path(os.path.expanduser(str(folder or "")))
    path, checkpoints = folder / "config.yaml", folder / "checkpoints"
    try:
        if not folder.is_dir():
            return {}
        return _sections(yaml.safe_load(path.read_text()))
    except FileNotFoundError as error:
        if not any(checkpoints.glob("step-*")):
            return {}
        reason = error.strerror
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
    found, _ = checkpoint.find(checkpoints)
    try:
        sections = _sections(found and found.state.get("config"))
    except ValueError:
        raise UsageError(
            f"'{path}' cannot be read ({reason}), and no checkpoint says what it said: move it away, and give "
            "data.root and what else it should say"
        ) from None
    distributed.say(f"WARNING: '{path}' cannot be read ({reason}): what {found.path} says is taken instead")
    return sections


def settings_of_begun(given: dict[str, Any], default: str) -> dict[str, Any]:
    """Those of the run that ``given`` goes on with: its folder (``default``, if none is given) has a checkpoint."""
    folder = Path(os.path.expanduser(str(_mapping(given.get("run")).get("dir", default))))
    return settings_of(folder) if any((folder / "checkpoints").glob("step-*")) else {}


def data_of(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The sections ``data`` and ``loader`` of a run, unless another data set is given: to that one they do not apply.

    A line says which of them are left.
    """
    theirs, asked = saved.get("data", {}), _mapping(given.get("data"))
    if "root" not in asked or _same(asked["root"], theirs.get("root")):
        return {key: saved[key] for key in ("data", "loader") if key in saved}
    left = []
    for section, defaults in (("data", DataConfig()), ("loader", LoaderConfig())):
        usual = defaults.model_dump(mode="json") | _mapping(given.get(section))
        values = {k: v for k, v in saved.get(section, {}).items() if k in usual and k != "root" and v != usual[k]}
        left += [f"{section}.{key}={value}" for key, value in values.items()]
    if left:
        distributed.say(
            f"data.root={asked['root']} is another data set than the run's ({theirs.get('root')}): its "
            f"{', '.join(left)} {'is' if len(left) == 1 else 'are'} not taken over"
        )
    return {}


def _sections(saved: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not the sections of a configuration")
    for key in ("data", "augment", "loader"):
        if not isinstance(saved.get(key, {}), dict):
            raise ValueError(f"its {key} is {saved[key]!r}, not a section")
    return {key: section for key, section in saved.items() if isinstance(section, dict)}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return os.path.realpath(os.path.expanduser(str(one))) == os.path.realpath(os.path.expanduser(str(other)))


__all__ = ["data_of", "settings_of", "settings_of_begun"]
