"""Writes weights as Hugging Face model files, one tensor in memory at a time; the bytes of untouched ones are kept."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from finetune.errors import ModelError
from finetune.export.outtypes import Outtype, Storage
from finetune.export.sources import ChangedWeights, Files
from finetune.export.write import LARGEST_HALF

Array = NDArray[Any]
Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
INDEX = "model.safetensors.index.json"
KINDS: dict[Dtype, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What safetensors calls each."""
_ROUNDING: dict[str, Literal["bf16", "f16"]] = {"BF16": "bf16", "F16": "f16"}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Weights that are to be written in as many files as the base has.

    `dtype` is how floats are stored; None for each as the base has it.
    """

    base: Files
    source: Files | ChangedWeights
    dtype: Dtype | None = None

    @property
    def total_bytes(self) -> int:
        """How many bytes all tensors take."""
        return sum(self._bytes(name) for name in self.base.names())

    @property
    def rounding(self) -> Outtype:
        """The coarsest type that a weight is rounded to which was not of that type before."""
        kinds = {self.kind(name) for name in self.base.names() if not self._kept(name)}
        return next((outtype for kind, outtype in _ROUNDING.items() if kind in kinds), "f32")

    @property
    def storages(self) -> dict[str, Storage]:
        """The type of each weight that is rounded."""
        kinds = {name: _ROUNDING.get(self.kind(name)) for name in self.base.names() if not self._kept(name)}
        return {name: kind for name, kind in kinds.items() if kind}

    def write(self, folder: Path) -> None:
        """Write the weights into an existing folder.

        Raises:
            ModelError: one cannot be read, or is too large for the type that it is to have.
            OSError: the disk does not take them.
        """
        files = self._files()
        for file, names in files.items():
            self._write_file(folder / file, names)
        if len(files) > 1:
            places = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _files(self) -> Mapping[str, Sequence[str]]:
        """The names of the weights by the file that they are to be in."""
        by_file: dict[Path, list[str]] = {}
        for name in self.base.names():
            by_file.setdefault(self.base.file(name), []).append(name)
        if len(by_file) == 1:
            return {"model.safetensors": next(iter(by_file.values()))}
        count = len(by_file)
        return {
            f"model-{place:05d}-of-{count:05d}.safetensors": names for place, names in enumerate(by_file.values(), 1)
        }

    def _write_file(self, path: Path, names: Sequence[str]) -> None:
        """Source: the layout of safetensors files, https://github.com/huggingface/safetensors#format."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + self._bytes(name)
            header[name] = {
                "dtype": self.kind(name),
                "shape": list(self.base.shape(name)),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(self._content(name))

    def differences(self, found: Files) -> Iterator[str]:
        """What is not as it is to be in weights that were written: each is held to the bytes that it is to have."""
        wanted, there = set(self.base.names()), set(found.names())
        for name in sorted(there ^ wanted):
            yield f"{name} is {'not wanted' if name in there else 'missing'}"
        for name in sorted(there & wanted):
            if (found.kind(name), found.shape(name)) != (self.kind(name), self.base.shape(name)):
                yield f"{name} is {found.kind(name)} of {found.shape(name)}, not {self.kind(name)} of the base's shape"
            elif found.raw(name) != self._content(name):
                yield f"{name} holds other numbers than base and adapter give"

    def _content(self, name: str) -> bytes:
        return self.base.raw(name) if self._kept(name) else self.convert(name)

    def kind(self, name: str) -> str:
        """The kind of number that a tensor is written in."""
        kind = self.base.kind(name)
        return kind if self.dtype is None or kind not in _SIZES else KINDS[self.dtype]

    def _kept(self, name: str) -> bool:
        """Whether one is written byte for byte as the base has it."""
        changed = not isinstance(self.source, Files) and self.source.changes(name)
        return not changed and self.kind(name) == self.base.kind(name)

    def _bytes(self, name: str) -> int:
        if self._kept(name):
            return self.base.size(name)
        return int(np.prod(self.base.shape(name))) * _SIZES[self.kind(name)]

    def convert(self, name: str) -> bytes:
        """The bytes of a tensor in the kind of number that it is written in."""
        weight, kind = self.source.read(name), self.kind(name)
        if kind == "BF16":
            return to_bfloat16(weight).tobytes()
        if kind == "F16" and (largest := float(np.abs(weight).max(initial=0))) > LARGEST_HALF:
            raise ModelError(
                f"{name} holds {largest:g}, which is more than float16 can ({LARGEST_HALF:g})",
                hint="use --dtype bfloat16 or float32",
            )
        return weight.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[kind]).tobytes()


def to_bfloat16(weight: Array) -> Array:
    """The upper halves (uint16) of float32 numbers, rounded to the nearest, to the even one where two are."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    upper: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return upper
