"""Writes a GGUF file, one tensor in memory at a time."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import ModelError
from finetune.export.blueprint import Blueprint, Tensor
from finetune.export.quantise import quantise

Array = NDArray[Any]
LARGEST_HALF = 65504.0
"""The largest f16 number; q8_0 keeps its scales (largest / 127) in f16, too."""


def write_gguf(blueprint: Blueprint, path: Path) -> None:
    """Write the file at `path`, which need not be its last place.

    Raises:
        ModelError: a weight is too large for the type of its tensor.
        OSError: the disk does not take it.
    """
    import gguf

    if empty := [key for key, value in blueprint.metadata.items() if value == []]:
        raise ModelError(
            f"{empty[0]} would be an empty list, which GGUF does not have and llama.cpp does not read",
            hint="a byte-level tokenizer needs at least one merge (model.merges in tokenizer.json)",
        )
    writer = gguf.GGUFWriter(path, blueprint.arch)
    try:
        for key, value in blueprint.metadata.items():
            if key == "tokenizer.ggml.token_type":
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, *_kind(value))
        for tensor in blueprint.tensors:
            kind = gguf.GGMLQuantizationType[tensor.storage.upper()]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in blueprint.tensors:
            weight = tensor.load()
            _check_size(tensor, weight)
            writer.write_tensor_data(quantise(weight, tensor.storage))
        writer.flush()
    finally:
        writer.close()


def _kind(value: object) -> tuple[Any, ...]:
    """GGUF's type of a value; for a list, also of its elements."""
    from gguf import GGUFValueType as Kind

    if isinstance(value, list):
        return Kind.ARRAY, _kind(value[0])[0]
    by_type = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
    return (by_type[type(value)],)


def _check_size(tensor: Tensor, weight: Array) -> None:
    if tensor.storage in ("f32", "bf16"):
        return
    largest = max(float(weight.max(initial=0)), -float(weight.min(initial=0)))
    limit = LARGEST_HALF * 127 if tensor.storage == "q8_0" else LARGEST_HALF
    if largest > limit:
        raise ModelError(
            f"{tensor.name} holds {largest:g}, which is more than {tensor.storage} can ({limit:g})",
            hint="use --outtype bf16 or f32",
        )
