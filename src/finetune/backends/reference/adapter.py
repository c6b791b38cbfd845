"""A LoRA adapter and its files, in PEFT's own format.

Each adapted layer W (out x in) gets A (r x in) and B (out x r); its output grows by alpha / r x B A x. On disk both are
float32, which every reader of the format takes: a saved adapter is the session's own rounded once, by 6e-8 at most.

Source: Hu et al. 2021 (arXiv:2106.09685), and `LoraLayer` of Hugging Face PEFT.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from finetune.backends.reference.weights import read_tensors
from finetune.models.peft_files import (
    WEIGHTS,
    Layers,
    adapted_layers,
    check_tensor_shapes,
    on_disk,
    read_settings,
    tensor_name,
    tensor_shapes,
    write_settings,
)
from finetune.records import AdapterTarget

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Adapter:
    """The matrices (A, B) of each adapted layer by the layer's path; they are changed in place by training."""

    target: AdapterTarget
    pairs: dict[str, tuple[Array, Array]]

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.target.alpha / self.target.rank

    def tensors(self) -> dict[str, Array]:
        """Every matrix by its name in a PEFT model."""
        return {tensor_name(path, half): pair[half == "B"] for path, pair in self.pairs.items() for half in "AB"}


def draw_adapter(layers: Layers, target: AdapterTarget, random: np.random.Generator) -> Adapter:
    """A fresh adapter: A uniform within 1 / sqrt(in), which is Kaiming's with a = sqrt(5), layer by layer; B zero.

    Raises:
        ModelError: a name in `target.modules` matches no linear layer.
    """
    pairs = {}
    for path in adapted_layers(layers, target.modules):
        outputs, inputs = layers[path]
        bound = 1 / math.sqrt(inputs)
        pairs[path] = random.uniform(-bound, bound, (target.rank, inputs)), np.zeros((outputs, target.rank))
    return Adapter(target, pairs)


def write_adapter(adapter: Adapter, base: str, folder: Path) -> None:
    """Write the adapter so that PEFT loads it; `base` is what its base model is to be found as."""
    write_settings(adapter.target, base, folder, turned=False)
    tensors = {on_disk(name): tensor.astype(np.float32) for name, tensor in adapter.tensors().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(layers: Layers, folder: Path) -> Adapter:
    """The adapter in `folder`, which PEFT or `write_adapter` wrote.

    Raises:
        ModelError: a file is missing or corrupt, the adapter is of a kind that is not plain LoRA, or a tensor is
            missing, unknown or of another shape.
    """
    target = read_settings(folder, turned=False)
    expected = tensor_shapes(layers, target)
    saved = read_tensors(folder / WEIGHTS, f"adapter {folder}")
    check_tensor_shapes({name: tensor.shape for name, tensor in saved.items()}, expected, folder)
    paths = adapted_layers(layers, target.modules)
    halves = [[saved[on_disk(tensor_name(path, half))] for half in "AB"] for path in paths]
    return Adapter(target, {path: (down, up) for path, (down, up) in zip(paths, halves, strict=True)})
