"""What the run that a command starts from says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fasttrain import checkpoint
from fasttrain.errors import UsageError
from fasttrain.run import say


def settings_of(source: str) -> dict[str, dict[str, Any]]:
    """The sections of the configuration of the run whose folder ``source`` is; {} where it is no run's.

    They are read from ``config.yaml``, and where that cannot be read, with a line, from the newest whole checkpoint.

    Raises:
        UsageError: neither can be read.
    """
    path, checkpoints = Path(source) / "config.yaml", Path(source) / "checkpoints"
    try:
        if not path.parent.is_dir():
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
    say(f"WARNING: '{path}' cannot be read ({reason}): what {found.path} says is taken instead")
    return sections


def _sections(saved: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not the sections of a configuration")
    for key in ("data", "augment", "loader"):
        if not isinstance(saved.get(key, {}), dict):
            raise ValueError(f"its {key} is {saved[key]!r}, not a section")
    return {key: section for key, section in saved.items() if isinstance(section, dict)}


__all__ = ["settings_of"]
