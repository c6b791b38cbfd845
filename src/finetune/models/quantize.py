"""Quantised bases: how their files say so, the true shapes behind packed ones, and what of a full base is quantised.

mlx-lm packs a matrix W (outputs x inputs) into whole numbers of 32 bits, `W.weight`, and keeps a scale and a bias of
each group of a row in `W.scales` and `W.biases`; `quantization` in `config.json` says how, and of which matrices
otherwise.

Source: `mlx.core.quantize`, and `load_model` and `quantize_model` of mlx-lm (`utils.py`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune.errors import ModelError
from finetune.records import ModelShape, Quantization

_WORD = 32
"""Bits of one of the whole numbers that matrices are packed into."""
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
SETTINGS = ("quantization", "quantization_config")
"""Where a config says that its model is quantised: mlx-lm's place, and that of all others, where mlx-lm repeats it."""
_FULL = "use the full model that it was made from; with backend: mlx, model.quantize quantises that as it is loaded"


def read_quantized(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], owner: str
) -> dict[str, Quantization]:
    """How each quantised module of a model is held, by the module's path; empty for a full model.

    Args:
        shapes: those of all tensors in the model's files, packed as they are.

    Raises:
        ModelError: the model is quantised in another way than mlx-lm's own, or its files do not bear out its config.
    """
    told = config.get(SETTINGS[0])
    if not told:
        if other := config.get(SETTINGS[1]):
            method = other.get("quant_method") if isinstance(other, dict) else None
            raise ModelError(
                f"{owner} is quantised by {method or 'a method that its config does not name'}; "
                "this version trains on full weights and, through MLX, on those that mlx-lm has quantised",
                hint=_FULL,
            )
        return {}
    paths = [name.removesuffix(".scales") for name in shapes if name.endswith(".scales")]
    found = {path: _one(told, path, owner) for path in paths if f"{path}.weight" in shapes}
    if not found:
        raise ModelError(
            f"{owner}: config.json says that the model is quantised, but none of its weights is", hint="get it again"
        )
    if config.get("model_type") == "gpt2":
        raise ModelError(
            f"{owner} is a GPT-2 that mlx-lm has quantised, in another form than transformers keeps one: an adapter "
            "for it would fit nothing else",
            hint=_FULL,
        )
    for path, how in found.items():
        packed, scales = shapes[f"{path}.weight"], shapes[f"{path}.scales"]
        groups = packed[-1] * _WORD / (how.bits * how.group_size) if packed else 0.5
        if scales != (*packed[:-1], groups):
            raise ModelError(
                f"{owner}: {path} is packed as {packed} with scales {scales}, which are not {how.bits} bits in groups "
                f"of {how.group_size} as config.json has it",
                hint="get the model's files again",
            )
    return found


def _one(told: Any, path: str, owner: str) -> Quantization:
    """How one module is quantised: as the config says of its path, or else of all."""
    own = told.get(path, told) if isinstance(told, dict) else None
    said = own if isinstance(own, dict) else {}
    bits, group, mode = said.get("bits"), said.get("group_size"), said.get("mode", "affine")
    whole = type(bits) is int and type(group) is int
    if not whole or bits not in _BITS or group not in _GROUPS or mode != "affine":
        raise ModelError(
            f"{owner}: config.json says of {path} bits {bits!r}, group_size {group!r}, mode {mode!r}; read are bits of "
            f"{', '.join(map(str, _BITS))}, a group_size of {', '.join(map(str, _GROUPS))}, and mode 'affine'",
            hint=_FULL,
        )
    return Quantization(bits, group)


def unpacked(
    shapes: Mapping[str, tuple[int, ...]], quantized: Mapping[str, Quantization]
) -> dict[str, tuple[int, ...]]:
    """The shapes that the weights of a model had before they were quantised, scales and biases left out."""
    true = {
        f"{path}.weight": (*shapes[f"{path}.weight"][:-1], shapes[f"{path}.scales"][-1] * how.group_size)
        for path, how in quantized.items()
    }
    parts = {f"{path}.{part}" for path in quantized for part in ("scales", "biases")}
    return {name: true.get(name, shape) for name, shape in shapes.items() if name not in parts}


def quantize_shape(shape: ModelShape, how: Quantization, owner: str) -> ModelShape:
    """The shape with every matrix quantised whose rows divide into groups, as mlx-lm does it: tables and head as well.

    Raises:
        ModelError: the model is quantised already, or no matrix divides.
    """
    if shape.quantized:
        raise ModelError(
            f"model.quantize is {how.bits}bit, but {owner} is quantised already, {say_quantized(shape)}",
            hint="leave out model.quantize, or name the full model that it was made from",
        )
    matrices = _matrices(shape)
    paths = [path for path, inputs in matrices.items() if inputs % how.group_size == 0]
    if not paths:
        fitting = [size for size in _GROUPS if any(inputs % size == 0 for inputs in matrices.values())]
        raise ModelError(
            f"model.quantize: no matrix of {owner} has rows that divide into groups of {how.group_size}",
            hint=f"set model.quantize_group_size to {max(fitting)}" if fitting else "leave out model.quantize",
        )
    return replace(shape, quantized=dict.fromkeys(paths, how))


def packed_bytes(how: Quantization, count: int, size: int) -> int:
    """What so many quantised numbers weigh, whose scales and biases take `size` bytes each."""
    return count * how.bits // 8 + 2 * size * (count // how.group_size)


def kept_in_full(shape: ModelShape) -> list[str]:
    """The modules of a quantised model whose matrices are not quantised."""
    return [path for path in _matrices(shape) if path not in shape.quantized]


def say_quantized(shape: ModelShape) -> str:
    """How a quantised model is held: "4 bits in groups of 64", or each way with the number of its matrices."""
    ways = [*shape.quantized.values()]
    words = {how: f"{how.bits} bits in groups of {how.group_size}" for how in ways}
    if len(words) == 1:
        return words[ways[0]]
    return ", ".join(f"{ways.count(how)} matrices in {text}" for how, text in words.items())


def refuse_quantized(config: Mapping[str, Any], how: Quantization | None, backend: str, owner: str) -> None:
    """Refuse, for a backend that trains on full weights only, a base that is quantised or is to be.

    Raises:
        ModelError: it is.
    """
    if how is not None or any(config.get(name) for name in SETTINGS):
        raise ModelError(
            f"{owner} {'is to be' if how else 'is'} quantised, but the {backend} backend trains on full weights only: "
            "this version trains on quantised ones through MLX, and has no bitsandbytes",
            hint="use backend: mlx, or the full model and no model.quantize",
        )


def _matrices(shape: ModelShape) -> dict[str, int]:
    """By module, how many numbers a row of its matrix has as MLX holds it."""
    transposed = {layer.name for layer in shape.linear_layers} if shape.transposed else set()
    found = {name.removesuffix(".weight"): size for name, size in shape.weights.items() if name.endswith(".weight")}
    return {path: size[0 if path in transposed else -1] for path, size in found.items() if len(size) > 1}
