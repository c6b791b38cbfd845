"""Faults of merging an adapter into its base."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune.export import merged_folder as merged
from finetune.export.model_files import ModelFiles
from finetune.export.sources import Array, Merged
from finetune.records import ModelShape
from finetune.training import prepare
from finetune.verify.faults.fault import fault, plant


def _grown(merged: Merged, name: str, growth: Callable[[Array, float, Array, Array], Array]) -> Array:
    """A weight with its adapter, worked out by another sum."""
    weight = merged._base.read(name)
    if name not in merged._layers:
        return weight
    path = merged._layers[name]
    parts = merged._adapter.layers[path]
    return growth(weight, merged._adapter.target.scale_of(path), parts["B"], parts["A"])


@fault("A200", "merge.noop", real="mlx-examples #425, unsloth #611", what="The model that is merged is the base.")
def merges_nothing() -> None:
    """What is written is read from the wrong place."""
    plant(Merged, "read", lambda right, merged, name: merged._base.read(name))


@fault(
    "A200b",
    "merge.first_layer_only",
    real="",
    what="Only the first of the layers that have an adapter is merged.",
)
def merges_one_layer() -> None:
    """The loop ends too early."""

    def read(right: Callable[..., Array], merged: Merged, name: str) -> Array:
        first = next(iter(merged._layers))
        return right(merged, name) if name == first else merged._base.read(name)

    plant(Merged, "read", read)


@fault(
    "A202",
    "merge.low_precision_sum",
    real="PEFT #1388, #2502",
    what="What the adapter adds is worked out in half precision.",
)
def merges_in_half() -> None:
    """B A and the sum have 11 bits."""

    def growth(weight: Array, scale: float, up: Array, down: Array) -> Array:
        half = np.float16
        added = up.astype(half) @ down.astype(half) * half(scale)
        return (weight.astype(half) + added).astype(np.float32)

    plant(Merged, "read", lambda right, merged, name: _grown(merged, name, growth))


@fault(
    "A203",
    "merge.tied_overwritten",
    real="transformers #45127, LLaMA-Factory #10832",
    what="Embedding and head are trained apart where they are one table, and one of them is lost on the disk.",
)
def tied_trained_apart() -> None:
    """Nobody looks whether they are tied."""

    def choose(right: Callable[..., tuple[str, ...]], shape: ModelShape, *rest: Sequence[str]) -> tuple[str, ...]:
        return right(replace(shape, tied_head=False), *rest)

    plant(prepare, "choose_saved", choose)


@fault("A209", "merge.safe_mode_mutates", real="PEFT #3411", what="Merging writes over the base.")
def writes_over_the_base() -> None:
    """The files of the base get the merged weights, too."""

    def write(right: Callable[..., None], files: ModelFiles, folder: Path) -> None:
        right(files, folder)
        base = files.base.file(files.base.names()[0])
        content = (folder / "model.safetensors").read_bytes()
        base.write_bytes(content)

    plant(ModelFiles, "write", write)


@fault("A212", "merge.unscaled", real="", what="An adapter is merged without its scale.")
def merges_unscaled() -> None:
    """W + B A."""
    plant(Merged, "read", lambda right, merged, name: _grown(merged, name, lambda w, scale, up, down: w + up @ down))


@fault("A212b", "merge.twice", real="litgpt #185", what="An adapter is merged twice, once for each time it is asked.")
def merges_twice() -> None:
    """W + 2 s B A."""

    def growth(weight: Array, scale: float, up: Array, down: Array) -> Array:
        return weight + np.float32(2 * scale) * (up @ down)

    plant(Merged, "read", lambda right, merged, name: _grown(merged, name, growth))


@fault(
    "A230",
    "gguf.tokenizer_file_missing",
    real="llama.cpp #19152, unsloth #1486",
    what="The tokenizer does not come along with the merged model.",
)
def tokenizer_left_behind() -> None:
    """The folder is no model."""

    def side(right: Callable[..., dict[str, bytes]], *given: object) -> dict[str, bytes]:
        return {name: content for name, content in right(*given).items() if name != "tokenizer.json"}

    plant(merged, "side_files", side)


@fault(
    "A237",
    "gguf.f16_overflow",
    real="",
    what="A weight above 65504 becomes infinite in float16, and nobody says so.",
)
def overflows_in_half() -> None:
    """`.half()` and nothing else."""

    def converted(right: Callable[..., bytes], files: ModelFiles, name: str) -> bytes:
        with np.errstate(over="ignore"):
            if files.kind(name) == "F16":
                return files.source.read(name).astype("<f2").tobytes()
        return bytes(right(files, name))

    plant(ModelFiles, "convert", converted)
