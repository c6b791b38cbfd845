"""GGUF files put together byte by byte, so that each number in them can be made to lie."""

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import gguf
import numpy as np

from finetune.models.gguf_file import read_gguf

ALIGNMENT = 32


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it stands in a file; `sides` innermost first, `offset` None for where it belongs."""

    sides: tuple[int, ...]
    kind: int
    content: bytes
    offset: int | None = None


@dataclass(frozen=True)
class RawGguf:
    """A file's parts; counts are None for as many as there are."""

    metadata: dict[str, Any]
    tensors: dict[str, RawTensor]
    version: int = 3
    keys: int | None = None
    count: int | None = None

    @classmethod
    def of(cls, path: Path) -> Self:
        """The parts of a file."""
        file, content = read_gguf(path), path.read_bytes()
        tensors = {
            name: RawTensor(
                one.shape[::-1],
                int(gguf.GGMLQuantizationType[one.kind]),
                content[one.offset : one.offset + one.bytes],
            )
            for name, one in file.tensors.items()
        }
        return cls(dict(file.metadata), tensors)

    def said(self, **changes: Any) -> Self:
        """The same with other keys; __ stands for a point, and None leaves one out."""
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        return replace(self, metadata={k: v for k, v in {**self.metadata, **changed}.items() if v is not None})

    def with_tensor(self, name: str, **changes: Any) -> Self:
        """The same with one tensor changed."""
        return replace(self, tensors={**self.tensors, name: replace(self.tensors[name], **changes)})

    def without(self, name: str) -> Self:
        """The same without one tensor."""
        return replace(self, tensors={key: one for key, one in self.tensors.items() if key != name})

    def header(self) -> bytes:
        """All before the weights."""
        counts = (
            len(self.tensors) if self.count is None else self.count,
            len(self.metadata) if self.keys is None else self.keys,
        )
        parts = [b"GGUF", struct.pack("<IQQ", self.version, *counts)]
        parts += [_text(key) + _value(key, value) for key, value in self.metadata.items()]
        place = 0
        for name, one in self.tensors.items():
            offset = place if one.offset is None else one.offset
            parts.append(
                _text(name) + struct.pack(f"<I{len(one.sides)}QIQ", len(one.sides), *one.sides, one.kind, offset)
            )
            place += -(-len(one.content) // ALIGNMENT) * ALIGNMENT
        head = b"".join(parts)
        return head + bytes(-len(head) % ALIGNMENT)

    def write(self, path: Path) -> Path:
        """The file."""
        weights = b"".join(one.content + bytes(-len(one.content) % ALIGNMENT) for one in self.tensors.values())
        path.write_bytes(self.header() + weights)
        return path


def _text(text: str) -> bytes:
    content = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(content)) + content


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, bytes):  # as it is
        return value
    if isinstance(value, list):
        inner = [_value(key, each) for each in value]
        return (
            struct.pack("<I", 9) + inner[0][:4] + struct.pack("<Q", len(value)) + b"".join(each[4:] for each in inner)
        )
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<Ii", 5, value) if key.endswith("token_type") else struct.pack("<II", 4, value)


def finite_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int, seed: int) -> bytes:
    """Blocks of a type filled at random; the uppermost bit of every exponent is 0, so that no number is infinite."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    drawn = np.random.default_rng(seed).integers(0, 256, rows * columns // weights * size, np.uint8)
    return (drawn & 0xBF).tobytes()
