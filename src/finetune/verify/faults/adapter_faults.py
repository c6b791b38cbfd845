"""Faults of saving an adapter and of loading it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.backends.reference import adapter as files
from finetune.backends.reference import session as reference
from finetune.backends.reference.session import ReferenceSession
from finetune.errors import ModelError
from finetune.models.peft_files import read_settings
from finetune.records import AdapterTarget
from finetune.verify.faults.fault import fault, plant


@fault(
    "A180",
    "adapter.scale_not_saved",
    real="mlx-examples #622, #623",
    what="Alpha is not saved, so that an adapter comes back with another strength.",
)
def scale_not_saved() -> None:
    """The reader's default is 1."""

    def settings(right: Any, target: AdapterTarget, *rest: Any, **named: Any) -> None:
        right(replace(target, alpha=float(target.rank)), *rest, **named)

    plant(files, "write_settings", settings)


@fault(
    "A181",
    "adapter.missing_keys_tolerated",
    real="PEFT #2118, mlx-lm #1727",
    what="Tensors that are missing or have other names are passed over, and stay as they begin.",
)
def missing_keys_tolerated() -> None:
    """`strict=False`."""

    def read(right: Any, weights: Any, layers: Any, folder: Path) -> Any:
        try:
            return right(weights, layers, folder)
        except ModelError:
            target = read_settings(folder, turned=False)
            return files.draw_adapter(weights, layers, target, np.random.Generator(np.random.PCG64(0)))

    plant(reference, "read_adapter", read)


@fault(
    "A181b",
    "adapter.shapes_tolerated",
    real="PEFT #2084",
    what="A tensor of another shape than the model needs is cut to it.",
)
def shapes_tolerated() -> None:
    """`ignore_mismatched_sizes`, and what fits is taken."""

    def check(right: Any, saved: Any, expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
        right({name: expected.get(name, shape) for name, shape in saved.items()}, expected, folder)

    def read(right: Any, weights: Any, layers: Any, folder: Path) -> Any:
        adapter = right(weights, layers, folder)
        pairs = {
            path: (down[: adapter.target.rank_of(path), : layers[path][1]], up[: layers[path][0]])
            for path, (down, up) in adapter.pairs.items()
        }
        return replace(adapter, pairs=pairs)

    plant(files, "check_tensor_shapes", check)
    plant(reference, "read_adapter", read)


@fault(
    "A182",
    "adapter.flag_ignored_at_serve",
    real="mlx-lm #1249",
    what="An adapter is named and the base answers.",
)
def adapter_ignored() -> None:
    """Nothing is loaded, and nobody says so."""
    plant(ReferenceSession, "load_adapter", lambda right, session, folder: None)


@fault(
    "A184",
    "adapter.extra_modules_lost",
    real="PEFT #762, #1457",
    what="Modules that were trained whole beside the adapter are not saved.",
)
def extra_modules_lost() -> None:
    """Only A and B are written, and the settings know of nothing else."""

    def write(right: Any, adapter: Any, *rest: Any) -> None:
        right(replace(adapter, target=replace(adapter.target, saved=()), saved={}), *rest)

    plant(reference, "write_adapter", write)


@fault(
    "A187",
    "adapter.rslora_set_scale",
    real="PEFT #2733",
    what="An adapter that is rank-stabilised is scaled as a plain one.",
)
def root_forgotten() -> None:
    """Alpha / r instead of alpha / sqrt(r)."""
    plant(AdapterTarget, "scale_of", lambda right, target, path: target.alpha_of(path) / target.rank_of(path))


@fault(
    "A189",
    "adapter.wrong_base_accepted",
    real="vllm #34186, #55193",
    what="What an adapter holds for layers that the base has not is dropped without a word.",
)
def wrong_base_accepted() -> None:
    """Names that match nothing count for nothing."""

    def check(right: Any, saved: Any, expected: Mapping[str, Any], folder: Path) -> None:
        right({name: shape for name, shape in saved.items() if name in expected}, expected, folder)

    plant(files, "check_tensor_shapes", check)


@fault(
    "A190",
    "adapter.requires_grad_coupled",
    real="PEFT #2765",
    what="An adapter that is loaded to answer with can be trained.",
)
def loaded_is_trainable() -> None:
    """To put it on is to thaw it."""

    def load(right: Any, session: ReferenceSession, folder: Path) -> None:
        right(session, folder)
        assert session.adapter is not None
        session.trainable = session.adapter.tensors()

    plant(ReferenceSession, "load_adapter", load)


@fault(
    "A192",
    "adapter.save_only_flag",
    real="torchtune #1764",
    what="What is saved of an adapter is filtered by names that are out of date.",
)
def stale_names() -> None:
    """The layers of the MLP are not among them."""

    def write(right: Any, adapter: Any, *rest: Any) -> None:
        pairs = {path: pair for path, pair in adapter.pairs.items() if ".mlp." not in path}
        lengths = {path: each for path, each in adapter.magnitudes.items() if path in pairs}
        right(replace(adapter, pairs=pairs, magnitudes=lengths), *rest)

    plant(reference, "write_adapter", write)


@fault("A193", "adapter.saved_in_half", real="", what="An adapter is saved in half precision and comes back rounded.")
def saved_in_half() -> None:
    """Eleven bits of every number are left."""

    def write(right: Any, adapter: Any, *rest: Any) -> None:
        def half(tensor: Any) -> Any:
            return tensor.astype(np.float16).astype(np.float64)

        right(replace(adapter, pairs={path: (half(a), half(b)) for path, (a, b) in adapter.pairs.items()}), *rest)

    plant(reference, "write_adapter", write)
