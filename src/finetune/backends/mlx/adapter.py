"""A LoRA adapter's files, in PEFT's format and in mlx-lm's; both hold the same numbers.

PEFT writes A (rank x inputs) and B (outputs x rank) under transformers' paths, and alpha. mlx-lm writes both the other
way round, under its own paths, and alpha / rank, which it calls scale. Both name their settings `adapter_config.json`.

Source: `LoRALinear` and `load_adapters` of mlx-lm (`tuner/lora.py`, `tuner/utils.py`).
"""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from finetune.backends.mlx.layers import Adapter, Pairs
from finetune.backends.mlx.names import Names
from finetune.backends.mlx.tensors import read_tensors, write_tensors
from finetune.errors import ModelError
from finetune.models.peft_files import (
    SETTINGS,
    WEIGHTS,
    Layers,
    check_tensor_shapes,
    is_sound,
    on_disk,
    read_settings,
    tensor_name,
    tensor_shapes,
    write_settings,
)
from finetune.records import AdapterTarget

MLX_WEIGHTS = "adapters.safetensors"


def write_adapter(adapter: Adapter, names: Names, base: str, folder: Path) -> None:
    """Write the adapter so that PEFT loads it; `base` is what its base model is to be found as."""
    write_settings(adapter.target, base, folder, turned=names.turned)
    tensors = {
        on_disk(tensor_name(names.shown(path), half)): matrix
        for path, layer in adapter.layers.items()
        for half, matrix in zip("AB", (layer.down, layer.up), strict=True)
    }
    write_tensors(tensors, folder / WEIGHTS)


def read_adapter(layers: Layers, names: Names, folder: Path) -> tuple[AdapterTarget, Pairs]:
    """The adapter in `folder`, PEFT's or mlx-lm's: its target, and (A, B) of each layer by transformers' path.

    Raises:
        ModelError: a file is missing or corrupt, the adapter is of a kind that is not plain LoRA, or a tensor is
            missing, unknown or of another shape.
    """
    if (folder / MLX_WEIGHTS).exists():
        return read_mlx_adapter(layers, names, folder)
    target = read_settings(folder, turned=names.turned)
    expected = tensor_shapes(layers, target)
    saved = _float32(folder / WEIGHTS, folder)
    check_tensor_shapes({name: tensor.shape for name, tensor in saved.items()}, expected, folder)
    ordered = iter(saved[name] for name in expected)
    paths = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in list(expected)[::2]]
    return target, {path: (down, up) for path, down, up in zip(paths, ordered, ordered, strict=True)}


def write_mlx_adapter(adapter: Adapter, base: str, blocks: int, folder: Path) -> None:
    """Write the adapter so that mlx-lm loads it.

    Args:
        base: what its base model is to be found as.
        blocks: how many transformer blocks the model has; whole paths say which of their layers are adapted.
    """
    target = adapter.target
    settings = {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "rank": target.rank,
            "scale": target.alpha / target.rank,
            "dropout": target.dropout,
            "keys": list(adapter.layers),
        },
        "model": base,
        "num_layers": blocks,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors = {f"{path}.lora_a": layer.down.T for path, layer in adapter.layers.items()}
    tensors |= {f"{path}.lora_b": layer.up.T for path, layer in adapter.layers.items()}
    write_tensors(tensors, folder / MLX_WEIGHTS)


def read_mlx_adapter(layers: Layers, names: Names, folder: Path) -> tuple[AdapterTarget, Pairs]:
    """The adapter in `folder`, which mlx-lm or `write_mlx_adapter` wrote, as `read_adapter` gives one.

    Raises:
        ModelError: as `read_adapter`.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        kind, told = settings["fine_tune_type"], settings["lora_parameters"]
        rank, alpha = told["rank"], _alpha(told["scale"], told["rank"])
        dropout = told.get("dropout", 0.0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: {error!r}") from None
    if kind != "lora":
        raise ModelError(
            f"adapter {folder} has fine_tune_type {kind!r}; this backend does plain LoRA only",
            hint="fuse it into its model with mlx_lm.fuse",
        )
    saved = _float32(folder / MLX_WEIGHTS, folder)
    paths = sorted({name.rpartition(".")[0] for name in saved})
    shown = {names.shown(path): path for path in paths}
    target = AdapterTarget(rank, alpha, dropout, tuple(path for path in layers if path in shown))
    if not is_sound(target):
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: a setting is of the wrong kind")
    if not paths:
        raise ModelError(f"adapter {folder} holds no tensor", hint="save it again")
    expected: dict[str, tuple[int, ...]] = {}
    for path in paths:
        outputs, inputs = layers.get(names.shown(path), (0, 0))
        expected |= {f"{path}.lora_a": (inputs, rank), f"{path}.lora_b": (rank, outputs)}
    check_tensor_shapes({name: tensor.shape for name, tensor in saved.items()}, expected, folder)
    return target, {
        path: (mx.contiguous(saved[f"{shown[path]}.lora_a"].T), mx.contiguous(saved[f"{shown[path]}.lora_b"].T))
        for path in target.modules
    }


def _float32(path: Path, folder: Path) -> dict[str, mx.array]:
    tensors = read_tensors(path, f"adapter {folder}")
    whole = [name for name, tensor in tensors.items() if not mx.issubdtype(tensor.dtype, mx.floating)]
    if whole:
        raise ModelError(f"adapter {folder} cannot be loaded: {whole[0]} holds whole numbers", hint="get it again")
    return {name: tensor.astype(mx.float32) for name, tensor in tensors.items()}


def _alpha(scale: Any, rank: Any) -> Any:
    """The plainest alpha of which alpha / rank is the scale to the bit, where there is one."""
    alpha = scale * rank
    near = (float(f"{alpha:.15g}"), alpha, math.nextafter(alpha, 0), math.nextafter(alpha, math.inf))
    return next((each for each in near if each / rank == scale), alpha)
