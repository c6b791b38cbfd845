"""MLX arrays to safetensors files and back, to the bit; equal arrays give equal files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from finetune.errors import ModelError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
_CODES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32"}


def read_tensors(path: Path, owner: str) -> dict[str, mx.array]:
    """Every tensor of a safetensors file, read at once: the file may go afterwards.

    Raises:
        ModelError: the file is missing, cut off or corrupt, or holds a kind of number that MLX lacks; `owner` names it.
    """
    try:
        tensors: dict[str, mx.array] = mx.load(str(path), format="safetensors")
        mx.eval(list(tensors.values()))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{owner} cannot be loaded: {path}: {first_line(error)}", hint="get its files again") from None
    return tensors


def write_tensors(tensors: Mapping[str, mx.array], path: Path) -> None:
    """Write the arrays as they are.

    MLX's own writer neither aligns what it writes nor says why a disk refuses it.
    """
    ordered = sorted(tensors.items())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(_raw(tensor))


def fingerprint(tensor: mx.array) -> str:
    """A hash of the array's bytes."""
    return hashlib.sha256(_raw(tensor)).hexdigest()


def first_line(error: BaseException) -> str:
    """What a foreign error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _raw(tensor: mx.array) -> bytes:
    return bytes(memoryview(mx.contiguous(tensor)))
