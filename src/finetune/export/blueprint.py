"""The plan of a GGUF file: its keys, and the name, shape and type of each tensor."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.kinds import kind_of
from finetune.errors import ModelError
from finetune.export.families import Described, interleaved_rows, to_gguf_layout
from finetune.export.outtypes import BLOCKS, FILE_TYPES, Outtype, Storage, choose_storage
from finetune.export.sources import AdapterWeights, WeightSource
from finetune.records import ModelShape

Array = NDArray[Any]
ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file; `load` returns it in float32, in the file's layout.

    `weight` is its name in the model's own files; empty where it is in none.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage
    load: Callable[[], Array]
    weight: str = ""

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        block = BLOCKS[self.storage]
        return int(np.prod(self.shape)) // block.weights * block.bytes


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A GGUF file before it is written."""

    arch: str
    metadata: Mapping[str, object]
    tensors: tuple[Tensor, ...]
    notes: tuple[str, ...] = ()

    @property
    def storages(self) -> dict[str, Storage]:
        """The type of each rounded weight by its name in the model's own files."""
        return {each.weight: each.storage for each in self.tensors if each.weight and each.storage != "f32"}

    @property
    def bytes(self) -> int:
        """About the size of the file: its tensors, and 4 MiB and more for its keys."""
        return sum(tensor.bytes + ALIGNMENT for tensor in self.tensors) + 64 * len(self.metadata) + (4 << 20)


def plan_model(
    described: Described, shape: ModelShape, source: WeightSource, metadata: Mapping[str, object], outtype: Outtype
) -> Blueprint:
    """Plan the file of a whole model.

    Args:
        metadata: keys beside those of the architecture.

    Raises:
        ModelError: one of its weights has no place in GGUF.
    """
    tensors = [
        Tensor(name, factors.shape, "f32", partial(np.asarray, factors)) for name, factors in described.extra.items()
    ]
    places = gguf_names(described.family.arch, shape.layers, shape.weights)
    head = "output.weight" if "output.weight" in places.values() else "token_embd.weight"
    for name, place in places.items():
        # The layout of a weight that takes no memory tells the shape in the file.
        sides = to_gguf_layout(described, name, np.broadcast_to(np.float32(0), source.shape(name))).shape
        load = partial(_load, described, source, name)
        storage = choose_storage(place, sides, outtype, shape.layers, is_head=place == head)
        tensors.append(Tensor(place, sides, storage, load, name))
    keys = {
        "general.type": "model",
        "general.file_type": FILE_TYPES[outtype],
        "general.quantization_version": 2,
        "general.size_label": _size_label(tensors),
        **metadata,
        **described.metadata,
    }
    return Blueprint(described.family.arch, keys, tuple(tensors), (*described.notes, *_larger(tensors, outtype)))


def _size_label(tensors: Sequence[Tensor]) -> str:
    """The number of weights in words such as 7.2B."""
    from gguf.utility import model_weight_count_rounded_notation

    return str(model_weight_count_rounded_notation(sum(int(np.prod(one.shape)) for one in tensors), min_digits=2))


def _larger(tensors: Sequence[Tensor], outtype: Outtype) -> tuple[str, ...]:
    """A note on tensors whose rows do not fit the type's blocks."""
    if outtype in ("f32", "f16", "bf16"):
        return ()
    size = BLOCKS["q8_0" if outtype == "q8_0" else "q6_k"].weights
    odd = [tensor for tensor in tensors if tensor.storage != "f32" and tensor.shape[-1] % size]
    kinds = ", ".join(sorted({tensor.storage for tensor in odd}))
    return (f"{len(odd)} tensors are kept as {kinds}, their rows being no multiple of {size}",) if odd else ()


def plan_adapter(
    described: Described, shape: ModelShape, adapter: AdapterWeights, metadata: Mapping[str, object], outtype: Outtype
) -> Blueprint:
    """Plan the file of an adapter alone, which llama.cpp puts on the base model.

    Raises:
        ModelError: the adapter is more than A and B of linear layers, a layer has no place in GGUF, or llama.cpp's
            converter does not write adapters in this type.
    """
    if outtype not in ("f32", "f16", "bf16", "q8_0"):
        raise ModelError(f"an adapter alone is not written as {outtype}", hint="use f32, f16, bf16 or q8_0")
    kind = kind_of(adapter.target)
    if not kind.low_rank or adapter.whole or adapter.rows:
        what = f"a {kind.title} adapter" if not kind.low_rank else min([*adapter.whole, *adapter.rows])
        raise ModelError(
            f"an adapter alone cannot hold {what} in GGUF", hint="leave out --adapter-only: the merged model can"
        )
    target, tensors = adapter.target, []
    places = gguf_names(described.family.arch, shape.layers, [f"{path}.weight" for path in adapter.layers])
    for (path, parts), place in zip(adapter.layers.items(), places.values(), strict=True):
        a, b = parts["A"], parts["B"]
        # llama.cpp scales every layer by the one alpha / rank of the file: a layer's own scale goes into its B.
        ratio = target.scale_of(path) / (target.alpha / a.shape[0])
        b = interleaved_rows(described, f"{path}.weight", b * np.float32(ratio))
        for part, matrix in (("lora_a", a), ("lora_b", b)):
            name = f"{place}.{part}"
            storage = choose_storage(name, matrix.shape, outtype, shape.layers, is_head=False)
            tensors.append(Tensor(name, matrix.shape, storage, partial(np.asarray, matrix)))
    keys = {
        "general.type": "adapter",
        "general.file_type": FILE_TYPES[outtype],
        "adapter.type": "lora",
        "adapter.lora.alpha": float(target.alpha),
        **metadata,
    }
    return Blueprint(described.family.arch, keys, tuple(tensors))


def _load(described: Described, source: WeightSource, name: str) -> Array:
    return np.ascontiguousarray(to_gguf_layout(described, name, source.read(name)), dtype=np.float32)


def gguf_names(arch: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """GGUF's name of each weight.

    Raises:
        ModelError: GGUF has none for one of them.
    """
    import gguf

    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names_there = gguf.get_tensor_name_map(number, layers)
    places = {name: names_there.get_name(name, (".weight", ".bias")) for name in names}
    if nameless := sorted(name for name, place in places.items() if place is None):
        raise ModelError(
            f"{len(nameless)} weights have no place in a GGUF of {arch}, first {nameless[0]}",
            hint="this model cannot be written as GGUF",
        )
    return {name: str(place) for name, place in places.items()}
