"""What may have happened to files of tensors and to the settings next to them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

WEIGHTS, SETTINGS, STATE = "adapter_model.safetensors", "adapter_config.json", "state.safetensors"
Damage = Callable[[Path], None]


def damaged_tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """A damage to the tensors in a file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)

    return damage


def changed_settings(name: str, **changes: Any) -> Damage:
    """A damage to a file of settings; "absent" takes one out."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: each for key, each in value.items() if each != "absent"}))

    return damage


def changed_bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """A damage to what a file holds."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def longer(name: str, more: str) -> Damage:
    """A damage that only adds to the end of a file, which need not be there."""

    def damage(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(more)

    return damage


def _turn(tensors: dict[str, Any]) -> None:
    name = min(name for name, tensor in tensors.items() if tensor.ndim == 2 and len(set(tensor.shape)) == 2)
    tensors[name] = tensors[name].T


def _rename(tensors: dict[str, Any]) -> None:
    name = max(name for name in tensors if "layers.1" in name or "h.1." in name)
    tensors[name.replace("layers.1", "layers.7").replace("h.1.", "h.7.")] = tensors.pop(name)


def damages(tensors: str, settings: str) -> dict[str, Damage]:
    """What may have happened to a file of tensors and to the settings next to it."""
    return {
        "renamed": damaged_tensors(tensors, _rename),
        "dropped": damaged_tensors(tensors, lambda each: each.pop(max(each))),
        "all dropped": damaged_tensors(tensors, lambda each: each.clear()),
        "added": damaged_tensors(tensors, lambda each: each.update({"more": np.zeros(3, np.float32)})),
        "added twice": damaged_tensors(tensors, lambda each: each.update({max(each) + "2": each[max(each)].copy()})),
        "turned": damaged_tensors(tensors, _turn),
        "whole numbers": damaged_tensors(
            tensors, lambda each: each.update({min(each): np.zeros_like(each[min(each)], int)})
        ),
        "cut off": changed_bytes(tensors, lambda content: content[:-5]),
        "garbage": changed_bytes(tensors, lambda content: b"\xff" * 300),
        "empty": changed_bytes(tensors, lambda content: b""),
        "missing": lambda folder: (folder / tensors).unlink(),
        "no settings": lambda folder: (folder / settings).unlink(),
        "broken settings": changed_bytes(settings, lambda content: b"{"),
        "settings of nothing": changed_bytes(settings, lambda content: b"[]"),
        "empty settings": changed_bytes(settings, lambda content: b"{}"),
    }


ADAPTER_DAMAGES = damages(WEIGHTS, SETTINGS) | {
    f"{key} {value}": changed_settings(SETTINGS, **{key: value})
    for key, value in [
        ("use_dora", True),
        ("use_rslora", "yes"),
        ("use_rslora", 2),
        ("bias", "all"),
        ("rank_pattern", {"q_proj|c_attn": 2}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj|c_attn": 0}),
        ("alpha_pattern", {"(": 3.0}),
        ("r", 2),
        ("r", True),
        ("r", "absent"),
        ("lora_alpha", "7"),
        ("lora_dropout", 1.0),
        ("peft_type", "IA3"),
        ("target_modules", "all-linear"),
        ("target_modules", ["q_prj"]),
        ("target_modules", "absent"),
        ("modules_to_save", ["lm_head"]),
        ("modules_to_save", "norm"),
        ("modules_to_save", ["norm"]),
        ("init_lora_weights", "pissa"),
        ("a_new_kind", 3),
        ("layers_to_transform", [1]),
    ]
}


def _no_random_state(folder: Path) -> None:
    """The reference keeps its dice beside the tensors, the others among them."""
    if (folder / "state.json").exists():
        changed_settings("state.json", random="absent")(folder)
    else:
        damaged_tensors(STATE, lambda tensors: tensors.pop("random"))(folder)


STATE_DAMAGES = {
    "no random state": _no_random_state,
    "no moment": damaged_tensors(STATE, lambda tensors: tensors.pop(min(tensors))),
    "no weight": damaged_tensors(STATE, lambda tensors: tensors.pop(max(tensors))),
    "another shape": damaged_tensors(
        STATE, lambda each: each.update({max(n for n in each if n.startswith("weight/")): np.zeros((2, 2), np.float32)})
    ),
    "turned": damaged_tensors(STATE, _turn),
    "another dtype": damaged_tensors(STATE, lambda each: each.update({"steps": np.float32(3).reshape(())})),
    "more": damaged_tensors(STATE, lambda tensors: tensors.update({"weight/more": np.zeros(1, np.float32)})),
}
