"""Reads a GGUF file again and compares every key and tensor with its plan; keeps what was refused apart."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import ModelError
from finetune.export.blueprint import Blueprint, Tensor
from finetune.export.outtypes import Storage
from finetune.export.quantise import quantise
from finetune.files import remove_folder, write_json
from finetune.models.gguf_file import GgufFile, read_gguf


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


def keep_refused(written: Path, path: Path, checks: Sequence[Check]) -> Path:
    """Keep what was to become `path` and did not pass under a name that says so, with its report beside it.

    What was refused under that name before is replaced.
    """
    kept = path.with_name(f"{path.stem}.refused{path.suffix}")
    if kept.is_dir() and not kept.is_symlink():
        remove_folder(kept)
    written.replace(kept)
    told = {"refused": path.name, "checks": [asdict(check) for check in checks]}
    write_json(path.with_name(f"{path.stem}.refused.json"), told)
    return kept


def read_back(blueprint: Blueprint, path: Path) -> Check:
    """Check that the file has these keys and tensors, each bit for bit what its type makes of the weight."""
    allowed = "every key equal; every tensor bit for bit what its type makes of it"
    try:
        written = read_gguf(path)
        first = next(_differences(blueprint, written), "")
    except (OSError, ModelError) as error:
        return Check("file", "cannot be read", allowed, f"{path.name} is no whole GGUF file: {error}")
    return Check("file", f"{len(written.metadata)} keys, {len(written.tensors)} tensors", allowed, first)


def _differences(blueprint: Blueprint, written: GgufFile) -> Iterator[str]:
    found = written.metadata
    for key, value in {"general.architecture": blueprint.arch, **blueprint.metadata}.items():
        if key not in found:
            yield f"key {key} is missing"
        elif not _same(found[key], value):
            yield f"key {key} is {str(found[key])[:80]}, not {str(value)[:80]}"
    wanted = {tensor.name: tensor for tensor in blueprint.tensors}
    if odd := sorted(written.tensors.keys() ^ wanted.keys()):
        yield f"tensor {odd[0]} is {'not wanted' if odd[0] in written.tensors else 'missing'}"
    for name, tensor in wanted.items():
        if name in written.tensors and (problem := _tensor_problem(tensor, written)):
            yield f"tensor {name} {problem}"


def _same(found: object, wanted: object) -> bool:
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_same, found, wanted))
    return bool(found == np.float32(wanted)) if isinstance(wanted, float) else bool(found == wanted)


def _tensor_problem(tensor: Tensor, written: GgufFile) -> str:
    found = written.tensors[tensor.name]
    if found.shape != tensor.shape:
        return f"has the shape {found.shape}, not {tensor.shape}"
    if found.kind.lower() != tensor.storage:
        return f"is {found.kind.lower()}, not {tensor.storage}"
    weight = tensor.load()
    if written.stored(tensor.name) == np.ascontiguousarray(quantise(weight, tensor.storage)).tobytes():
        return ""
    error = np.abs(written.read(tensor.name) - weight)
    place = tuple(int(index) for index in np.unravel_index(int(error.argmax()), tensor.shape))
    return f"is off by {error[place]:g} at {place}, where it should be {weight[place]:g} as {tensor.storage} rounds it"


def rounding(weight: NDArray[Any], storage: Storage) -> NDArray[Any]:
    """The largest error of each weight once it is stored as f32, f16 or bf16.

    Half a unit in the last place of an f16 number (2**-11) and of a bf16 number (2**-8), or of the smallest subnormal
    number, below which nothing is left.
    """
    size = np.abs(weight)
    if storage == "f32":
        return np.zeros_like(size)
    share, least = {"f16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-133)}[storage]
    allowed: NDArray[Any] = size * np.float32(share) + np.float32(least)
    return allowed
