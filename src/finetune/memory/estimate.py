"""Counts the bytes that a run is certain to need, part by part, from the model's shape alone."""

from dataclasses import dataclass

from finetune.records import AdapterTarget, ModelShape

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
    """How many numbers the adapter holds: rank x (inputs + outputs) for each adapted layer."""
    hit = [layer for layer in shape.linear_layers if layer.name.rsplit(".", 1)[-1] in target.modules]
    return sum(target.rank * sum(layer.shape) for layer in hit)


def estimate_memory(shape: ModelShape, target: AdapterTarget | None, dtype: str) -> Estimate:
    """The exact parts for LoRA with `target`, or for full fine-tuning where `target` is None.

    An adapter is trained in float32 at least, whatever the dtype of the base; a full fine-tune in the dtype of the
    weights.
    """
    size = BYTES[dtype]
    trainable = shape.parameters if target is None else adapter_parameters(shape, target)
    width = size if target is None else max(size, ADAPTER_BYTES)
    return Estimate(
        weights=shape.parameters * size,
        adapter=0 if target is None else trainable * width,
        gradients=trainable * width,
        optimizer=trainable * width * _MOMENTS,
        trainable_parameters=trainable,
    )
