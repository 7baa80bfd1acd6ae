"""Which setting was meant by a key that does not exist."""

from __future__ import annotations

import difflib
from typing import Any, get_args, get_origin

from fasttrain.reading import alternatives, is_section

OTHERS_NAMES = {
    "base_lr": "lr",
    "learning_rate": "lr",
    "max_lr": "lr",
    "bs": "batch",
    "batch_size": "batch",
    "global_batch_size": "batch",
    "accumulate_grad_batches": "accumulation",
    "grad_accum": "accumulation",
    "gradient_accumulation_steps": "accumulation",
    "clip_grad": "clip",
    "grad_clip": "clip",
    "gradient_clipping": "clip",
    "epoch": "epochs",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "iterations": "steps",
    "max_steps": "steps",
    "num_steps": "steps",
    "mom": "momentum",
    "opt": "optimizer.name",
    "wd": "weight_decay",
    "warmup": "warmup_epochs",
    "num_workers": "threads",
    "workers": "threads",
    "amp": "precision",
    "bf16": "precision",
    "dtype": "precision",
    "fp16": "precision",
    "mixed_precision": "precision",
    "zero": "zero_stage",
    "data_dir": "data.root",
    "data_path": "data.root",
    "dataset": "data.root",
    "checkpoint_dir": "run.dir",
    "exp_dir": "run.dir",
    "log_dir": "run.dir",
    "out_dir": "run.dir",
    "output": "run.dir",
    "output_dir": "run.dir",
    "save_dir": "run.dir",
    "save_freq": "save_every",
    "log_interval": "log_every",
    "random_seed": "seed",
    "architecture": "arch",
    "backbone": "arch",
    "num_classes": "classes",
    "crop_size": "augment.size",
    "image_size": "augment.size",
    "img_size": "augment.size",
    "num_views": "views",
    "temp": "temperature",
    "tau": "temperature",
    "eps": "eps_255",
    "epsilon": "eps_255",
    "k": "neighbours",
    "checkpoint": "source",
    "ckpt": "source",
    "pretrained": "source",
    "weights": "source",
}
"What other trainers call a setting, and what it is called here: its last name, or all of it where others share that."

ELSEWHERE = {
    **dict.fromkeys(
        ("gpus", "num_gpus", "devices", "ngpus", "nproc", "nproc_per_node", "world_size"),
        "the launcher decides how many: deepspeed --num_gpus N …, or torchrun --nproc-per-node N …",
    ),
    **dict.fromkeys(
        ("resume", "resume_from", "auto_resume", "ckpt_path"),
        "a run goes on by itself, with the same command and run.dir",
    ),
}
"What is no setting, and who sees to it."


def all_keys(schema: Any, prefix: str = "") -> list[str]:
    """Dotted keys of all that can be set, sections too; named parts are called ``<name>``."""
    found = []
    for one in alternatives(schema):
        if get_origin(one) is dict:
            found += all_keys(get_args(one)[1], f"{prefix}<name>.")
        elif is_section(one):
            for name, field in one.model_fields.items():
                found += [prefix + name, *all_keys(field.annotation, f"{prefix}{name}.")]
    return found


def advice(schema: Any, path: list[str]) -> str:
    """What to say behind "unknown key": the nearest that exists, by meaning first, then by letters."""
    if found := nearest(schema, path):
        return f"; did you mean '{found}'?"
    leaf, section = path[-1].lower().replace("-", "_"), ".".join(path[:-1])
    if leaf in ELSEWHERE:
        return f": {ELSEWHERE[leaf]}"
    beside = [key for key in (_named(key, path) for key in all_keys(schema)) if key.rpartition(".")[0] == section]
    return f"; there are {', '.join(beside)}" if beside else "; --help lists the keys"


def nearest(schema: Any, path: list[str]) -> str | None:
    """The key of ``schema`` that is most probably meant by the unknown ``path``.

    The same name in another section, or what others call it, comes before a similar one in the same section, and that
    before a similar one elsewhere.
    """
    keys = [_named(key, path) for key in all_keys(schema)]
    leaf, wanted = path[-1].lower().replace("-", "_"), ".".join(path)
    for name in filter(None, (leaf, OTHERS_NAMES.get(leaf))):
        same = [key for key in keys if f".{key}".endswith(f".{name}")]
        if same:
            return max(same, key=lambda key: (_likeness(key, wanted), -key.count(".")))
    if leaf in ELSEWHERE:
        return None
    beside = {key.rpartition(".")[2]: key for key in keys if key.split(".")[:-1] == path[:-1]}
    anywhere = {key.rpartition(".")[2]: key for key in reversed(keys)}
    whole = {key: key for key in keys if not wanted.startswith(f"{key}.")}
    for given, names, cutoff in ((leaf, beside, 0.6), (leaf, anywhere, 0.75), (wanted, whole, 0.75)):
        if near := difflib.get_close_matches(given, names, n=1, cutoff=cutoff):
            return names[near[0]]
    return None


def _named(key: str, path: list[str]) -> str:
    """``key`` with the part's name that ``path`` gives."""
    names = key.split(".")
    if "<name>" in names and len(path) > (place := names.index("<name>")) and names[:place] == path[:place]:
        names[place] = path[place]
    return ".".join(names)


def _likeness(key: str, wanted: str) -> float:
    return difflib.SequenceMatcher(None, key, wanted).ratio()


__all__ = ["ELSEWHERE", "OTHERS_NAMES", "advice", "all_keys", "nearest"]
