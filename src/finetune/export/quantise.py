"""Puts weights into a type of GGUF: by gguf-py, or by llama.cpp's own quantiser, which its binding carries."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import MissingExtraError
from finetune.export.outtypes import BLOCKS, BY_LLAMA_CPP, Storage

Array = NDArray[Any]


def quantise(weight: Array, storage: Storage) -> Array:
    """The bytes that hold a weight in this type, row by row.

    Args:
        weight: float32, rows of whole blocks.

    Raises:
        MissingExtraError: it takes llama.cpp's quantiser, and this build of the binding does not let us at it.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[storage.upper()]
    function = chunk_quantiser() if storage not in ("f32", "f16", "bf16") else None
    if function is None and storage not in BY_LLAMA_CPP:
        return np.asarray(gguf.quantize(weight, kind))
    if function is None:
        raise MissingExtraError(
            f"{storage} takes llama.cpp's own quantiser, which the installed xllamacpp does not let others call",
            hint="use --outtype q8_0, or run llama-quantize on the f16 file",
        )
    block = BLOCKS[storage]
    weight = np.ascontiguousarray(weight, np.float32)
    rows, row = int(np.prod(weight.shape[:-1])), weight.shape[-1]
    packed = np.empty((*weight.shape[:-1], row // block.weights * block.bytes), np.uint8)
    count = function(int(kind), weight.ctypes.data, packed.ctypes.data, 0, rows, row, None)
    assert count == packed.nbytes
    return packed


@cache
def chunk_quantiser() -> Any:
    """`ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)` of ggml.h, which returns bytes written.

    None where no library of the binding lets others call it.
    """
    found = find_spec("xllamacpp")
    folders = (found.submodule_search_locations if found else None) or []
    libraries = sorted(path for folder in folders for path in Path(folder).glob("*.so"))
    for path in libraries:
        try:
            function = ctypes.CDLL(str(path)).ggml_quantize_chunk
        except AttributeError:
            continue
        whole, address = ctypes.c_int64, ctypes.c_void_p
        function.argtypes = [ctypes.c_int, address, address, whole, whole, whole, address]
        function.restype = ctypes.c_size_t
        return function
    return None
