"""Makes mlx-lm's models from transformers' files: every weight from the files, no setting passed over in silence."""

import difflib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from finetune.backends.mlx.names import WeightNames, for_mlx_lm
from finetune.backends.mlx.packed import pack, pack_as_filed
from finetune.backends.mlx.tensors import DTYPES, first_line, read_tensors
from finetune.errors import ModelError
from finetune.models.quantize import SETTINGS, quantize_shape
from finetune.models.shape import read_config, read_shape, weight_files
from finetune.records import NO_LIMIT, ModelLocation, Quantization

_HINT = "use the torch backend for this model"
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
_COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    **{name: {"hidden_act": ("silu", "swish")} for name in _LLAMAS},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    },
}
"""Settings that mlx-lm does not read, and the values that it computes with all the same."""
_LEFT_OUT: dict[str, dict[str, Any]] = {
    **{name: {"rms_norm_eps": 1e-6, "hidden_act": "silu"} for name in _LLAMAS},
    "gpt2": {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
}
"""What transformers takes for settings that a config leaves out and that mlx-lm demands."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model of mlx-lm's at rest, with the names of its weights.

    `vocab_size` and `context`: how many tokens it knows and takes; `config`: transformers' own, that of a full model.
    """

    model: Any
    dtype: str
    vocab_size: int
    context: int
    names: WeightNames
    config: dict[str, Any]


def load_model(location: ModelLocation, dtype: str, quantize: Quantization | None = None) -> Loaded:
    """The model in a folder, every weight read from its files and none made up, in float32 or bfloat16.

    What its files hold quantised stays so to the bit, with scales and biases in `dtype`; `quantize` says how to
    quantise a full model.

    Raises:
        ModelError: mlx-lm does not know the architecture or computes it otherwise, a file is missing or corrupt, a
            weight is missing, unknown or of another shape, or the model is quantised in another way or cannot be.
    """
    owner = f"model {location.name!r} in {location.folder}"
    shape = read_shape(location.folder)
    if quantize:
        quantize_shape(shape, quantize, owner)
    config = {key: value for key, value in read_config(location.folder).items() if key not in SETTINGS}
    model = build_model(config, owner, tied=shape.tied_head)
    pack_as_filed(model, shape.quantized, owner)
    weights: dict[str, mx.array] = {}
    for file in weight_files(location.folder):
        weights |= read_tensors(file, owner)
    names = WeightNames(str(config["model_type"]), frozenset(weights))
    put_weights(model, names, weights, owner)
    keep = getattr(model, "cast_predicate", lambda name: True)
    cast = [
        (name, tensor.astype(DTYPES[dtype]))
        for name, tensor in tree_flatten(model.parameters())
        if keep(name) and mx.issubdtype(tensor.dtype, mx.floating)
    ]
    model.load_weights(cast, strict=False)
    if quantize:
        pack(model, quantize, owner)
    mx.eval(model.parameters())
    context = _context_length(shape.context_length, config, _classes(config, owner)[1])
    return Loaded(model, dtype, shape.vocab_size or NO_LIMIT, context, names, config)


def build_model(config: Mapping[str, object], owner: str, *, tied: bool) -> Any:
    """The model that a transformers config describes, its weights not yet set.

    Args:
        tied: whether the embedding is the output head, where the config does not say.

    Raises:
        ModelError: mlx-lm does not know the architecture, or computes it otherwise than the config has it.
    """
    model_class, args_class = _classes(config, owner)
    settings = _settings(config, args_class, owner, tied=tied)
    try:
        model = model_class(args_class.from_dict(settings))
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, ZeroDivisionError) as error:
        raise ModelError(f"{owner}: mlx-lm cannot build it: {first_line(error)}", hint=_HINT) from None
    model.eval()
    return model


def put_weights(model: Any, names: WeightNames, weights: Mapping[str, mx.array], owner: str) -> None:
    """Set every weight of the model to the one that transformers' files hold.

    Raises:
        ModelError: a weight is missing, unknown or of another shape; they are counted and the first is named.
    """
    given = for_mlx_lm(names.model_type, weights)
    try:
        given = model.sanitize(given) if hasattr(model, "sanitize") else given
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ModelError(f"{owner} lacks weights, among them {first_line(error)}", hint="get them again") from None
    wanted = dict(tree_flatten(model.parameters()))  # only now: a model may drop its head when the files hold none
    # A tied head that was saved twice is no weight of its own.
    given = {name: tensor for name, tensor in given.items() if name in wanted or not name.endswith("lm_head.weight")}
    lacking, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if lacking:
        raise ModelError(
            f"{owner} lacks {len(lacking)} weights, among them {names.shown(lacking[0])}",
            hint="get the model's weights again",
        )
    if unknown:
        raise ModelError(
            f"{owner} cannot be loaded: mlx-lm's {names.model_type} has no place for {len(unknown)} of its weights, "
            f"first {names.shown(unknown[0])}",
            hint=_HINT,
        )
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            raise ModelError(
                f"{owner} cannot be loaded: {names.shown(name)} is {given[name].shape}, its config says {tensor.shape}",
                hint="get the model's files again",
            )
        kind = given[name].dtype
        if not (kind == mx.uint32 if tensor.dtype == mx.uint32 else mx.issubdtype(kind, mx.floating)):
            told = "packed numbers" if tensor.dtype == mx.uint32 else "fractions"
            raise ModelError(f"{owner} cannot be loaded: {names.shown(name)} holds {kind}, no {told}", hint=_HINT)
    model.load_weights(list(given.items()))


def _classes(config: Mapping[str, object], owner: str) -> tuple[Any, Any]:
    from mlx_lm.utils import _get_classes

    name = config.get("model_type")
    if any(config.get(key) for key in SETTINGS):
        raise ModelError(f"{owner} is to be of full weights, and its config says that they are quantised", hint=_HINT)
    try:
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise ValueError(f"model type {name!r}")
        found: tuple[Any, Any] = _get_classes(dict(config))
    # Some of its files end the whole process where a library of theirs is missing.
    except (ValueError, AttributeError, TypeError, ImportError, SystemExit) as error:
        known = _known_kinds()
        near = difflib.get_close_matches(str(name), known, n=6, cutoff=0.0)
        raise ModelError(
            f"{owner} is of an architecture that mlx-lm does not know: {first_line(error)}",
            hint=f"use the torch backend, or one of mlx-lm's {len(known)} kinds, of which the nearest by name are: "
            + ", ".join(near),
        ) from None
    return found


def _known_kinds() -> list[str]:
    """Every architecture of mlx-lm's, by the name that a config calls it."""
    [folder] = importlib.import_module("mlx_lm.models").__path__
    return [path.stem for path in sorted(Path(folder).glob("*.py")) if "class Model(" in path.read_text("utf-8")]


def _settings(config: Mapping[str, object], args_class: Any, owner: str, *, tied: bool) -> dict[str, Any]:
    """The config as mlx-lm has to be told it, so that it computes what transformers does."""
    kind = str(config["model_type"])
    left_out = {"tie_word_embeddings": tied, **_LEFT_OUT.get(kind, {})}
    settings = left_out | {key: value for key, value in config.items() if value is not None}
    for key, values in _COMPUTED.get(kind, {}).items():
        if settings.get(key, values[0]) not in values:
            raise ModelError(f"{owner} has {key} {settings[key]!r}; mlx-lm computes {values[0]!r} only", hint=_HINT)
    width = settings.get("head_dim")
    if width and "head_dim" not in args_class.__dataclass_fields__:
        told = settings.get("hidden_size", 0), settings.get("num_attention_heads", 0)
        if width * told[1] != told[0]:
            raise ModelError(f"{owner} has head_dim {width}; mlx-lm computes {told[0]} / {told[1]} only", hint=_HINT)
    if kind == "gpt2":
        settings["n_ctx"] = settings.get("n_ctx", settings.get("n_positions"))
    return settings | _rope(settings, args_class, owner) | _window_pattern(settings, args_class, owner)


def _rope(settings: Mapping[str, object], args_class: Any, owner: str) -> dict[str, Any]:
    """RoPE's numbers where mlx-lm looks for them: newer files keep them all in `rope_parameters`.

    Most of its models read only `rope_theta` and `rope_scaling`; they would go on with the default base in silence.
    """
    rope = settings.get("rope_parameters")
    read = args_class.__dataclass_fields__
    if not rope or "rope_parameters" in read:
        return {}
    found: dict[str, Any] = {}
    scopes = {key: value for key, value in rope.items() if isinstance(value, dict)} if isinstance(rope, dict) else {}
    if scopes.keys() == {"full_attention", "sliding_attention"} and "rope_local_base_freq" in read:
        found["rope_local_base_freq"] = scopes.pop("sliding_attention").get("rope_theta")
    if scopes:
        rope = next(iter(scopes.values()))
    if not isinstance(rope, dict) or any(scope != rope for scope in scopes.values()):
        raise ModelError(
            f"{owner} has rope_parameters {settings['rope_parameters']!r}, which mlx-lm does not read", hint=_HINT
        )
    found |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    unread = sorted(key for key in found if key not in read)
    if unread:
        raise ModelError(f"{owner} has {unread[0]} {found[unread[0]]!r}, which mlx-lm does not read", hint=_HINT)
    return found


def _window_pattern(settings: Mapping[str, Any], args_class: Any, owner: str) -> dict[str, Any]:
    """Which layers see a window only: newer files list all of them, some of mlx-lm's models count every so many."""
    kinds, read = settings.get("layer_types"), args_class.__dataclass_fields__
    if not kinds or "layer_types" in read or "sliding_window_pattern" not in read:
        return {}
    every = [*kinds, "full_attention"].index("full_attention") + 1
    if [kind == "full_attention" for kind in kinds] != [place % every == 0 for place in range(1, len(kinds) + 1)]:
        raise ModelError(f"{owner} has layer_types {kinds!r}, which follow no pattern that mlx-lm reads", hint=_HINT)
    return {"sliding_window_pattern": every}


def _context_length(told: int, config: Mapping[str, Any], args_class: Any) -> int:
    """How many tokens the model takes: no more than a window of attention that mlx-lm lets it look beyond."""
    window, read = config.get("sliding_window"), args_class.__dataclass_fields__
    by_layer = "layer_types" in read and "layer_types" not in config  # it wants to be told which layers have it
    unread = "sliding_window" not in read or by_layer
    if isinstance(window, int) and unread and config.get("use_sliding_window", True):
        return min(told, window)
    return told


def linear_layers(model: Any) -> dict[str, Any]:
    """Every linear layer by mlx-lm's path, in the model's order."""
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: module for path, module in leaves if isinstance(module, (nn.Linear, nn.QuantizedLinear))}


def write_config(config: Mapping[str, object], folder: Path) -> None:
    """Write a transformers config."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
