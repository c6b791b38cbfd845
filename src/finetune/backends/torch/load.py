"""Loads a model with transformers, every weight from its files; foreign exceptions become ours here."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from finetune.backends.torch.device import is_exhausted
from finetune.backends.torch.packed import quantizing, take_over
from finetune.backends.torch.recompute import give_back_large
from finetune.errors import ModelError, OutOfMemoryError
from finetune.models.shape import read_config, read_shape, weight_files
from finetune.records import ModelLocation, Quantization

_CHOSEN = ("attn_implementation", "experts_implementation")
_OWN_KERNELS = (None, "eager", "sdpa")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(location: ModelLocation, dtype: str, quantize: Quantization | None = None) -> Any:
    """The causal language model in `location`, every weight read from its files and none made up.

    `quantize` says how to quantise its matrices as they are read.

    Raises:
        ModelError: as `TorchBackend.open`.
    """
    owner = f"model {location.name!r} in {location.folder}"
    config = read_config(location.folder)
    _refuse_unknown(config, owner)
    _refuse_kernels(config, owner)
    _refuse_other_weights(location.folder, config, owner)
    packing: dict[str, Any] = {}
    if quantize is not None:
        # Else what each full matrix leaves lies between packed ones: 0.25 GB more at the peak with SmolLM2.
        give_back_large()
        how = quantizing(location.folder, quantize, _DTYPES[dtype], owner)
        packing = {"quantization_config": how, "device_map": {"": "cpu"}}
    try:
        # Said outright: left open, transformers asks whoever is at the keyboard whether to run the model's own code.
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            location.folder,
            dtype=_DTYPES[dtype],
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            **packing,
        )
    except Exception as error:  # what a model's files say can go wrong inside transformers in any way
        if is_exhausted(error):
            raise OutOfMemoryError(
                f"out of memory while {owner} was loaded: {next(iter(str(error).splitlines()), '')}",
                hint="use a smaller model, or set model.dtype to bfloat16",
            ) from None
        # Where settings do not go together its first line names its own check; what that found is the cause.
        cause = error.__cause__ or error
        told = "" if isinstance(cause, KeyError) else str(cause).strip()
        raise ModelError(
            f"{owner} cannot be loaded: {told.splitlines()[0] if told else repr(cause)}",
            hint="check that it is a causal language model whose weights and config.json are complete",
        ) from None
    _refuse_misfits(location, info, owner)
    if quantize is not None:
        take_over(model, location.folder, quantize, owner)
    _fuse_activations(model)
    _train_every_word(model)
    return model


def _refuse_misfits(location: ModelLocation, info: Mapping[str, Any], owner: str) -> None:
    """Refuse weights that are not the model's own, each in its shape, by what transformers tells of having read them.

    Raises:
        ModelError: as said.
    """
    if wrong := sorted(info["mismatched_keys"]):
        name, found, wanted = wrong[0]
        raise ModelError(
            f"{owner} cannot be loaded: {name} is {tuple(found)}, its config says {tuple(wanted)}",
            hint="get the model's files again",
        )
    if lacking := sorted(info["missing_keys"]):
        raise ModelError(
            f"model {location.name!r} lacks {len(lacking)} weights, among them {lacking[0]}; they would be random",
            hint="get the model's weights again",
        )
    if unknown := sorted(info["unexpected_keys"] & read_shape(location.folder).weights.keys()):
        raise ModelError(
            f"{owner} cannot be loaded: as its config.json has it, the model has no place for {len(unknown)} of its "
            f"weights, first {unknown[0]}",
            hint="get the model's files again: what has no place would be left out in silence",
        )


def _refuse_unknown(config: Mapping[str, object], owner: str) -> None:
    """Refuse an architecture that transformers does not know itself.

    Raises:
        ModelError: as said; code that a model brings along is never run.
    """
    kind, known = config.get("model_type"), list(transformers.CONFIG_MAPPING)
    if kind in known:
        return
    own = "; it brings code of its own, and that is never run" if config.get("auto_map") else ""
    near = difflib.get_close_matches(str(kind), known, n=6, cutoff=0.0)
    raise ModelError(
        f"{owner} is of an architecture that transformers does not know: model_type {kind!r} in its config.json{own}",
        hint=f"upgrade transformers, or use one of its {len(known)} kinds, of which the nearest by name are: "
        + ", ".join(near),
    )


def _refuse_kernels(config: Mapping[str, object], owner: str) -> None:
    """Refuse a config that chooses what computes its layers: by a name on the hub it would be code from there.

    Raises:
        ModelError: it, or a part of it, names another implementation than transformers' own.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_kernels(value, owner)
        if key.lstrip("_").startswith(_CHOSEN) and value not in _OWN_KERNELS:
            raise ModelError(
                f"{owner} has {key} {value!r} in its config.json, which this backend does not run",
                hint=f"take {key} out of it: what computes attention is no property of the weights",
            )


def _refuse_other_weights(folder: Path, config: Mapping[str, object], owner: str) -> None:
    """Refuse weights that transformers would read and nobody else, or that lie outside the folder.

    Raises:
        ModelError: as `weight_files`, or the config names a file of its own.
    """
    weight_files(folder)
    if (named := config.get("transformers_weights")) is not None:
        raise ModelError(
            f"{owner} names weights for transformers alone in its config.json: transformers_weights {named!r}",
            hint="call the file model.safetensors, and take that setting out",
        )


def _train_every_word(model: Any) -> None:
    """Let the word that pads be trained like any other where rows really hold it, as when it ends them too.

    As padding it has no loss and is never seen, and so no gradient anyway.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def _fuse_activations(model: Any) -> None:
    """Compute GPT-2's GELU in one kernel: the same formula, without keeping its five intermediate results."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
