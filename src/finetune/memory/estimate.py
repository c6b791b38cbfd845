"""Counts the bytes that a run is certain to need, part by part, from the model's shape alone."""

import math
from dataclasses import dataclass

from finetune.models.quantize import packed_bytes
from finetune.records import AdapterTarget, LinearLayer, ModelShape

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
"""Bytes of one number by its format; the reference backend computes in float64."""
ADAPTER_BYTES = BYTES["float32"]
"""An adapter is trained in float32 at least, whatever the format of the base."""
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
    """How many numbers are trained: rank x (inputs + outputs) for each adapted layer, with DoRA its outputs again, and
    every weight of a module that is trained whole.
    """
    return lora_parameters(shape, target) + _saved(shape, target)


def lora_parameters(shape: ModelShape, target: AdapterTarget) -> int:
    """The numbers of the adapter proper, which are float32 at least."""
    hit = [layer for layer in shape.linear_layers if layer.name.rsplit(".", 1)[-1] in target.modules]
    pairs = sum(target.rank_of(layer.name) * sum(layer.shape) for layer in hit)
    if target.kind == "lora":
        return pairs
    return pairs + sum(outputs(shape, layer) for layer in hit)


def outputs(shape: ModelShape, layer: LinearLayer) -> int:
    """How many numbers a layer writes for each token."""
    return layer.shape[shape.transposed]


def _saved(shape: ModelShape, target: AdapterTarget) -> int:
    """The numbers of modules that are trained whole: copies in the format of the base."""
    names = [name for name in shape.weights if name.rpartition(".")[0] in target.saved]
    return sum(math.prod(shape.weights[name]) for name in names)


def weight_bytes(shape: ModelShape, dtype: str) -> int:
    """What the base's weights take: what is quantised in its bits with scales and biases in `dtype`, the rest in that.

    Source: `mlx.core.quantize`.
    """
    sizes = {path: math.prod(shape.weights[f"{path}.weight"]) for path in shape.quantized}
    packed = sum(packed_bytes(how, sizes[path], BYTES[dtype]) for path, how in shape.quantized.items())
    return packed + (shape.parameters - sum(sizes.values())) * BYTES[dtype]


def estimate_memory(shape: ModelShape, target: AdapterTarget | None, dtype: str) -> Estimate:
    """The exact parts for LoRA with `target`, or for full fine-tuning where `target` is None.

    An adapter is trained in float32 at least, whatever the dtype of the base; a full fine-tune in the dtype of the
    weights.
    """
    size = BYTES[dtype]
    trainable = shape.parameters if target is None else adapter_parameters(shape, target)
    trained = trainable * size
    if target is not None:
        trained = lora_parameters(shape, target) * max(size, ADAPTER_BYTES) + _saved(shape, target) * size
    return Estimate(
        weights=weight_bytes(shape, dtype),
        adapter=0 if target is None else trained,
        gradients=trained,
        optimizer=trained * _MOMENTS,
        trainable_parameters=trainable,
    )
