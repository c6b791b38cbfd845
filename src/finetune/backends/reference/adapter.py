"""An adapter of any kind and its files, in PEFT's own format; its arithmetic is its kind's.

Modules that are trained whole have their weights here as well. On disk all are float32, which every reader of the
format takes: a saved adapter is the session's own rounded once, by 6e-8 at most.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from finetune.adapters.choose import refuse_tied, saved_weights, tables_with_rows
from finetune.adapters.kinds import kind_of
from finetune.adapters.peft_files import (
    WEIGHTS,
    Layers,
    adapted_layers,
    check_tensor_shapes,
    layer_tensors,
    on_disk,
    read_settings,
    rows_name,
    saved_name,
    tensor_shapes,
    write_settings,
)
from finetune.backends.reference.architecture import EMBEDDING, HEAD
from finetune.backends.reference.weights import read_tensors
from finetune.records import AdapterTarget

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReferenceAdapter:
    """The tensors of each adapted layer, by its path and then by the keys of the kind; training changes them in place.

    `saved` are weights of modules that are trained whole, by the base's names; `rows` those rows of tables that are
    trained, by the tables' paths.
    """

    target: AdapterTarget
    layers: dict[str, dict[str, Array]]
    saved: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, Array] = field(default_factory=dict)

    def tensors(self) -> dict[str, Array]:
        """Every array by its name in a PEFT model."""
        tensors = {
            name: parts[key]
            for path, parts in self.layers.items()
            for key, name in layer_tensors(self.target, path).items()
        }
        tensors |= {rows_name(path): rows for path, rows in self.rows.items()}
        return tensors | {saved_name(name): weight for name, weight in self.saved.items()}

    def weights(self, base: Mapping[str, Array]) -> Mapping[str, Array]:
        """The weights that a model computes with: those of the base, but for modules and rows that are trained."""
        tables = {f"{path}.weight": base[f"{path}.weight"].copy() for path in self.rows}
        for path, rows in self.rows.items():
            tables[f"{path}.weight"][list(self.target.rows[path])] = rows
        return {**base, **self.saved, **tables}

    def merged(self, path: str, weight: Array) -> Array:
        """The weight of a layer without an adapter that computes the same."""
        merged: Array = kind_of(self.target).merged(np, self.layers[path], self.target.scale_of(path), weight)
        return merged


def draw_adapter(
    weights: Mapping[str, Array], layers: Layers, target: AdapterTarget, random: np.random.Generator
) -> ReferenceAdapter:
    """A fresh adapter, layer by layer; modules and rows that are trained themselves start as copies.

    Raises:
        ModelError: a name in `target.modules` matches no linear layer.
    """
    kind = kind_of(target)

    def uniform(bound: float, shape: tuple[int, ...]) -> Array:
        return random.uniform(-bound, bound, shape)

    drawn = {
        path: kind.start(
            np, kind.shapes(target, path, *layers[path]), uniform, partial(weights.__getitem__, f"{path}.weight")
        )
        for path in adapted_layers(layers, target.modules)
    }
    target = replace(target, rows=tables_with_rows({name: weight.shape for name, weight in weights.items()}, target))
    whole = {name: weights[name].copy() for name in saved_weights(weights, target)}
    rows = {path: weights[f"{path}.weight"][list(numbers)] for path, numbers in target.rows.items()}
    return ReferenceAdapter(target, drawn, whole, rows)


def write_adapter(adapter: ReferenceAdapter, base: str, folder: Path) -> None:
    """Write the adapter so that PEFT loads it; `base` is what its base model is to be found as."""
    write_settings(adapter.target, base, folder, transposed=False)
    tensors = {on_disk(name): tensor.astype(np.float32) for name, tensor in adapter.tensors().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(weights: Mapping[str, Array], layers: Layers, folder: Path) -> ReferenceAdapter:
    """The adapter in `folder`, which PEFT or `write_adapter` wrote, for a base of these weights.

    Raises:
        ModelError: a file is missing or corrupt, the adapter is of an unknown kind, or a tensor is missing, unknown or
            of another shape.
    """
    target = read_settings(folder, transposed=False)
    kept = saved_weights(weights, target)
    if f"{HEAD}.weight" not in weights:
        shapes = {name: weights[name].shape for name in kept}
        refuse_tied(shapes, len(weights[f"{EMBEDDING}.weight"]), f"adapter {folder}")
    target = replace(target, rows=tables_with_rows({name: weight.shape for name, weight in weights.items()}, target))
    width = weights[f"{EMBEDDING}.weight"].shape[1]
    expected = tensor_shapes(layers, target, {name: weights[name].shape for name in kept}, width)
    saved = read_tensors(folder / WEIGHTS, f"adapter {folder}")
    check_tensor_shapes({name: tensor.shape for name, tensor in saved.items()}, expected, folder)
    parts = {
        path: {key: saved[on_disk(name)] for key, name in layer_tensors(target, path).items()}
        for path in adapted_layers(layers, target.modules)
    }
    whole = {name: saved[on_disk(saved_name(name))] for name in kept}
    return ReferenceAdapter(target, parts, whole, {path: saved[on_disk(rows_name(path))] for path in target.rows})
