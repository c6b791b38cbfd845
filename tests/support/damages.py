"""What may happen to the files of an adapter, a model or a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file


def damaged_tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage to the tensors in a file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)

    return damage


def changed_settings(name: str, **changes: Any) -> Callable[[Path], None]:
    """A damage to a file of settings; "absent" takes one out."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: each for key, each in value.items() if each != "absent"}))

    return damage


def changed_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A damage to the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def _turn(tensors: dict[str, Any]) -> None:
    name = min(name for name, tensor in tensors.items() if tensor.ndim == 2 and len(set(tensor.shape)) == 2)
    tensors[name] = tensors[name].T


def damages(tensors: str, settings: str) -> dict[str, Callable[[Path], None]]:
    """What may have happened to a file of tensors and to the settings next to it."""
    return {
        "dropped": damaged_tensors(tensors, lambda each: each.pop(max(each))),
        "all dropped": damaged_tensors(tensors, lambda each: [each.pop(name) for name in list(each)]),
        "added": damaged_tensors(tensors, lambda each: each.update({"more": np.zeros(3, np.float32)})),
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
    }
