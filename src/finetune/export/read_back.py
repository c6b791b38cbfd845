"""Reads a GGUF file again and compares every key and tensor with its plan."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.export.blueprint import Blueprint, Tensor
from finetune.export.outtypes import BLOCKS, COARSENESS, Storage

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Check:
    """One stage of verifying what was written; `first` names the first thing that is wrong."""

    stage: str
    measured: str
    allowed: str
    first: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.first


def read_back(blueprint: Blueprint, path: Path) -> Check:
    """Check that the file has these keys and tensors, each within the rounding of its type."""
    import gguf

    allowed = "every key equal; every tensor within the rounding of its type"
    try:
        reader = gguf.GGUFReader(path)
        # Inside the try: the reader decodes a key only when it is compared.
        first = next(_differences(blueprint, reader), "")
    except (OSError, ValueError, IndexError, KeyError) as error:
        return Check("file", "cannot be read", allowed, f"{path.name} is no whole GGUF file: {error}")
    return Check("file", f"{len(reader.fields)} keys, {len(reader.tensors)} tensors", allowed, first)


def _differences(blueprint: Blueprint, reader: "GGUFReader") -> Iterator[str]:
    for key, value in {"general.architecture": blueprint.arch, **blueprint.metadata}.items():
        if key not in reader.fields:
            yield f"key {key} is missing"
        elif not _same(reader.fields[key].contents(), value):
            yield f"key {key} is {str(reader.fields[key].contents())[:80]}, not {str(value)[:80]}"
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = {tensor.name: tensor for tensor in blueprint.tensors}
    if odd := sorted(found.keys() ^ wanted.keys()):
        yield f"tensor {odd[0]} is {'not wanted' if odd[0] in found else 'missing'}"
    for name, tensor in wanted.items():
        if name in found and (problem := _tensor_problem(tensor, found[name])):
            yield f"tensor {name} {problem}"


def _same(found: object, wanted: object) -> bool:
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_same, found, wanted))
    return bool(found == np.float32(wanted)) if isinstance(wanted, float) else bool(found == wanted)


def _tensor_problem(tensor: Tensor, found: "ReaderTensor") -> str:
    import gguf

    shape = tuple(int(side) for side in reversed(found.shape))
    if shape != tensor.shape:
        return f"has the shape {shape}, not {tensor.shape}"
    if found.tensor_type.name.lower() != tensor.storage:
        return f"is {found.tensor_type.name.lower()}, not {tensor.storage}"
    weight = tensor.load()
    error = np.abs(gguf.dequantize(found.data, found.tensor_type).reshape(shape) - weight)
    over = ~(error <= rounding(weight, tensor.storage))
    if not over.any():
        return ""
    place = tuple(int(index) for index in np.unravel_index(int(over.argmax()), shape))
    return f"is off by {error[place]:g} at {place}, where it should be {weight[place]:g}"


def rounding(weight: Array, storage: Storage) -> Array:
    """The largest error of each weight once it is stored in this type.

    Half a unit in the last place of an f16 number (2**-11) and a whole one of a bf16 number (2**-8), or of the smallest
    subnormal number, below which nothing is left.
    """
    size = np.abs(weight)
    if storage == "f32":
        return np.zeros_like(size)
    if storage == "f16":
        return size * np.float32(2**-11) + np.float32(2**-25)
    if storage == "bf16":
        return size * np.float32(2**-8) + np.float32(2**-133)
    block = BLOCKS[storage].weights
    largest = size.reshape(-1, block).max(axis=1, keepdims=True)
    # A block is its weights over a scale; the scale is an f16 number, and may itself underflow.
    lost = 127 * np.float32(2**-25)
    if storage == "q8_0":
        # Half a step of the block's scale, which is itself rounded to f16.
        allowed = largest / 127 / 2 * 1.001 + largest * np.float32(2**-11) + lost
    else:
        allowed = largest * np.float32(COARSENESS[storage]) + lost
    return np.broadcast_to(allowed, (len(allowed), block)).reshape(weight.shape)
