"""An adapter and its files, in PEFT's own format.

Each adapted layer W (out x in) gets A (r x in) and B (out x r): LoRA makes it W + s B A, with s = alpha / r, or alpha /
sqrt(r). DoRA gives it magnitudes m (out) too: row i of W + s B A is stretched to the length m_i. The length that it
has is taken for a constant when gradients are made. Modules that are trained whole have their weights here as well.

On disk all are float32, which every reader of the format takes: a saved adapter is the session's own rounded once, by
6e-8 at most.

Source: Hu et al. 2021 (arXiv:2106.09685), Liu et al. 2024 (arXiv:2402.09353, section 4.3 for the constant), and
`LoraLayer` and `DoraLinearLayer` of Hugging Face PEFT.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from finetune.adapters.choose import refuse_tied, saved_weights
from finetune.adapters.peft_files import (
    WEIGHTS,
    Layers,
    adapted_layers,
    check_tensor_shapes,
    on_disk,
    parts_of,
    read_settings,
    saved_name,
    tensor_name,
    tensor_shapes,
    write_settings,
)
from finetune.backends.reference.architecture import EMBEDDING, HEAD
from finetune.backends.reference.weights import read_tensors
from finetune.records import AdapterTarget

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReferenceAdapter:
    """The matrices (A, B) of each adapted layer by the layer's path; all arrays are changed in place by training.

    `magnitudes` are those of DoRA, by path; `saved` are weights of modules that are trained whole, by the base's names.
    """

    target: AdapterTarget
    pairs: dict[str, tuple[Array, Array]]
    magnitudes: dict[str, Array] = field(default_factory=dict)
    saved: dict[str, Array] = field(default_factory=dict)

    def tensors(self) -> dict[str, Array]:
        """Every array by its name in a PEFT model."""
        tensors = {
            tensor_name(path, part): self.magnitudes[path] if part == "m" else pair[part == "B"]
            for path, pair in self.pairs.items()
            for part in parts_of(self.target)
        }
        return tensors | {saved_name(name): weight for name, weight in self.saved.items()}

    def lengths(self, path: str, weight: Array) -> Array:
        """The length of each row (out,) of W + s B A; DoRA stretches it to the magnitude."""
        lengths: Array = np.linalg.norm(weight + self._growth(path), axis=1)
        return lengths

    def merged(self, path: str, weight: Array) -> Array:
        """The weight of a layer without an adapter that computes the same."""
        grown: Array = weight + self._growth(path)
        if path not in self.magnitudes:
            return grown
        return (self.magnitudes[path] / self.lengths(path, weight))[:, None] * grown

    def _growth(self, path: str) -> Array:
        down, up = self.pairs[path]
        growth: Array = self.target.scale_of(path) * (up @ down)
        return growth


def draw_adapter(
    weights: Mapping[str, Array], layers: Layers, target: AdapterTarget, random: np.random.Generator
) -> ReferenceAdapter:
    """A fresh adapter: A uniform within 1 / sqrt(in), which is Kaiming's with a = sqrt(5), layer by layer; B zero.

    Magnitudes are the lengths of the base's rows, and modules that are trained whole start as copies.

    Raises:
        ModelError: a name in `target.modules` matches no linear layer.
    """
    pairs = {}
    for path in adapted_layers(layers, target.modules):
        (outputs, inputs), rank = layers[path], target.rank_of(path)
        bound = 1 / math.sqrt(inputs)
        pairs[path] = random.uniform(-bound, bound, (rank, inputs)), np.zeros((outputs, rank))
    lengths = {path: np.linalg.norm(weights[f"{path}.weight"], axis=1) for path in pairs if target.kind == "dora"}
    return ReferenceAdapter(
        target, pairs, lengths, {name: weights[name].copy() for name in saved_weights(weights, target)}
    )


def write_adapter(adapter: ReferenceAdapter, base: str, folder: Path) -> None:
    """Write the adapter so that PEFT loads it; `base` is what its base model is to be found as."""
    write_settings(adapter.target, base, folder, transposed=False)
    tensors = {on_disk(name): tensor.astype(np.float32) for name, tensor in adapter.tensors().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(weights: Mapping[str, Array], layers: Layers, folder: Path) -> ReferenceAdapter:
    """The adapter in `folder`, which PEFT or `write_adapter` wrote, for a base of these weights.

    Raises:
        ModelError: a file is missing or corrupt, the adapter is of a kind that is neither LoRA nor DoRA, or a tensor is
            missing, unknown or of another shape.
    """
    target = read_settings(folder, transposed=False)
    kept = saved_weights(weights, target)
    if f"{HEAD}.weight" not in weights:
        shapes = {name: weights[name].shape for name in kept}
        refuse_tied(shapes, len(weights[f"{EMBEDDING}.weight"]), f"adapter {folder}")
    expected = tensor_shapes(layers, target, {name: weights[name].shape for name in kept})
    saved = read_tensors(folder / WEIGHTS, f"adapter {folder}")
    check_tensor_shapes({name: tensor.shape for name, tensor in saved.items()}, expected, folder)
    paths = adapted_layers(layers, target.modules)
    parts = {part: {path: saved[on_disk(tensor_name(path, part))] for path in paths} for part in parts_of(target)}
    pairs = {path: (parts["A"][path], parts["B"][path]) for path in paths}
    return ReferenceAdapter(
        target, pairs, parts.get("m", {}), {name: saved[on_disk(saved_name(name))] for name in kept}
    )
