"""DoRA: as LoRA, and each row of W + s B A is stretched to a length that is trained, too: its magnitude m (out).

The length that a row has is taken for a constant when gradients are made.

Source: Liu et al. 2024 (arXiv:2402.09353, section 4.3 for the constant), and `DoraLinearLayer` of Hugging Face PEFT.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from finetune.adapters.kind import F32, AdapterTensor, LayerPass, Parts, Readers, Shape
from finetune.adapters.kinds.lora import LoRA
from finetune.records import AdapterTarget


class DoRA(LoRA):
    """Two thin matrices beside each weight, and the length of each row."""

    name = "dora"
    title = "DoRA"
    about = "a DoRA adapter (which trains the length of each row as well)"
    tensors: ClassVar[tuple[AdapterTensor, ...]] = (
        *LoRA.tensors,
        AdapterTensor("m", "lora_magnitude_vector.default.weight", "lora_magnitude_vector", fast=True, decays=False),
    )
    low_rank = False
    mlx_lm_layer = "mlx_lm.tuner.dora:DoRALinear"
    mlx_lm_names: ClassVar[Mapping[str, str]] = {**LoRA.mlx_lm_names, "m": "m"}

    def shapes(self, target: AdapterTarget, path: str, outputs: int, inputs: int) -> dict[str, Shape]:
        """A, B and m."""
        return {**super().shapes(target, path, outputs, inputs), "m": (outputs,)}

    def start(
        self, xp: Any, shapes: Mapping[str, Shape], uniform: Callable[[float, Shape], Any], weight: Callable[[], Any]
    ) -> dict[str, Any]:
        """The magnitudes are the lengths of the base's rows."""
        return {**super().start(xp, shapes, uniform, weight), "m": xp.linalg.norm(weight(), axis=1)}

    def lengths(self, xp: Any, parts: Parts, scale: float, weight: Any) -> Any:
        """The length of each row (out,) of W + s B A, which is stretched to the magnitude."""
        return xp.linalg.norm(super().merged(xp, parts, scale, weight), axis=1)

    def forward(self, xp: Any, parts: Parts, seen: LayerPass) -> tuple[Any, tuple[Any, ...]]:
        """Y + (g - 1) plain + g z, where z = s kept A' B' and g stretches.

        Where the input is dropped, the output that is stretched is that of the dropped input; never the bias.
        """
        y, weight = seen.base(seen.x), seen.weight()
        small = seen.kept @ parts["A"].T
        added = seen.scale * (small @ parts["B"].T)
        lengths = self.lengths(xp, parts, seen.scale, weight)
        stretch = parts["m"] / (xp.stop_gradient(lengths) if hasattr(xp, "stop_gradient") else lengths)
        plain = seen.kept @ weight.T if seen.keep is not None else y if seen.bias is None else y - seen.bias
        return y + (stretch - 1) * plain + stretch * added, (small, plain + added, stretch, lengths)

    def backward(self, parts: Parts, seen: LayerPass, saved: tuple[Any, ...], dy: Any) -> tuple[dict[str, Any], Any]:
        """Of A, B, m and x."""
        small, unstretched, stretch, lengths = saved
        weight = seen.weight()
        gradients, dkept = self._through_factors(parts, seen, small, dy * stretch)
        dkept += (dy * (stretch - 1)) @ weight
        gradients["m"] = (dy * unstretched).sum(axis=0) / lengths
        return gradients, dy @ weight + (dkept if seen.keep is None else dkept * seen.keep)

    def merged(self, xp: Any, parts: Parts, scale: float, weight: Any) -> Any:
        """W + s B A with its rows stretched."""
        grown = super().merged(xp, parts, scale, weight)
        return (parts["m"] / self.lengths(xp, parts, scale, weight))[:, None] * grown

    def kept_by_torch(self, readers: Readers) -> int:
        """What is stretched, too: the base's output, computed anew of an input that was dropped, and the adapter's."""
        stretched = F32 + (F32 if readers.dropped else readers.size)
        return super().kept_by_torch(readers) + sum(stretched * written for _, _, written in readers.layers)

    def copies_weight(self, *, size: int, dropped: bool) -> bool:
        """To compute the base's output anew."""
        return dropped and size != F32

    def brief_by_torch(self, outputs: int, inputs: int) -> int:
        """What PEFT makes to find the lengths of the rows: an identity and three matrices as large as the weight."""
        return F32 * inputs * (inputs + 3 * outputs)

    def kept_by_reference(self, name: str, outputs: int, inputs: int, rank: int) -> int:
        """What is stretched, too."""
        return rank + outputs
