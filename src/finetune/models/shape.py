"""Reads a model's shape from its config and the headers of its safetensors files, without loading a weight."""

import math
import os
import re
from pathlib import Path
from typing import Any

from finetune.errors import ModelError
from finetune.models.quantize import read_quantized, unpacked
from finetune.reading import check_regular, read_json
from finetune.records import NO_LIMIT, LinearLayer, ModelShape

_TABLES = re.compile(r"embed.*|wte|wpe|lm_head|output")
"""Names of embedding tables and output heads, which LoRA leaves alone unless they are named."""
_HEADS = {"lm_head", "embed_out", "output"}
"""Names of output heads."""


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`: sizes from `config.json`, exact tensor shapes from the weights' headers.

    Raises:
        ModelError: a file is missing, cut off or corrupt, and is named; the config says more layers than there are
            weights for; or the model is quantised as none is read here.
    """
    config = read_config(folder)
    tensors = read_tensor_shapes(folder)
    quantized = read_quantized(config, tensors, str(folder))
    tensors = unpacked(tensors, quantized)
    linear = [
        LinearLayer(name.removesuffix(".weight"), (shape[0], shape[1]))
        for name, shape in sorted(tensors.items())
        if len(shape) == 2 and name.endswith(".weight") and not any(map(_TABLES.fullmatch, name.split(".")))
    ]
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else config.get("model_type", "unknown")
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    heads = _first(text, "num_attention_heads", "n_head", "num_heads")
    said = config.get("tie_word_embeddings")
    tied = said if isinstance(said, bool) else not any(is_head(name) for name in tensors)
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers")
    if layers > len(tensors):  # else whoever builds it would be at it for as long as the number is large
        raise ModelError(
            f"{folder}: its config.json says {layers:,} layers, and its files hold {len(tensors):,} weights in all",
            hint="get the model again",
        )
    weights = {name: shape for name, shape in tensors.items() if not _is_extra(name, shape, tied=tied)}
    return ModelShape(
        architecture=str(architecture),
        parameters=sum(math.prod(shape) for shape in weights.values()),
        vocab_size=_first(text, "vocab_size"),
        hidden_size=hidden,
        layers=layers,
        context_length=_first(text, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len") or NO_LIMIT,
        linear_layers=tuple(linear),
        heads=heads,
        kv_heads=_first(text, "num_key_value_heads", "num_kv_heads") or heads,
        head_dim=_first(text, "head_dim") or (hidden // heads if heads > 0 else 0),
        intermediate_size=_first(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        tied_head=tied,
        attention_dropout=_share(text, "attention_dropout", "attn_pdrop"),
        hidden_dropout=_share(text, "resid_pdrop", "hidden_dropout"),
        weights=weights,
        quantized={path: how for path, how in quantized.items() if f"{path}.weight" in weights},
    )


def read_tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the folder's safetensors files, read from their headers.

    Raises:
        ModelError: a file is cut off or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            check_regular(file)
            with safe_open(file, framework="np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is corrupt or cut off: {error}", hint="get the model's weights again") from None
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those its index names, or all of them.

    Raises:
        ModelError: there is none, the index is broken or names a file outside the folder or one that is missing, a
            file is a link that leads out of the folder, or the index passes over `model.safetensors`.
    """
    single, indexed = folder / "model.safetensors", indexed_files(folder)
    files = indexed or ([single] if single.exists() else sorted(folder.glob("*.safetensors")))
    if not files:
        raise ModelError(f"{folder} holds no .safetensors weights", hint="get the model again")
    if single.exists() and files != [single]:
        raise ModelError(
            f"{folder} holds model.safetensors, and model.safetensors.index.json names other files: transformers would "
            "read the one, other programs the others",
            hint="remove what is not the model",
        )
    for file in files:
        refuse_leading_out(file)
    return files


def refuse_leading_out(file: Path) -> None:
    """Refuse a link to itself or out of its folder; the hub's own cache keeps what a snapshot names in `blobs`."""
    folder, found = file.parent.resolve(), Path(os.path.realpath(file))  # unlike Path, it takes a link to itself
    if found.is_symlink():
        raise ModelError(f"{file} is a link that leads to itself", hint="put the file itself into the folder")
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not (found.is_relative_to(folder) or found.is_relative_to(blobs)):
        raise ModelError(
            f"{file} is a link that leads out of its folder, to {found}", hint="put the file itself into the folder"
        )


def indexed_files(folder: Path) -> list[Path]:
    """The files that an index names; empty without an index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is broken: {error}", hint="get the model again") from None
    if not names:
        raise ModelError(f"{index} is broken: it names no file", hint="get the model again")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise ModelError(f"{index} names {name!r}, which is not a plain file name", hint="do not use this model")
        if not os.path.isfile(folder / name):  # unlike Path, it takes names that no file can have
            raise ModelError(f"{index} names {name}, which is missing", hint="get the model again")
    return [folder / name for name in names]


def read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
        ModelError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="get the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold an object", hint="get the model again")
    return value


def token_tables(shape: ModelShape) -> list[str]:
    """The names of the tables with a row for each token: the embedding first, then the head where it is one of its own.

    Raises:
        ModelError: it cannot be told which they are, or the head has a bias, which has no rows.
    """
    tables = [name for name, size in shape.weights.items() if len(size) == 2 and size[0] == shape.vocab_size]
    own = [name for name in tables if any(map(_TABLES.fullmatch, name.split("."))) and not is_head(name)]
    embeddings = [name for name in own if "wpe" not in name and "pos" not in name]
    heads = [name for name in tables if is_head(name)]
    if len(embeddings) != 1 or len(heads) != (0 if shape.tied_head else 1):
        raise ModelError(
            f"{shape.architecture}: it cannot be told which of its weights are the embedding and the output head, so "
            "no tokens can be added",
            hint="use a model of another family, or add the tokens with its own tools",
        )
    biases = [name for name in shape.weights if name.endswith(".bias") and is_head(name.removesuffix(".bias"))]
    if biases:
        raise ModelError(
            f"{shape.architecture} has {biases[0]}, which PEFT leaves out where it trains rows of the head",
            hint="leave out new tokens, or use a model of another family",
        )
    return [*embeddings, *heads]


def is_head(name: str) -> bool:
    """Whether a weight or a module of this name is an output head."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1] in _HEADS


def _is_extra(name: str, shape: tuple[int, ...], *, tied: bool) -> bool:
    """Whether a tensor is no weight: a tied head saved twice, or a mask or frequency that old files carry."""
    is_mask = name.endswith(".bias") and len(shape) == 4
    return is_mask or name.endswith((".masked_bias", ".inv_freq")) or (tied and is_head(name))


def _share(config: dict[str, object], *keys: str) -> float:
    """The first of these fields that is a share from 0 to below 1; 0 without one."""
    said = (config.get(key) for key in keys)
    return next((float(value) for value in said if isinstance(value, int | float) and 0 <= value < 1), 0.0)


def _first(config: dict[str, object], *keys: str) -> int:
    said = (config.get(key) for key in keys)
    return next((int(value) for value in said if isinstance(value, int) and value > 0), 0)
