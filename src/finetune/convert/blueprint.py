"""What a GGUF file is to hold, settled before anything is written: its keys, and each tensor's name, shape and type."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from finetune.convert.families import Described, interleaved_rows, stored
from finetune.convert.sources import Adapter, Source
from finetune.errors import ModelError
from finetune.records import ModelShape

Array = NDArray[Any]
Outtype = Literal["f32", "f16", "bf16", "q8_0"]
OUTTYPES: tuple[Outtype, ...] = get_args(Outtype)
FILE_TYPES: dict[Outtype, int] = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
BLOCK = 32
"""How many weights of a row share a scale in q8_0."""
ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file; `load` gives it in float32, laid out as the file has it."""

    name: str
    shape: tuple[int, ...]
    outtype: Outtype
    load: Callable[[], Array]

    @property
    def bytes(self) -> int:
        """How many bytes it takes in the file."""
        count = int(np.prod(self.shape))
        return count // BLOCK * 34 if self.outtype == "q8_0" else count * (4 if self.outtype == "f32" else 2)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A GGUF file before it is written."""

    arch: str
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """About how many bytes the file takes: its tensors, and somewhat more for its keys."""
        return sum(tensor.bytes + ALIGNMENT for tensor in self.tensors) + 64 * len(self.metadata) + (4 << 20)


def plan_model(
    described: Described, shape: ModelShape, source: Source, metadata: Mapping[str, Any], outtype: Outtype
) -> Blueprint:
    """The file of a whole model.

    Args:
        metadata: keys beside those of the architecture.

    Raises:
        ModelError: one of its weights has no place in GGUF.
    """
    tensors = [
        Tensor(f"{name}", factors.shape, "f32", partial(np.asarray, factors))
        for name, factors in described.extra.items()
    ]
    for name, place in _places(described, shape.layers, shape.weights).items():
        sides = stored(described, name, np.broadcast_to(np.float32(0), source.shape(name))).shape
        load = partial(_load, described, source, name)
        tensors.append(Tensor(place, sides, _type_of(place, sides, outtype), load))
    spared = [tensor.name for tensor in tensors if outtype == "q8_0" and tensor.outtype == "f16"]
    notes = (f"{len(spared)} tensors stay f16, their rows being no multiple of {BLOCK}",) if spared else ()
    keys = {
        "general.type": "model",
        "general.file_type": FILE_TYPES[outtype],
        "general.quantization_version": 2,
        **metadata,
        **described.metadata,
    }
    return Blueprint(described.family.arch, keys, tuple(tensors), (*described.notes, *notes))


def plan_adapter(
    described: Described, shape: ModelShape, adapter: Adapter, metadata: Mapping[str, Any], outtype: Outtype
) -> Blueprint:
    """The file of an adapter alone, for llama.cpp to put on the base model.

    GGUF has one alpha for all layers; what a layer's own scale differs by is multiplied into its B.

    Raises:
        ModelError: it trains more than A and B of linear layers, or a layer that has no place in GGUF.
    """
    if adapter.target.kind == "dora" or adapter.whole:
        what = "DoRA's magnitudes" if adapter.target.kind == "dora" else adapter.whole[0]
        raise ModelError(
            f"an adapter alone cannot hold {what} in GGUF", hint="leave out --adapter-only: the merged model can"
        )
    target, tensors = adapter.target, []
    places = _places(described, shape.layers, [f"{path}.weight" for path in adapter.layers])
    for path, place in zip(adapter.layers, places.values(), strict=True):
        a, b = adapter.matrices(path)
        ratio = target.scale_of(path) / (target.alpha / a.shape[0])
        b = interleaved_rows(described, f"{path}.weight", b * np.float32(ratio))
        for part, matrix in (("lora_a", a), ("lora_b", b)):
            name = f"{place}.{part}"
            tensors.append(
                Tensor(name, matrix.shape, _type_of(name, matrix.shape, outtype), partial(np.asarray, matrix))
            )
    keys = {
        "general.type": "adapter",
        "general.file_type": FILE_TYPES[outtype],
        "adapter.type": "lora",
        "adapter.lora.alpha": float(target.alpha),
        **metadata,
    }
    return Blueprint(described.family.arch, keys, tuple(tensors))


def _load(described: Described, source: Source, name: str) -> Array:
    return np.ascontiguousarray(stored(described, name, source.read(name)), dtype=np.float32)


def _places(described: Described, layers: int, names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """What GGUF calls each weight.

    Raises:
        ModelError: it has no name for one.
    """
    import gguf

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == described.family.arch)
    names_there = gguf.get_tensor_name_map(arch, layers)
    places = {name: names_there.get_name(name, (".weight", ".bias")) for name in names}
    if nameless := sorted(name for name, place in places.items() if place is None):
        raise ModelError(
            f"{len(nameless)} weights have no place in a GGUF of {described.family.arch}, first {nameless[0]}",
            hint="this model cannot be written as GGUF",
        )
    return {name: str(place) for name, place in places.items()}


def _type_of(place: str, shape: Sequence[int], outtype: Outtype) -> Outtype:
    """As llama.cpp's own converter has it: norms, biases, positions in full; in q8_0 only rows of whole blocks."""
    full = len(shape) < 2 or place.endswith("_norm.weight") or place.startswith("position_embd")
    if full or not place.endswith((".weight", ".lora_a", ".lora_b")):
        return "f32"
    return "f16" if outtype == "q8_0" and shape[-1] % BLOCK else outtype
