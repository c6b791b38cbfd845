"""Says before a run which bytes it is certain to need, part by part, from the model's shape alone."""

from dataclasses import dataclass

from finetune.records import AdapterTarget, ModelShape

_BYTES = {"float32": 4, "bfloat16": 2}
_MOMENTS = 2
"""AdamW keeps two moments for each trainable number."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Exact parts, in bytes. What depends on the run's activations is not in it, and is not guessed."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    trainable_parameters: int
    not_included: tuple[str, ...] = ("activations", "logits", "framework")

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

    An adapter is trained in float32 whatever the dtype of the base; a full fine-tune in the dtype of the weights.
    """
    size = _BYTES[dtype]
    trainable = shape.parameters if target is None else adapter_parameters(shape, target)
    width = size if target is None else _BYTES["float32"]
    return Estimate(
        weights=shape.parameters * size,
        adapter=0 if target is None else trainable * width,
        gradients=trainable * width,
        optimizer=trainable * width * _MOMENTS,
        trainable_parameters=trainable,
    )
