"""IA3: a vector l is trained that each number a layer writes is multiplied with, or each number that it reads.

Read are the inner activations of the feed-forward part; of every other layer it is the output, bias included. On disk
l is (1 x in) where it multiplies what is read and (out x 1) elsewhere, so that the merged weight is l W in both cases.
It starts at one. There is neither a rank nor a scale.

Source: Liu et al. 2022 (arXiv:2205.05638), and `IA3Layer` of Hugging Face PEFT.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from finetune.adapters.kind import F32, AdapterKind, AdapterTensor, LayerPass, Parts, Readers, Shape
from finetune.records import AdapterTarget

_FEED_FORWARD = ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h", "fc_out")
"""Layers that read the inner activations of a feed-forward part; as PEFT has them for the families it knows."""


def _reads_inner(module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in _FEED_FORWARD)


class IA3(AdapterKind):
    """A vector beside each layer."""

    name = "ia3"
    title = "IA3"
    about = "an IA3 adapter (which trains a factor for each number that a layer writes)"
    tensors = (AdapterTensor("l", "ia3_l.default", "ia3_l", decays=False, first_gradient="some"),)
    learning_rate_factor = 10.0
    peft_type = "IA3"
    peft_config = "IA3Config"
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {"init_ia3_weights": (None, True, False)}

    def shapes(self, target: AdapterTarget, path: str, outputs: int, inputs: int) -> dict[str, Shape]:
        """A factor for each input or each output, as PEFT decides it: by the name that the layer was targeted by."""
        inner = any(path.endswith(module) for module in target.modules if _reads_inner(module))
        return {"l": (1, inputs) if inner else (outputs, 1)}

    def start(
        self, xp: Any, shapes: Mapping[str, Shape], uniform: Callable[[float, Shape], Any], weight: Callable[[], Any]
    ) -> dict[str, Any]:
        """All ones."""
        return {"l": xp.ones(shapes["l"])}

    def forward(self, xp: Any, parts: Parts, seen: LayerPass) -> tuple[Any, tuple[Any, ...]]:
        """(l x) W', or l (x W' + bias)."""
        factors = parts["l"].reshape(-1)
        if _is_inner(parts):
            return seen.base((seen.kept * factors).astype(seen.x.dtype)), ()
        y = seen.base(seen.x)
        return y * factors, (y,)

    def backward(self, parts: Parts, seen: LayerPass, saved: tuple[Any, ...], dy: Any) -> tuple[dict[str, Any], Any]:
        """Of l and x."""
        factors = parts["l"].reshape(-1)
        if _is_inner(parts):
            dread = dy @ seen.weight()
            slope, dx = (dread * seen.kept).sum(axis=0), dread * factors
        else:
            slope, dx = (dy * saved[0]).sum(axis=0), (dy * factors) @ seen.weight()
        return {"l": slope.reshape(parts["l"].shape)}, dx

    def merged(self, xp: Any, parts: Parts, scale: float, weight: Any) -> Any:
        """Its columns, or its rows, times their factors."""
        return weight * parts["l"]

    def merged_bias(self, parts: Parts, bias: Any) -> Any:
        """What is written is multiplied with its bias."""
        return bias if _is_inner(parts) else bias * parts["l"].reshape(-1)

    def write_peft(self, target: AdapterTarget) -> dict[str, Any]:
        """Those of `IA3Config`."""
        return {"feedforward_modules": list(filter(_reads_inner, target.modules)), "init_ia3_weights": True}

    def read_peft(self, settings: Mapping[str, Any], modules: tuple[str, ...]) -> AdapterTarget:
        """Which layers' inputs are multiplied must be as it is here."""
        if sorted(settings["feedforward_modules"]) != sorted(filter(_reads_inner, modules)):
            raise ValueError(f"feedforward_modules are {settings['feedforward_modules']}, which are others here")
        return AdapterTarget(1, 1.0, 0.0, modules, self.name)

    def kept_by_torch(self, readers: Readers) -> int:
        """What is multiplied: in float32 where it is read, as the layer wrote it elsewhere."""
        shared = readers.alive and readers.size == F32
        return sum(
            (0 if shared else F32 * readers.width) if _reads_inner(name) else readers.size * written
            for name, _, written in readers.layers
        )

    def kept_by_reference(self, name: str, outputs: int, inputs: int, rank: int) -> int:
        """What the layer wrote; what it read is kept as it is."""
        return 0 if _reads_inner(name) else outputs


def _is_inner(parts: Parts) -> bool:
    """Whether it is the input that is multiplied, by the shape of l."""
    return bool(parts["l"].shape[0] == 1)
