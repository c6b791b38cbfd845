"""Faults of saving an adapter and of loading it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from finetune.adapters.kinds import kind_of
from finetune.adapters.peft_files import WEIGHTS, Layers, read_settings
from finetune.backends.reference import adapter as files
from finetune.backends.reference import session as reference
from finetune.backends.reference.adapter import ReferenceAdapter
from finetune.backends.reference.model import Array
from finetune.errors import ModelError
from finetune.evidence import saved
from finetune.ports import Session
from finetune.records import ModelShape
from finetune.training import prepare
from finetune.verify.faults.fault import backend_under_judgement, fault, in_place_of, plant, planted_by
from finetune.verify.faults.sessions import plant_session, thaw

Tensor = NDArray[np.float32]
Sizes = Mapping[str, tuple[int, ...]]
Weights = Mapping[str, Array]
Reading = Callable[..., ReferenceAdapter]
Rows = dict[str, tuple[int, ...]]


def _in_files(spoil: Callable[[dict[str, object], dict[str, Tensor]], object]) -> None:
    """Spoil the settings and the tensors of every adapter that is saved, whichever backend wrote it."""

    def save(right: Callable[..., None], session: Session, folder: Path) -> None:
        right(session, folder)
        place = folder / "adapter_config.json"
        settings, tensors = json.loads(place.read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
        spoil(settings, tensors)
        place.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    plant_session("save_adapter", save)


def _keep(tensors: dict[str, Tensor], named: Callable[[str], bool]) -> None:
    for name in [name for name in tensors if not named(name)]:
        del tensors[name]


@fault("A180", "adapter.scale_not_saved", "mlx-examples #622, #623")
def _scale_not_saved() -> None:
    """Alpha is not saved, so that an adapter comes back with another strength."""
    _in_files(lambda settings, tensors: settings.update(lora_alpha=float(str(settings["r"]))))


@fault("A181", "adapter.missing_keys_tolerated", "PEFT #2118, mlx-lm #1727", backends=("reference",))
@in_place_of("read_adapter", reference)
def _missing_keys_tolerated(right: Reading, weights: Weights, layers: Layers, folder: Path) -> ReferenceAdapter:
    """Tensors that are missing or have other names are passed over, and stay as they begin."""
    try:
        return right(weights, layers, folder)
    except ModelError:
        target = read_settings(folder, transposed=False)
        return files.draw_adapter(weights, layers, target, np.random.Generator(np.random.PCG64(0)))


@fault("A181b", "adapter.shapes_tolerated", "PEFT #2084", backends=("reference",))
def _shapes_tolerated() -> None:
    """A tensor of another shape than the model needs is cut to it."""

    def check(right: Callable[..., None], saved: Sizes, expected: Sizes, folder: Path) -> None:
        right({name: expected.get(name, shape) for name, shape in saved.items()}, expected, folder)

    def read(right: Reading, weights: Weights, layers: Layers, folder: Path) -> ReferenceAdapter:
        adapter = right(weights, layers, folder)
        kind = kind_of(adapter.target)
        cut: dict[str, dict[str, Array]] = {}
        for path, parts in adapter.layers.items():
            shapes = kind.shapes(adapter.target, path, *layers[path])
            cut[path] = {key: parts[key][tuple(map(slice, size))] for key, size in shapes.items()}
        return replace(adapter, layers=cut)

    plant(files, "check_tensor_shapes", check)
    plant(reference, "read_adapter", read)


@fault("A182", "adapter.flag_ignored_at_serve", "mlx-lm #1249")
def _adapter_ignored() -> None:
    """An adapter is named and the base answers."""
    plant_session("load_adapter", lambda right, session, folder: None)


@fault("A184", "adapter.extra_modules_lost", "PEFT #762, #1457")
@planted_by(_in_files)
def _extra_modules_lost(settings: dict[str, object], tensors: dict[str, Tensor]) -> None:
    """Modules that were trained whole beside the adapter are not saved."""
    settings["modules_to_save"] = None
    _keep(tensors, lambda name: "lora_" in name)


@fault("A087", "tok.control_tokens_untrained", "torchtune #2429, unsloth #915, LLaMA-Factory #2684")
@in_place_of("choose_rows", prepare)
def _tokens_stay(right: Callable[..., Rows], *given: object) -> Rows:
    """Tokens that are to be learned keep the rows that they had."""
    return {}


@fault("A087b", "tok.whole_table_trained")
@in_place_of("choose_rows", prepare)
def _all_rows_move(right: Callable[..., Rows], shape: ModelShape, *given: object) -> Rows:
    """With the tokens that are to be learned all others are."""
    return {table: tuple(range(shape.vocab_size)) for table in right(shape, *given)}


@fault("A189", "adapter.wrong_base_accepted", "vllm #34186, #55193", backends=("reference", "mlx"))
def _wrong_base_accepted() -> None:
    """What an adapter holds for layers that the base has not is dropped without a word."""

    def check(right: Callable[..., None], saved: Sizes, expected: Sizes, folder: Path) -> None:
        right({name: shape for name, shape in saved.items() if name in expected}, expected, folder)

    files_here = import_module(f"finetune.backends.{backend_under_judgement()}.adapter")
    plant(files_here, "check_tensor_shapes", check)


@fault("A190", "adapter.requires_grad_coupled", "PEFT #2765")
@planted_by(plant_session, "load_adapter")
def _loaded_is_trainable(right: Callable[..., None], session: Session, folder: Path) -> None:
    """An adapter that is loaded to answer with can be trained."""
    right(session, folder)
    thaw(session)


@fault("A192", "adapter.save_only_flag", "torchtune #1764")
def _stale_names() -> None:
    """What is saved of an adapter is filtered by names that are out of date."""
    _in_files(lambda settings, tensors: _keep(tensors, lambda name: ".mlp." not in name))


@fault("A193", "adapter.saved_in_half")
@planted_by(_in_files)
def _saved_in_half(settings: dict[str, object], tensors: dict[str, Tensor]) -> None:
    """An adapter is saved in half precision and comes back rounded."""
    for name, tensor in tensors.items():
        tensors[name] = tensor.astype(np.float16).astype(tensor.dtype)


@fault("A088", "tok.new_rows_misplaced", "LLaMA-Factory #10547")
@in_place_of("choose_rows", prepare)
def _other_rows_move(right: Callable[..., Rows], *given: object) -> Rows:
    """The rows that are learned are those beside the rows of the tokens that are to be."""
    return {table: tuple(row - 1 for row in rows) for table, rows in right(*given).items()}


@fault("A194", "adapter.saved_empty", "PEFT #2500, accelerate #3508")
@planted_by(_in_files)
def _saved_empty(settings: dict[str, object], tensors: dict[str, Tensor]) -> None:
    """Every tensor of an adapter is there, and its numbers lay in another process: all are zero."""
    for tensor in tensors.values():
        tensor[...] = 0


@fault("A195", "adapter.names_a_place")
def _names_a_place() -> None:
    """An adapter says where on this machine its base lies."""
    session = import_module(f"finetune.backends.{backend_under_judgement()}.session")
    plant(session, "public_name", lambda right, location: str(location.folder))
    plant(saved, "without_places", lambda right, content, base="": content)
