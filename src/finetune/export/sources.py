"""Reads weights from safetensors files one at a time, in float32, with an adapter merged in where there is one."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.choose import ends_with
from finetune.adapters.kinds import kind_of, layer_tensor
from finetune.adapters.peft_files import ROWS
from finetune.errors import ModelError
from finetune.records import AdapterTarget

Array = NDArray[Any]
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class WeightSource(Protocol):
    """Weights by name, read when they are asked for."""

    def names(self) -> Sequence[str]:
        """The names of all weights."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one."""

    def read(self, name: str) -> Array:
        """One, in float32."""


class ChangedWeights(Protocol):
    """Weights of a base, some of them changed."""

    def changes(self, name: str) -> bool:
        """Whether one is another than the base's."""

    def read(self, name: str) -> Array:
        """One, in float32."""


class Files:
    """The weights of safetensors files; nothing is kept in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in paths:
            for name, start, entry in _header(path):
                self._entries[name] = (path, start, entry)

    def names(self) -> Sequence[str]:
        """The names of all weights, in the order of the files."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one."""
        return tuple(self._entries[name][2]["shape"])

    def kind(self, name: str) -> str:
        """How one is stored, as safetensors calls it: F32, BF16, ..."""
        return str(self._entries[name][2]["dtype"])

    def size(self, name: str) -> int:
        """How many bytes one takes."""
        begin, end = self._entries[name][2]["data_offsets"]
        return int(end - begin)

    def file(self, name: str) -> Path:
        """The file that holds one."""
        return self._entries[name][0]

    def raw(self, name: str) -> bytes:
        """One, byte for byte as it is stored.

        Raises:
            ModelError: it is cut off.
        """
        path, start, entry = self._entries[name]
        size = self.size(name)
        try:
            with path.open("rb") as file:
                file.seek(start + entry["data_offsets"][0])
                content = file.read(size)
            if len(content) != size:
                raise ValueError(f"{len(content)} of {size} bytes are there")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {name} cannot be read: {error}", hint="get the weights again") from None
        return content

    def read(self, name: str) -> Array:
        """One, in float32.

        Raises:
            ModelError: it is stored as something else than a float, or cut off, or not finite.
        """
        path, _, entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise ModelError(
                f"{path}: {name} is stored as {entry['dtype']}; what can be exported: {', '.join(DTYPES)}",
                hint="export from weights that are not quantised",
            )
        try:
            raw = np.frombuffer(self.raw(name), DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except ValueError as error:
            raise ModelError(f"{path}: {name} cannot be read: {error}", hint="get the weights again") from None
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        weight = raw.astype(np.float32, copy=False)
        if weight.size and not np.isfinite([weight.min(), weight.max()]).all():
            raise ModelError(f"{path}: {name} holds NaN or infinity", hint="train again, or get the weights again")
        return weight


def _header(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name, start of the data, and description of each tensor of a file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        yield from ((name, 8 + length, entry) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} is corrupt or cut off: {error}", hint="get the weights again") from None


class AdapterWeights:
    """An adapter's tensors: of each layer that it sits on by their kind's keys, and what is trained of weights itself.

    `whole` are weights that are trained whole, `rows` rows of tables with their numbers; both by the base's names.
    """

    def __init__(self, path: Path, target: AdapterTarget) -> None:
        files = Files([path])
        self.target = target
        self.layers: dict[str, dict[str, Array]] = {}
        self.whole: dict[str, Array] = {}
        self.rows: dict[str, tuple[tuple[int, ...], Array]] = {}
        for name in files.names():
            if found := layer_tensor(name):
                self.layers.setdefault(found.path, {})[found.tensor.key] = files.read(name)
            elif name.endswith(f".{ROWS}"):
                table = name.removeprefix("base_model.model.").removesuffix(f".{ROWS}")
                self.rows[f"{table}.weight"] = (_rows_of(target, table, path), files.read(name))
            else:
                self.whole[name.removeprefix("base_model.model.")] = files.read(name)
        self.layers = dict(sorted(self.layers.items()))
        wanted = {tensor.key: tensor.on_disk for tensor in kind_of(target).tensors}
        for layer, parts in self.layers.items():
            if wrong := sorted(wanted.keys() ^ parts.keys()):
                raise ModelError(
                    f"{path}: {layer}.{wanted.get(wrong[0], wrong[0])} is {'missing' if wrong[0] in wanted else 'odd'}",
                    hint="train again, or restore the adapter",
                )
        if lacking := [table for table in target.rows if not ends_with(self.rows, f"{table}.weight")]:
            raise ModelError(f"{path}: rows of {lacking[0]} are missing", hint="train again, or restore the adapter")

    def merged(self, path: str, weight: Array) -> Array:
        """The weight (outputs x inputs) of a layer without an adapter that computes the same."""
        scale: Any = np.float32(self.target.scale_of(path))
        merged: Array = kind_of(self.target).merged(np, self.layers[path], scale, weight)
        return merged

    def merged_bias(self, path: str, bias: Array) -> Array:
        """Its bias; the very same where the adapter does not touch it."""
        merged: Array = kind_of(self.target).merged_bias(self.layers[path], bias)
        return merged


class Merged:
    """The weights of a base model with an adapter merged in, computed in float32.

    Args:
        transposed: names of layers that the base stores inputs x outputs, as GPT-2 does.

    Raises:
        ModelError: the adapter names a layer or a weight that the base lacks, or one of another shape.
    """

    def __init__(self, base: WeightSource, adapter: AdapterWeights, transposed: Sequence[str]) -> None:
        self._base, self._adapter, self._transposed = base, adapter, transposed
        names = set(base.names())
        self._layers = {_found(names, f"{path}.weight"): path for path in adapter.layers}
        self._whole = {_found(names, name): tensor for name, tensor in adapter.whole.items()}
        self._rows = {_found(names, name): rows for name, rows in adapter.rows.items()}
        for name, (rows, tensor) in self._rows.items():
            known, width = self.shape(name)
            _same_shape(f"{name}: rows", tensor.shape, (len(rows), width))
            if max(rows, default=0) >= known:
                raise ModelError(
                    f"the adapter trains row {max(rows)} of {name}, which has {known} in this base",
                    hint="use the base model that the adapter was trained on, with its new tokens",
                )
        for name, path in self._layers.items():
            outputs, inputs = self._facing(name, self.shape(name))
            wanted = kind_of(adapter.target).shapes(adapter.target, path, outputs, inputs)
            for key, tensor in adapter.layers[path].items():
                _same_shape(f"{path}: {key}", tensor.shape, wanted[key])
            bias_name = f"{name.removesuffix('.weight')}.bias"
            if bias_name in names:
                bias = base.read(bias_name)
                merged = adapter.merged_bias(path, bias)
                self._whole |= {} if merged is bias else {bias_name: merged}
        for name, tensor in self._whole.items():
            _same_shape(name, tensor.shape, self.shape(name))

    def names(self) -> Sequence[str]:
        """The names of all weights: those of the base."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one."""
        return self._base.shape(name)

    def changes(self, name: str) -> bool:
        """Whether one is another than the base's."""
        return name in self._whole or name in self._layers or name in self._rows

    def read(self, name: str) -> Array:
        """One, with what was trained in it."""
        if name in self._whole:
            return self._whole[name]
        weight = self._base.read(name)
        if name in self._rows:
            (rows, tensor), weight = self._rows[name], weight.copy()
            weight[list(rows)] = tensor
        if name not in self._layers:
            return weight
        transposed = self._is_transposed(name)
        merged = self._adapter.merged(self._layers[name], weight.T if transposed else weight)
        return np.ascontiguousarray(merged.T if transposed else merged)

    def _is_transposed(self, name: str) -> bool:
        return name.split(".")[-2] in self._transposed

    def _facing(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if self._is_transposed(name) else shape


def _rows_of(target: AdapterTarget, table: str, path: Path) -> tuple[int, ...]:
    found = next((rows for name, rows in target.rows.items() if ends_with([table], name)), None)
    if found is None:
        raise ModelError(f"{path}: its settings do not say which rows of {table} it holds", hint="restore the adapter")
    return found


def _found(names: Collection[str], name: str) -> str:
    """The base's own name of a weight; files of GPT-2 leave out what the whole model is called."""
    parts = name.split(".")
    for start in range(min(2, len(parts))):
        if (shorter := ".".join(parts[start:])) in names:
            return shorter
    raise ModelError(
        f"the adapter changes {name}, which is no weight of this base",
        hint="use the base model that the adapter was trained on",
    )


def _same_shape(path: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise ModelError(
            f"the adapter's {path} is {tuple(found)}, and the base needs {tuple(wanted)}",
            hint="use the base model that the adapter was trained on",
        )
