"""Quantised bases, each scheme in one description: how files say so, what is quantised, what it weighs.

To add a scheme: its `Scheme` here, its name in `abilities` for the backends that can load or make it, how they do that
in their own `load.py`, and how they give the full weights that it stands for when a model is saved.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from finetune.abilities import ABILITIES, QUANTISING
from finetune.errors import MissingExtraError, ModelError, install_line
from finetune.records import ModelShape, Quantization

Shapes = Mapping[str, tuple[int, ...]]
SETTINGS = ("quantization", "quantization_config")
"""Where a config says that its model is quantised: mlx-lm's place, and that of all others, where mlx-lm repeats it."""
_FULL = (
    "use the full model that it was made from; "
    f"with backend: {QUANTISING}, model.quantize quantises that as it is loaded"
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantise.

    Attributes:
        by: who quantises so, for messages.
        divides: whether a matrix whose rows have so many numbers is quantised, when a full model is.
        groups: the sizes of groups to choose from; none where a whole row is one.
        packed_bytes: what a matrix of so many rows and columns weighs on a base whose other weights take so many bytes
            each.
        tables: whether the embedding and the head are quantised, too.
        library: what has to be installed for it beside the backend; an extra of ours has its name.
        says: whether a config says that its model is quantised this way.
        read: how each quantised module is held, by its path, from a config and the shapes in the files; refuses files
            that do not bear out their config. None where files that are quantised so are not read.
        unpacked: the shapes that quantised matrices, by their paths, and all other weights had before.
    """

    by: str
    divides: Callable[[int, Quantization], bool]
    groups: tuple[int, ...]
    packed_bytes: Callable[[Quantization, int, int, int], int]
    tables: bool = False
    library: str = ""
    says: Callable[[Mapping[str, Any]], bool] = lambda config: False
    read: Callable[[Mapping[str, Any], Shapes, str], dict[str, Quantization]] | None = None
    unpacked: Callable[[Shapes, Mapping[str, Quantization]], dict[str, tuple[int, ...]]] = lambda shapes, quantized: {
        **shapes
    }


# mlx-lm's scheme: a matrix W (outputs x inputs) is packed into whole numbers of 32 bits, `W.weight`, with a scale and a
# bias of each group of a row in `W.scales` and `W.biases`; `quantization` in config.json says how, and of which
# matrices otherwise.
# Source: `mlx.core.quantize`, and `load_model` and `quantize_model` of mlx-lm (`utils.py`).
_WORD, F32 = 32, 4
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def _read_affine(config: Mapping[str, object], shapes: Shapes, owner: str) -> dict[str, Quantization]:
    told = config[SETTINGS[0]]
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


def _one(told: object, path: str, owner: str) -> Quantization:
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


def _unpacked_affine(shapes: Shapes, quantized: Mapping[str, Quantization]) -> dict[str, tuple[int, ...]]:
    true = {
        f"{path}.weight": (*shapes[f"{path}.weight"][:-1], shapes[f"{path}.scales"][-1] * how.group_size)
        for path, how in quantized.items()
    }
    parts = {f"{path}.{part}" for path in quantized for part in ("scales", "biases")}
    return {name: true.get(name, shape) for name, shape in shapes.items() if name not in parts}


def _divides(inputs: int, how: Quantization) -> bool:
    return inputs % how.group_size == 0


# bitsandbytes packs two numbers of 4 bits into a byte, with a scale in float32 for each 64 of them, one row after the
# other. Its kernels for the CPU put the scales of rows that 64 does not divide in the wrong places (0.50.2: 6 rows of
# 96, quantised and read back, were off by up to 1.4): such rows stay in full.
_BLOCKS = Scheme(
    by="bitsandbytes",
    divides=_divides,
    groups=(64,),
    packed_bytes=lambda how, rows, columns, size: rows * columns // 2 + F32 * (rows * columns // how.group_size),
    library="bitsandbytes",
)
SCHEMES: dict[str, Scheme] = {
    "affine": Scheme(
        by="mlx-lm",
        divides=_divides,
        groups=_GROUPS,
        packed_bytes=lambda how, rows, columns, size: (
            rows * columns * how.bits // 8 + 2 * size * (rows * columns // how.group_size)
        ),
        tables=True,
        says=lambda config: bool(config.get(SETTINGS[0])),
        read=_read_affine,
        unpacked=_unpacked_affine,
    ),
    "nf4": _BLOCKS,
    "fp4": _BLOCKS,
    # Of each number the sign and seven bits; each row has a scale in float32.
    "int8": replace(
        _BLOCKS,
        divides=lambda inputs, how: True,
        groups=(),
        packed_bytes=lambda how, rows, columns, size: rows * (columns + F32),
    ),
}
_USUAL_GROUP = 64
"""What model.quantize_group_size is where nobody has set it."""


def read_quantized(config: Mapping[str, object], shapes: Shapes, owner: str) -> dict[str, Quantization]:
    """How each quantised module of a model is held, by the module's path; empty for a full model.

    Args:
        shapes: those of all tensors in the model's files, packed as they are.

    Raises:
        ModelError: the model is quantised by no scheme that is known here, or its files do not bear out its config.
    """
    method = _method(config)
    if method is None:
        return {}
    read = SCHEMES[method].read if method in SCHEMES and SCHEMES[method].says(config) else None
    if read is None:
        known = ", ".join(
            f"with backend: {_backends(name)}, on those that {scheme.by} has quantised"
            for name, scheme in SCHEMES.items()
            if scheme.read
        )
        raise ModelError(
            f"{owner} is quantised by {method}; this version trains on full weights and, {known}", hint=_FULL
        )
    return read(config, shapes, owner)


def _backends(scheme: str) -> str:
    """Those that can train on what is quantised so, in words."""
    return " or ".join(name for name, able in ABILITIES.items() if scheme in able.schemes.values())


def _method(config: Mapping[str, object]) -> str | None:
    """The scheme, or else what the config calls its method; None for a full model."""
    if known := next((name for name, scheme in SCHEMES.items() if scheme.says(config)), None):
        return known
    if not (other := config.get(SETTINGS[1])):
        return None
    method = other.get("quant_method") if isinstance(other, dict) else None
    return str(method or "a method that its config does not name")


def refuse_schemes(config: Mapping[str, object], how: Quantization | None, backend: str, owner: str) -> None:
    """Refuse a base that is quantised, or is to be, by a scheme that a backend cannot train on.

    Raises:
        ModelError: it is.
        MissingExtraError: the library that quantises so is not installed.
    """
    able, method = [*ABILITIES[backend].schemes.values()], how.scheme if how else _method(config)
    if method is None:
        return
    if method not in able:
        ways = {name: "has quantised" if SCHEMES[name].read else "quantises as they are loaded" for name in able}
        others = dict.fromkeys(f" and on those that {SCHEMES[name].by} {said}" for name, said in ways.items())
        instead = _backends(method)
        raise ModelError(
            f"{owner} {'is to be' if how else 'is'} quantised, but the {backend} backend trains on full weights"
            f"{''.join(others) or ' only'}",
            hint=f"use backend: {instead}, or the full model and no model.quantize" if instead else _FULL,
        )
    library = SCHEMES[method].library
    if library and find_spec(library) is None:
        raise MissingExtraError(
            f"{owner} is to be quantised, and with backend: {backend} that needs {library}, which is not installed",
            hint=f"{install_line(library)}, or leave out model.quantize",
        )


def unpacked(shapes: Shapes, quantized: Mapping[str, Quantization]) -> dict[str, tuple[int, ...]]:
    """The shapes that the weights of a model had before they were quantised, scales and the like left out."""
    found = dict(shapes)
    for name in {how.scheme for how in quantized.values()}:
        found = SCHEMES[name].unpacked(found, {path: how for path, how in quantized.items() if how.scheme == name})
    return found


def quantize_shape(shape: ModelShape, how: Quantization, owner: str) -> ModelShape:
    """The shape with every matrix quantised that its scheme quantises.

    Raises:
        ModelError: the model is quantised already, or no matrix can be, or not in such groups.
    """
    matrices, scheme = _matrices(shape, tables=SCHEMES[how.scheme].tables), SCHEMES[how.scheme]
    if shape.quantized:
        raise ModelError(
            f"model.quantize is {how.bits}bit, but {owner} is quantised already, {say_quantized(shape)}",
            hint="leave out model.quantize, or name the full model that it was made from",
        )
    if how.group_size not in (scheme.groups or (_USUAL_GROUP,)):
        groups = (
            f"in groups of {', '.join(map(str, scheme.groups))}" if scheme.groups else "with one scale for each row"
        )
        raise ModelError(
            f"model.quantize_group_size is {how.group_size}, but {scheme.by} quantises to {how.scheme} {groups}",
            hint="leave out model.quantize_group_size",
        )
    paths = [path for path, (_, columns) in matrices.items() if scheme.divides(columns, how)]
    if not paths:
        sizes = [replace(how, group_size=size) for size in scheme.groups]
        fitting = [
            each.group_size for each in sizes if any(scheme.divides(columns, each) for _, columns in matrices.values())
        ]
        raise ModelError(
            f"model.quantize: no matrix of {owner} has rows that divide into groups of {how.group_size}",
            hint=f"set model.quantize_group_size to {max(fitting)}" if fitting else _without(how),
        )
    return replace(shape, quantized=dict.fromkeys(paths, how))


def _without(how: Quantization) -> str:
    """The way out where rows divide into no groups: whole rows, where the backend has a scheme for those."""
    words = [words for able in ABILITIES.values() if how.scheme in (words := able.schemes).values()]
    whole = [word for each in words for word, scheme in each.items() if not SCHEMES[scheme].groups]
    return f"set model.quantize to {whole[0]}, or leave it out" if whole else "leave out model.quantize"


def packed_bytes(shape: ModelShape, size: int) -> int:
    """What all quantised matrices of a model weigh if each of its other numbers takes `size` bytes."""
    matrices = _matrices(shape)
    return sum(SCHEMES[how.scheme].packed_bytes(how, *matrices[path], size) for path, how in shape.quantized.items())


def kept_in_full(shape: ModelShape) -> list[str]:
    """The modules of a quantised model whose matrices are not quantised."""
    return [path for path in _matrices(shape) if path not in shape.quantized]


def say_quantized(shape: ModelShape) -> str:
    """How a quantised model is held: "4 bits in groups of 64", or each way with the number of its matrices."""
    ways = [*shape.quantized.values()]
    words = {how: _say(how) for how in ways}
    if len(words) == 1:
        return words[ways[0]]
    return ", ".join(f"{ways.count(how)} matrices in {text}" for how, text in words.items())


def _say(how: Quantization) -> str:
    own = f" ({how.scheme})" if SCHEMES[how.scheme].library else ""
    return f"{how.bits} bits{own} " + (
        f"in groups of {how.group_size}" if SCHEMES[how.scheme].groups else "with one scale for each row"
    )


def _matrices(shape: ModelShape, *, tables: bool = True) -> dict[str, tuple[int, int]]:
    """By module, rows and columns of its matrix as MLX and bitsandbytes hold it; without `tables` those in blocks."""
    layers = {layer.name for layer in shape.linear_layers}
    found = {name.removesuffix(".weight"): size for name, size in shape.weights.items() if name.endswith(".weight")}
    matrices = {
        path: (math.prod(size[:-1]), size[-1])
        for path, size in found.items()
        if len(size) > 1 and (tables or path in layers)
    }
    return {path: size[::-1] if shape.transposed and path in layers else size for path, size in matrices.items()}
