"""An adapter's files, in PEFT's format and in mlx-lm's; both hold the same numbers.

PEFT writes A (rank x inputs) and B (outputs x rank) under transformers' paths, and alpha. mlx-lm writes both the other
way round, under its own paths, and what B A is multiplied with, which it calls scale. Both name their settings
`adapter_config.json`.

Source: `LoRALinear`, `DoRALinear` and `load_adapters` of mlx-lm (`tuner/lora.py`, `tuner/utils.py`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from finetune.adapters.choose import refuse_tied, saved_weights, tables_with_rows
from finetune.adapters.kind import Shape
from finetune.adapters.kinds import ADAPTER_KINDS, kind_of, titles
from finetune.adapters.peft_files import (
    MLX_WEIGHTS,
    SETTINGS,
    WEIGHTS,
    Layers,
    adapted_layers,
    check_tensor_shapes,
    is_sound,
    layer_tensors,
    on_disk,
    read_settings,
    rows_name,
    saved_name,
    tensor_shapes,
    write_settings,
)
from finetune.backends.mlx.layers import MlxAdapter, Tensors
from finetune.backends.mlx.load import Loaded
from finetune.backends.mlx.names import WeightNames
from finetune.backends.mlx.tensors import read_tensors, write_tensors
from finetune.errors import ModelError
from finetune.models.shape import is_head
from finetune.reading import read_json
from finetune.records import AdapterTarget


def write_adapter(adapter: MlxAdapter, loaded: Loaded, base: str, folder: Path) -> None:
    """Write the adapter so that PEFT loads it; `base` is what its base model is to be found as."""
    names = loaded.names
    write_settings(adapter.target, base, folder, transposed=names.transposed)
    places = dict(tree_flatten(loaded.model.parameters()))
    tensors = {on_disk(name): places[place] for name, place in adapter.tensors(names).items()}
    tensors |= {
        on_disk(saved_name(names.shown(place))): names.turn(place, places[place]) for place in adapter.originals
    }
    write_tensors(tensors, folder / WEIGHTS)


def read_adapter(
    shapes: Mapping[str, Shape], layers: Layers, names: WeightNames, folder: Path
) -> tuple[AdapterTarget, Tensors]:
    """The adapter in `folder`, PEFT's or mlx-lm's, for a base whose weights have these shapes.

    Raises:
        ModelError: a file is missing or corrupt, the adapter is of an unknown kind, or a tensor is missing, unknown or
            of another shape.
    """
    if (folder / MLX_WEIGHTS).exists():
        return read_mlx_adapter(layers, names, folder)
    target = read_settings(folder, transposed=names.transposed)
    target = replace(target, rows=tables_with_rows(shapes, target))
    width = next((shapes[f"{path}.weight"][1] for path in target.rows), 0)
    kept = {name: shapes[name] for name in saved_weights(shapes, target)}
    if not any(is_head(name) for name in shapes):
        refuse_tied(kept, max(shape[0] for shape in shapes.values()), f"adapter {folder}")
    expected = tensor_shapes(layers, target, kept, width)
    saved = _float32(folder / WEIGHTS, folder)
    check_tensor_shapes({name: tensor.shape for name, tensor in saved.items()}, expected, folder)
    parts = {
        path: {key: saved[on_disk(name)] for key, name in layer_tensors(target, path).items()}
        for path in adapted_layers(layers, target.modules)
    }
    whole = {name: names.turn(name, saved[on_disk(saved_name(name))]) for name in kept}
    return target, Tensors(parts, whole, {path: saved[on_disk(rows_name(path))] for path in target.rows})


def write_mlx_adapter(adapter: MlxAdapter, base: str, blocks: int, folder: Path) -> None:
    """Write the adapter so that mlx-lm loads it.

    Args:
        base: what its base model is to be found as.
        blocks: how many transformer blocks the model has; whole paths say which of their layers are adapted.

    Raises:
        ModelError: mlx-lm has no such kind; or ranks or scales differ between layers, or modules are trained whole:
            the format has one of each, and no place for those.
    """
    target, kind = adapter.target, kind_of(adapter.target)
    if not kind.mlx_lm_names:
        raise ModelError(f"mlx-lm's adapter format has no place for {kind.title}", hint="write it in PEFT's format")
    scales = {layer.scale for layer in adapter.layers.values()}
    ranks = {layer.rank for layer in adapter.layers.values()}
    if len(scales) > 1 or len(ranks) > 1 or adapter.originals or adapter.tables:
        told = "ranks or scales that differ between layers"
        told = "modules or rows that are trained themselves" if adapter.originals or adapter.tables else told
        raise ModelError(f"mlx-lm's adapter format has no place for {told}", hint="write it in PEFT's format")
    settings = {
        "fine_tune_type": kind.name,
        "lora_parameters": {
            "rank": ranks.pop(),
            "scale": scales.pop(),
            "dropout": target.dropout,
            "keys": list(adapter.layers),
        },
        "model": base,
        "num_layers": blocks,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors = {
        f"{path}.{name}": layer.parts[key].T  # a vector is its own transpose
        for key, name in kind.mlx_lm_names.items()
        for path, layer in adapter.layers.items()
    }
    write_tensors(tensors, folder / MLX_WEIGHTS)


def read_mlx_adapter(layers: Layers, names: WeightNames, folder: Path) -> tuple[AdapterTarget, Tensors]:
    """The adapter in `folder`, which mlx-lm or `write_mlx_adapter` wrote, as `read_adapter` gives one.

    Raises:
        ModelError: as `read_adapter`.
    """
    try:
        settings = read_json(folder / SETTINGS)
        kind, told = settings["fine_tune_type"], settings["lora_parameters"]
        rank, alpha = told["rank"], _alpha(told["scale"], told["rank"])
        dropout = told.get("dropout", 0.0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: {error!r}") from None
    known = {kind.name: kind for kind in ADAPTER_KINDS.values() if kind.mlx_lm_names}
    if kind not in known:
        raise ModelError(
            f"adapter {folder} has fine_tune_type {kind!r}; this backend does {titles(known.values())} only",
            hint="fuse it into its model with mlx_lm.fuse",
        )
    saved = _float32(folder / MLX_WEIGHTS, folder)
    paths = sorted({name.rpartition(".")[0] for name in saved})
    shown = {names.shown(path): path for path in paths}
    target = AdapterTarget(rank, alpha, dropout, tuple(path for path in layers if path in shown), kind)
    if not is_sound(target):
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: a setting is of the wrong kind")
    if not paths:
        raise ModelError(f"adapter {folder} holds no tensor", hint="save it again")
    file_names = known[kind].mlx_lm_names
    expected: dict[str, Shape] = {}
    for path in paths:
        shapes = known[kind].shapes(target, names.shown(path), *layers.get(names.shown(path), (0, 0)))
        expected |= {f"{path}.{name}": shapes[key][::-1] for key, name in file_names.items()}
    check_tensor_shapes({name: tensor.shape for name, tensor in saved.items()}, expected, folder)
    parts = {
        path: {key: mx.contiguous(saved[f"{shown[path]}.{name}"].T) for key, name in file_names.items()}
        for path in target.modules
    }
    return target, Tensors(parts, {})


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
