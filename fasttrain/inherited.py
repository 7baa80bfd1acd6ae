"""What a command takes over from a run's folder where nothing else is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fasttrain import distributed
from fasttrain.data.catalog import DataConfig
from fasttrain.data.loader import LoaderConfig


def settings_of(folder: Any) -> dict[str, Any]:
    """The sections of the configuration that a run saved in ``folder``; none, with a line, where it cannot be read."""
    path = Path(str(folder or "")).expanduser() / "config.yaml"
    try:
        saved = yaml.safe_load(path.read_bytes()) if path.is_file() else {}
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        distributed.say(f"WARNING: '{path}' cannot be read ({' '.join(str(error).split())[:100]}): it is passed over")
        return {}
    return {key: value for key, value in _mapping(saved).items() if isinstance(value, dict)}


def settings_of_begun(given: dict[str, Any], default: str) -> dict[str, Any]:
    """Those of the run that ``given`` goes on with: its folder (``default``, if none is given) has a checkpoint."""
    folder = Path(str(_mapping(given.get("run")).get("dir", default))).expanduser()
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


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return Path(str(one)).expanduser().resolve() == Path(str(other)).expanduser().resolve()


__all__ = ["data_of", "settings_of", "settings_of_begun"]
