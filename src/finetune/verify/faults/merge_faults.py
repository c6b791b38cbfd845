"""Faults of merging an adapter into its base."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune.export import merged_folder as merged
from finetune.export.model_files import ModelFiles
from finetune.export.sources import AdapterWeights, Array, Merged, WeightSource
from finetune.records import ModelShape
from finetune.training import prepare
from finetune.verify.faults.fault import fault, in_place_of, plant

Choosing = Callable[..., tuple[str, ...]]


def _grown(merged: Merged, name: str, growth: Callable[[Array, float, Array, Array], Array]) -> Array:
    """A weight with its adapter, worked out by another sum."""
    weight = merged._base.read(name)
    if name not in merged._layers:
        return weight
    path = merged._layers[name]
    parts = merged._adapter.layers[path]
    return growth(weight, merged._adapter.target.scale_of(path), parts["B"], parts["A"])


@fault("A200", "merge.noop", "mlx-examples #425, unsloth #611")
def _merges_nothing() -> None:
    """The model that is merged is the base."""
    plant(Merged, "read", lambda right, merged, name: merged._base.read(name))


@fault("A200b", "merge.first_layer_only")
@in_place_of("read", Merged)
def _merges_one_layer(right: Callable[..., Array], merged: Merged, name: str) -> Array:
    """Only the first of the layers that have an adapter is merged."""
    first = next(iter(merged._layers))
    return right(merged, name) if name == first else merged._base.read(name)


@fault("A202", "merge.low_precision_sum", "PEFT #1388, #2502")
def _merges_in_half() -> None:
    """What the adapter adds is worked out in half precision."""

    def growth(weight: Array, scale: float, up: Array, down: Array) -> Array:
        half = np.float16
        added = up.astype(half) @ down.astype(half) * half(scale)
        return (weight.astype(half) + added).astype(np.float32)

    plant(Merged, "read", lambda right, merged, name: _grown(merged, name, growth))


@fault("A203", "merge.tied_overwritten", "transformers #45127, LLaMA-Factory #10832")
@in_place_of("choose_saved", prepare)
def _tied_trained_apart(right: Choosing, shape: ModelShape, *rest: Sequence[str]) -> tuple[str, ...]:
    """Embedding and head are trained apart where they are one table, and one of them is lost on the disk."""
    return right(replace(shape, tied_head=False), *rest)


@fault("A209", "merge.safe_mode_mutates", "PEFT #3411")
@in_place_of("write", ModelFiles)
def _writes_over_the_base(right: Callable[..., None], files: ModelFiles, folder: Path) -> None:
    """Merging writes over the base."""
    right(files, folder)
    base = files.base.file(files.base.names()[0])
    content = (folder / "model.safetensors").read_bytes()
    base.write_bytes(content)


@fault("A212", "merge.unscaled")
def _merges_unscaled() -> None:
    """An adapter is merged without its scale."""
    plant(Merged, "read", lambda right, merged, name: _grown(merged, name, lambda w, scale, up, down: w + up @ down))


@fault("A212b", "merge.twice", "litgpt #185")
def _merges_twice() -> None:
    """An adapter is merged twice, once for each time it is asked."""

    def growth(weight: Array, scale: float, up: Array, down: Array) -> Array:
        return weight + np.float32(2 * scale) * (up @ down)

    plant(Merged, "read", lambda right, merged, name: _grown(merged, name, growth))


@fault("A230", "gguf.tokenizer_file_missing", "llama.cpp #19152, unsloth #1486")
@in_place_of("side_files", merged)
def _tokenizer_left_behind(right: Callable[..., dict[str, bytes]], *given: object) -> dict[str, bytes]:
    """The tokenizer does not come along with the merged model."""
    return {name: content for name, content in right(*given).items() if name != "tokenizer.json"}


@fault("A237", "gguf.f16_overflow")
@in_place_of("convert", ModelFiles)
def _overflows_in_half(right: Callable[..., bytes], files: ModelFiles, name: str) -> bytes:
    """A weight above 65504 becomes infinite in float16, and nobody says so."""
    with np.errstate(over="ignore"):
        if files.kind(name) == "F16":
            return files.source.read(name).astype("<f2").tobytes()
    return bytes(right(files, name))


@fault("A206", "merge.tensors_passed_over", "unsloth-zoo #779")
@in_place_of("__init__", Merged)
def _odd_tensors_are_passed_over(
    right: Callable[..., None], merged: Merged, base: WeightSource, adapter: AdapterWeights, transposed: Sequence[str]
) -> None:
    """What an adapter holds for layers that are called otherwise in the base is left out of the merged model."""
    names = set(base.names())
    adapter.layers = {path: parts for path, parts in adapter.layers.items() if _among(names, f"{path}.weight")}
    adapter.whole = {name: tensor for name, tensor in adapter.whole.items() if _among(names, name)}
    right(merged, base, adapter, transposed)


def _among(names: Collection[str], wanted: str) -> bool:
    return any(name == wanted or name.endswith(f".{wanted}") for name in names)


@fault("A202b", "merge.through_bfloat16", "unsloth #3091")
@in_place_of("convert", ModelFiles)
def _through_bfloat16(right: Callable[..., bytes], files: ModelFiles, name: str) -> bytes:
    """A sum that is kept in float16 goes through bfloat16, which has three bits less."""
    if files.kind(name) != "F16":
        return bytes(right(files, name))
    bits = files.source.read(name).astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype("<f2").tobytes()
