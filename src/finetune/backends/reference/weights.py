"""Model files to float64 arrays and back; what this Llama cannot compute is refused here, before a weight is read."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from finetune.errors import ModelError
from finetune.reading import open_regular

Array = NDArray[np.float64]
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_tensors(path: Path, owner: str) -> dict[str, Array]:
    """Every tensor of a safetensors file, whatever float it is stored as, in float64 without loss.

    Raises:
        ModelError: the file is missing, cut off or corrupt, or holds something else than floats; `owner` names it.
    """
    try:
        with open_regular(path) as file:
            entries = deserialize(file.read())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{owner} cannot be loaded: {path.name}: {error}", hint="get its files again") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise ModelError(
                f"{owner} cannot be loaded: {name} is stored as {entry['dtype']}; the reference backend reads "
                + ", ".join(_DTYPES)
            )
        raw = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = raw.astype(np.float64)
    return tensors


def check_tensors(weights: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]], owner: str) -> None:
    """Refuse weights that are not exactly the `expected` ones.

    Raises:
        ModelError: a weight is missing, unknown or of another shape; they are counted and the first is named.
    """
    lacking = sorted(set(expected) - set(weights))
    if lacking:
        raise ModelError(
            f"{owner} lacks {len(lacking)} weights, among them {lacking[0]}", hint="get the model's weights again"
        )
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise ModelError(
            f"{owner} cannot be loaded: {len(unknown)} of its weights are none of a plain Llama, first {unknown[0]}",
            hint="use the torch backend for this model",
        )
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise ModelError(
                f"{owner} cannot be loaded: {name} is {weights[name].shape}, its config says {shape}",
                hint="get the model's files again",
            )
