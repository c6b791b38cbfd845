"""Quantised weights: layers of mlx-lm's whose matrices are packed, and the full weights that they stand for.

A packed layer has its matrix as whole numbers, with scales and biases beside it; it multiplies without unpacking, and
gradients go through it to what comes before. Nothing ever trains what is packed.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from finetune.backends.mlx.tensors import first_line
from finetune.errors import ModelError
from finetune.records import Quantization


def pack(model: Any, how: Quantization, owner: str) -> None:
    """Quantise every layer whose rows divide into groups, as `mlx_lm.convert -q` does; the others stay as they are.

    Raises:
        ModelError: mlx-lm quantises this architecture by rules of its own.
    """
    if getattr(model, "quant_predicate", None) is not None:
        raise ModelError(
            f"{owner}: mlx-lm quantises some layers of a {model.model_type} otherwise than the rest",
            hint="quantise it once with mlx_lm.convert -q, and name the folder that it writes as model.path",
        )

    def divides(path: str, module: Any) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % how.group_size == 0

    nn.quantize(model, how.group_size, how.bits, class_predicate=divides)


def pack_as_filed(model: Any, quantized: Mapping[str, Quantization], owner: str) -> None:
    """Make a new model's layers ready for packed weights, those by these paths; the weights are yet to be set.

    Raises:
        ModelError: the rows of one do not divide into its groups.
    """

    def settings(path: str, module: Any) -> Any:
        how = quantized.get(path)
        return {"group_size": how.group_size, "bits": how.bits} if how and hasattr(module, "to_quantized") else False

    try:
        nn.quantize(model, class_predicate=settings)
    except ValueError as error:
        raise ModelError(
            f"{owner} is not quantised as its config has it: {first_line(error)}", hint="get the model's files again"
        ) from None


def is_packed(module: Any) -> bool:
    """Whether a layer's matrix is packed."""
    return "scales" in module


def full_weight(module: Any) -> mx.array:
    """A layer's matrix (outputs, inputs), unpacked where it is packed; nothing is computed until it is asked for."""
    if not is_packed(module):
        return module.weight
    return mx.dequantize(
        module.weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits, mode=module.mode
    )


def packed_layers(model: Any) -> dict[str, Any]:
    """Every layer whose matrix is packed, by its path in the model as it is, adapters included."""
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: module for path, module in leaves if is_packed(module)}


def in_full(model: Any, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Tensors of the model by their places, packed ones replaced by the full weights that they stand for."""
    layers = packed_layers(model)
    full = {f"{path}.weight": full_weight(layer) for path, layer in layers.items()}
    parts = {f"{path}.{part}" for path in layers for part in ("scales", "biases")}
    return {place: full.get(place, tensor) for place, tensor in tensors.items() if place not in parts}


@contextlib.contextmanager
def in_float64(model: Any) -> Iterator[Any]:
    """Within this context the model computes in float64, what is packed from the full weights that it stands for."""
    packed = packed_layers(model)
    model.update_modules(tree_unflatten([(path, _unpacked(layer)) for path, layer in packed.items()]))
    own = tree_flatten(model.parameters())
    wide = [(place, each.astype(mx.float64)) for place, each in own if mx.issubdtype(each.dtype, mx.floating)]
    model.load_weights(wide, strict=False)
    try:
        yield model
    finally:
        model.load_weights(own, strict=False)
        model.update_modules(tree_unflatten(list(packed.items())))


def _unpacked(layer: Any) -> Any:
    """A layer that is not packed and computes the same."""
    plain = nn.Embedding(1, 1) if hasattr(layer, "as_linear") else nn.Linear(1, 1, bias="bias" in layer)
    plain.weight = full_weight(layer)
    if "bias" in layer:
        plain.bias = layer.bias
    return plain
