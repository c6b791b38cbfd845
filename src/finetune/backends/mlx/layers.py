"""LoRA on mlx-lm's linear layers: what the adapter adds, and how it is put on a model, taken off and merged.

An adapted layer's output grows by alpha / rank x B A x. A (rank x inputs) and B (outputs x rank) are float32 whatever
the base computes in.

Source: Hu et al. 2021 (arXiv:2106.09685), and `LoraLayer` of Hugging Face PEFT.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from finetune.backends.mlx.names import Names
from finetune.backends.mlx.zoo import Loaded, linear_layers
from finetune.models.peft_files import Layers, adapted_layers, tensor_name
from finetune.records import AdapterTarget

Pairs = dict[str, tuple[mx.array, mx.array]]
"""(A, B) of each adapted layer by transformers' path."""
_HALVES = {"A": "down", "B": "up"}


class LoRALinear(nn.Module):  # type: ignore[misc]
    """A linear layer with an adapter; `key` draws the dropout of the adapter's input, None leaves it out."""

    def __init__(self, base: Any, target: AdapterTarget, down: mx.array, up: mx.array) -> None:
        super().__init__()
        self.base = base
        self.down = down
        self.up = up
        self.target = target
        self.key: mx.array | None = None
        self.disabled = False

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) -> (..., outputs), in the base's dtype."""
        y = self.base(x)
        if self.disabled:
            return y
        seen = x.astype(mx.float32)
        if self.key is not None:
            kept = 1 - self.target.dropout
            seen = seen * mx.random.bernoulli(kept, seen.shape, key=self.key) / kept
        added = (seen @ self.down.T) @ self.up.T
        return (y + self.target.alpha / self.target.rank * added).astype(y.dtype)

    def merged(self) -> mx.array:
        """The weight (outputs, inputs) of a plain layer that computes the same, in the base's dtype."""
        weight: mx.array = self.base.weight
        grown = self.target.alpha / self.target.rank * (self.up @ self.down)
        return (weight.astype(mx.float32) + grown).astype(weight.dtype)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that sits on a model: its layers by mlx-lm's paths."""

    target: AdapterTarget
    layers: dict[str, LoRALinear]

    def tensors(self, names: Names) -> dict[str, str]:
        """Where each matrix lies in the model, by its name in a PEFT model."""
        return {
            tensor_name(names.shown(path), half): f"{path}.{attribute}"
            for path in self.layers
            for half, attribute in _HALVES.items()
        }

    def own(self, place: str) -> str:
        """Where a tensor of the base lies when the adapter is off."""
        path, _, leaf = place.rpartition(".")
        return f"{path.removesuffix('.base')}.{leaf}" if path.removesuffix(".base") in self.layers else place

    def take_off(self, model: Any) -> None:
        """Leave the model as it was without the adapter."""
        model.update_modules(tree_unflatten([(path, layer.base) for path, layer in self.layers.items()]))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the layers do what their bases do."""
        for layer in self.layers.values():
            layer.disabled = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.disabled = False

    @contextlib.contextmanager
    def dropping(self, key: mx.array) -> Iterator[None]:
        """Within this context each layer drops its share of its input, as `key` draws it."""
        keys = mx.random.split(key, len(self.layers)) if self.target.dropout else [None] * len(self.layers)
        for layer, own in zip(self.layers.values(), keys, strict=True):
            layer.key = own
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.key = None


def layer_shapes(loaded: Loaded) -> Layers:
    """(outputs, inputs) of each linear layer by transformers' path."""
    layers = linear_layers(loaded.model)
    return {loaded.names.shown(path): tuple(module.weight.shape) for path, module in layers.items()}


def draw_pairs(layers: Layers, target: AdapterTarget, key: mx.array) -> Pairs:
    """A fresh adapter: A uniform within 1 / sqrt(inputs), layer by layer; B zero.

    Raises:
        ModelError: a name in `target.modules` matches no linear layer.
    """
    paths = adapted_layers(layers, target.modules)
    pairs = {}
    for path, own in zip(paths, mx.random.split(key, len(paths)), strict=True):
        outputs, inputs = layers[path]
        bound = 1 / math.sqrt(inputs)
        down = mx.random.uniform(-bound, bound, (target.rank, inputs), key=own)
        pairs[path] = down, mx.zeros((outputs, target.rank))
    return pairs


def put_on(loaded: Loaded, target: AdapterTarget, pairs: Pairs) -> Adapter:
    """Put an adapter of these matrices on a model that has none.

    Raises:
        ModelError: mlx-lm keeps a layer in another form than the model's files, so that the adapter would fit none.
    """
    loaded.names.refuse_foreign([f"{path}.weight" for path in pairs], "an adapter for them")
    bases = {path: module for path, module in linear_layers(loaded.model).items() if loaded.names.shown(path) in pairs}
    layers = {path: LoRALinear(base, target, *pairs[loaded.names.shown(path)]) for path, base in bases.items()}
    loaded.model.update_modules(tree_unflatten(list(layers.items())))
    mx.eval([(layer.down, layer.up) for layer in layers.values()])
    return Adapter(target, layers)
