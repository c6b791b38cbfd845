"""Counts the bytes that a run is certain to need, part by part, from the model's shape alone."""

import math
from dataclasses import dataclass

from finetune.adapters.kind import F32
from finetune.adapters.kinds import kind_of
from finetune.models.quantize import packed_bytes
from finetune.records import AdapterTarget, LinearLayer, ModelShape

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
"""Bytes of one number by its format; the reference backend computes in float64."""
_MOMENTS = 2
"""AdamW keeps two moments for each trainable number."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Exact parts, in bytes: what lives from one step to the next, and the gradients."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    trainable_parameters: int

    @property
    def total(self) -> int:
        """The sum of the parts above: a lower bound on the run's peak."""
        return self.weights + self.adapter + self.gradients + self.optimizer


def adapter_parameters(shape: ModelShape, target: AdapterTarget) -> int:
    """How many numbers are trained: those of each adapted layer, and every weight of a module that is trained whole."""
    return layer_parameters(shape, target) + _saved(shape, target)


def layer_parameters(shape: ModelShape, target: AdapterTarget) -> int:
    """The numbers of the adapter proper, beside its layers; they are float32 at least."""
    hit = [layer for layer in shape.linear_layers if target.adapts(layer.name)]
    sizes = (kind_of(target).shapes(target, layer.name, *sides(shape, layer)) for layer in hit)
    rows = sum(len(rows) for rows in target.rows.values()) * shape.hidden_size
    return rows + sum(math.prod(tensor) for tensors in sizes for tensor in tensors.values())


def sides(shape: ModelShape, layer: LinearLayer) -> tuple[int, int]:
    """How many numbers a layer writes for each token, and how many it reads."""
    outputs, inputs = layer.shape[::-1] if shape.transposed else layer.shape
    return outputs, inputs


def _saved(shape: ModelShape, target: AdapterTarget) -> int:
    """The numbers of modules that are trained whole: copies in the format of the base."""
    names = [name for name in shape.weights if name.rpartition(".")[0] in target.saved]
    return sum(math.prod(shape.weights[name]) for name in names)


def weight_bytes(shape: ModelShape, dtype: str) -> int:
    """What the base's weights take: what is quantised as its scheme has it, the rest in `dtype`."""
    quantized = sum(math.prod(shape.weights[f"{path}.weight"]) for path in shape.quantized)
    return packed_bytes(shape, BYTES[dtype]) + (shape.parameters - quantized) * BYTES[dtype]


def estimate_memory(shape: ModelShape, target: AdapterTarget | None, dtype: str) -> Estimate:
    """The exact parts for an adapter as in `target`, or for full fine-tuning where `target` is None.

    An adapter is trained in float32 at least, whatever the dtype of the base; a full fine-tune in the dtype of the
    weights.
    """
    size = BYTES[dtype]
    trainable = shape.parameters
    trained = trainable * size
    if target is not None:
        own, whole = layer_parameters(shape, target), _saved(shape, target)
        trainable, trained = own + whole, own * max(size, F32) + whole * size
    return Estimate(
        weights=weight_bytes(shape, dtype),
        adapter=0 if target is None else trained,
        gradients=trained,
        optimizer=trained * _MOMENTS,
        trainable_parameters=trainable,
    )
