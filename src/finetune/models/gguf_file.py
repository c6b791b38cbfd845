"""Reads a GGUF file's keys and tensors; every count, length and offset is held to the file before it is used.

Source: `docs/gguf.md` and `ggml/include/gguf.h` of ggml. gguf-py's own reader trusts the file: a count that lies
keeps it busy for as long as the number is large.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import ModelError
from finetune.reading import open_regular

Array = NDArray[Any]
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""How struct spells each type of number; 7 is a truth value."""
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_TENSORS, _MOST_ELEMENTS = 1 << 16, 1 << 17, 1 << 22
_MOST_BEHIND = 2**20  # who pads a file fills a page or a block
_LONGEST_NAME, _LONGEST_TEXT, _LARGEST_ALIGNMENT = 1 << 12, 1 << 24, 1 << 16
_MOST_SIDES = 4
_HINT = "get the file again; what is here is damaged, or was made to mislead"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its shape, outermost side first, its type by ggml's name, and where in the file it lies."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says and holds; no weight is in memory."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def stored(self, name: str) -> bytes:
        """One tensor's bytes, as they lie in the file.

        Raises:
            OSError: they cannot be read.
        """
        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            return file.read(tensor.bytes)

    def read(self, name: str) -> Array:
        """One tensor de-quantised, in float32.

        Raises:
            ModelError: it cannot be read, or holds NaN or infinity.
        """
        import gguf

        tensor = self.tensors[name]
        try:
            content = self.stored(name)
            kind = gguf.GGMLQuantizationType[tensor.kind]
            raw = np.frombuffer(content, np.uint8).reshape(*tensor.shape[:-1], -1)
            if plain := {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(tensor.kind):
                raw = raw.view(plain)
            # Scales that a damaged block holds may be no numbers: that is told below.
            with np.errstate(all="ignore"):
                weight = np.asarray(raw if plain else gguf.dequantize(raw, kind), np.float32).reshape(tensor.shape)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.path}: tensor {name} cannot be read: {error}", hint=_HINT) from None
        if not np.isfinite([weight.min(), weight.max()]).all():
            raise ModelError(f"{self.path}: tensor {name} holds NaN or infinity", hint=_HINT)
        return weight


def read_gguf(path: Path) -> GgufFile:
    """Read keys and descriptions of tensors.

    Raises:
        ModelError: the file is cut off, of another format or version, or says what cannot be; the place is named.
    """
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Header(path, content).read()
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelError(f"{path} cannot be read: {error}", hint=_HINT) from None


class _Header:
    """A place in the file that only moves forward, and never beyond the end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 0

    def read(self) -> GgufFile:
        if self._take(4, "the file's first bytes") != _MAGIC:
            raise self._wrong("is no GGUF file: it does not begin with GGUF", 0)
        version = self._number("I", "version")
        if version not in _VERSIONS:
            told = " (the file is big-endian)" if version & 0xFFFF == 0 else ""
            raise self._wrong(f"is GGUF of version {version}{told}; what can be read: 2 and 3", 4)
        tensors = self._count("number of tensors", least=24, most=_MOST_TENSORS)
        keys = self._count("number of keys", least=13, most=_MOST_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            start = self._at
            key = self._text("a key", longest=_LONGEST_NAME)
            if key in metadata:
                raise self._wrong(f"has the key {key!r} twice", start)
            metadata[key] = self._value(self._number("I", f"type of {key}"), key)
        return GgufFile(self._path, metadata, self._tensors(tensors, metadata))

    def _tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
        told = [self._tensor() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise self._wrong(f"says general.alignment {alignment!r}, which is no power of two up to 65536", self._at)
        start = -(-self._at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        end, last = start, ""
        for name, shape, kind, size, offset in sorted(told, key=lambda one: one[-1]):
            if name in found:
                raise self._wrong(f"has the tensor {name!r} twice", self._at)
            if offset % alignment:
                raise self._wrong(f"puts {name} at {offset}, which is no multiple of {alignment}", self._at)
            if start + offset < end:
                raise self._wrong(f"puts {name} at {offset}, on top of {last}", self._at)
            end, last = start + offset + size, name
            if end > len(self._content):
                raise self._wrong(
                    f"ends within {name}, which takes {size:,} bytes from byte {start + offset:,} on",
                    len(self._content),
                )
            found[name] = GgufTensor(name, shape, kind, start + offset, size)
        if (behind := len(self._content) - end) > _MOST_BEHIND:
            raise self._wrong(f"goes on for {behind:,} bytes behind its last tensor", end)
        return {one[0]: found[one[0]] for one in told}

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int, int]:
        """Name, shape, type, size in bytes, and offset of the next tensor."""
        import gguf

        start = self._at
        name = self._text("a tensor's name", longest=_LONGEST_NAME)
        sides = self._number("I", f"number of sides of {name}")
        if not 0 < sides <= _MOST_SIDES:
            raise self._wrong(f"says that {name!r} has {sides} sides, and a tensor has 1 to {_MOST_SIDES}", start)
        shape = tuple(self._number("Q", f"sides of {name}") for _ in range(sides))[::-1]
        number, offset = self._number("I", f"type of {name}"), self._number("Q", f"offset of {name}")
        try:
            kind = gguf.GGMLQuantizationType(number)
            weights, block = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self._wrong(f"keeps {name!r} in a type of number {number}, which is unknown here", start) from None
        if kind.name not in ("F32", "F16", "F64") and kind not in gguf.quants._type_traits:
            known = ", ".join(["F32", "F16", "F64", *(each.name for each in gguf.quants._type_traits)])
            raise self._wrong(f"keeps {name!r} as {kind.name}; what can be read: {known}", start)
        count = 1
        for side in shape:
            count *= side
        if shape[-1] % weights:
            raise self._wrong(f"says {name!r} is {shape}, whose rows are no whole blocks of {kind.name}", start)
        if not 0 < count // weights * block <= len(self._content):
            raise self._wrong(f"says {name!r} is {shape} of {kind.name}, and the file is smaller than that", start)
        return name, shape, kind.name, count // weights * block, offset

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text(key, longest=_LONGEST_TEXT)
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], key)
        if kind != _ARRAY:
            raise self._wrong(f"gives {key!r} a value of type {kind}, which is unknown", self._at)
        inner = self._number("I", f"type of {key}")
        if inner == _STRING:
            count = self._count(f"length of {key}", least=8, most=_MOST_ELEMENTS)
            return [self._text(key, longest=_LONGEST_TEXT) for _ in range(count)]
        if inner not in _NUMBERS:
            raise self._wrong(f"gives {key!r} a list of type {inner}, which is unknown or a list again", self._at)
        size = struct.calcsize(_NUMBERS[inner])
        count = self._count(f"length of {key}", least=size, most=_MOST_ELEMENTS)
        return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", self._take(size * count, key)))

    def _number(self, kind: str, what: str) -> Any:
        return struct.unpack(f"<{kind}", self._take(struct.calcsize(kind), what))[0]

    def _count(self, what: str, *, least: int, most: int) -> int:
        """A count of things that take at least so many bytes each."""
        start = self._at
        count: int = self._number("Q", what)
        if count > min(most, (len(self._content) - self._at) // least):
            raise self._wrong(f"says {count:,} for the {what}, and {most:,} or the rest of the file is less", start)
        return count

    def _text(self, what: str, *, longest: int) -> str:
        start = self._at
        length = self._number("Q", f"length of {what}")
        if length > min(longest, len(self._content) - self._at):
            raise self._wrong(f"says that {what} is {length:,} bytes long, and {longest:,} or the rest is less", start)
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise self._wrong(f"holds {what}, which is no UTF-8 text", start) from None

    def _take(self, size: int, what: str) -> bytes:
        if self._at + size > len(self._content):
            raise self._wrong(f"ends within {what}", len(self._content))
        self._at += size
        return self._content[self._at - size : self._at]

    def _wrong(self, what: str, place: int) -> ModelError:
        return ModelError(f"{self._path} {what} (byte {place:,})", hint=_HINT)
