"""Adapters on mlx-lm's linear layers: what they add, and how they are put on a model, taken off and merged.

LoRA makes a layer's weight W + s B A, with s = alpha / rank, or alpha / sqrt(rank). DoRA stretches each row of that to
a length that it trains; the length that the row has is a constant when gradients are made. A (rank x inputs), B
(outputs x rank) and the lengths (outputs) are float32 whatever the base computes in.

Source: Hu et al. 2021 (arXiv:2106.09685), Liu et al. 2024 (arXiv:2402.09353), and `LoraLayer` and `DoraLinearLayer` of
Hugging Face PEFT.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from finetune.adapters.choose import ends_with, saved_weights
from finetune.adapters.peft_files import Layers, adapted_layers, parts_of, saved_name, tensor_name
from finetune.backends.mlx.fold import through_folded
from finetune.backends.mlx.load import Loaded, linear_layers
from finetune.backends.mlx.names import WeightNames
from finetune.backends.mlx.packed import full_weight, in_full, packed_layers
from finetune.errors import ModelError
from finetune.records import AdapterTarget


class Parts(NamedTuple):
    """What one layer's adapter is made of: A, B and, with DoRA, the magnitudes."""

    down: mx.array
    up: mx.array
    magnitude: mx.array | None = None


@dataclass(frozen=True, slots=True)
class Tensors:
    """An adapter apart from any model: the parts by transformers' path of the layer, and weights of modules trained
    whole, by transformers' names.
    """

    parts: dict[str, Parts]
    saved: dict[str, mx.array]


_PLACES = {"A": "down", "B": "up", "m": "magnitude"}


class LoRALinear(nn.Module):  # type: ignore[misc]
    """A linear layer with an adapter; `key` draws the dropout of the adapter's input, None leaves it out.

    While it is `learning`, the adapter is folded into the weight where that computes the same in fewer passes.
    """

    def __init__(self, base: Any, parts: Parts, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.down = parts.down
        self.up = parts.up
        if parts.magnitude is not None:
            self.magnitude = parts.magnitude
        self.scale = scale
        self.share_dropped = dropout
        self.key: mx.array | None = None
        self.disabled = False
        self.learning = False

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) -> (..., outputs), in the base's dtype."""
        if self.learning and self._folds(x):
            y = through_folded(x, self.base.weight, self.down, self.scale * self.up)
            return y + self.base.bias if "bias" in self.base else y
        y = self.base(x)
        if self.disabled:
            return y
        seen = x.astype(mx.float32)
        if self.key is not None:
            kept = 1 - self.share_dropped
            seen = seen * mx.random.bernoulli(kept, seen.shape, key=self.key) / kept
        added = self.scale * ((seen @ self.down.T) @ self.up.T)
        if "magnitude" not in self:
            return (y + added).astype(y.dtype)
        weight = self.weight()
        stretch = self.magnitude / mx.stop_gradient(self._lengths(weight))
        # Where the input is dropped, the output that is stretched is that of the dropped input; never the bias.
        plain = seen @ weight.T if self.key is not None else y - self.base.bias if "bias" in self.base else y
        return (y + (stretch - 1) * plain + stretch * added).astype(y.dtype)

    def _folds(self, x: mx.array) -> bool:
        # In half precision the sum W + s B A would round small changes away.
        plain = type(self.base) is nn.Linear and self.base.weight.dtype == x.dtype == mx.float32
        return plain and self.key is None and "magnitude" not in self

    def weight(self) -> mx.array:
        """The base's weight (outputs, inputs) in float32, unpacked where it is packed."""
        return full_weight(self.base).astype(mx.float32)

    def merged(self) -> mx.array:
        """The weight (outputs, inputs) of a plain layer that computes the same, in the base's dtype."""
        weight = self.weight()
        grown = weight + self.scale * (self.up @ self.down)
        if "magnitude" in self:
            grown = (self.magnitude / self._lengths(weight))[:, None] * grown
        return grown.astype(full_weight(self.base).dtype)

    def _lengths(self, weight: mx.array) -> mx.array:
        return mx.linalg.norm(weight + self.scale * (self.up @ self.down), axis=1)


@dataclass(frozen=True, slots=True)
class MlxAdapter:
    """An adapter that sits on a model: its layers by mlx-lm's paths.

    `originals` are the base's weights of modules that are trained whole, by where they lie in the model.
    """

    target: AdapterTarget
    layers: dict[str, LoRALinear]
    originals: dict[str, mx.array]

    def tensors(self, names: WeightNames) -> dict[str, str]:
        """Where each trained tensor lies in the model, by its name in a PEFT model."""
        places = {
            tensor_name(names.shown(path), part): f"{path}.{_PLACES[part]}"
            for path in self.layers
            for part in parts_of(self.target)
        }
        return places | {saved_name(names.shown(place)): place for place in self.originals}

    def own(self, place: str) -> str:
        """Where a tensor of the base lies when the adapter is off."""
        path, _, leaf = place.rpartition(".")
        return f"{path.removesuffix('.base')}.{leaf}" if path.removesuffix(".base") in self.layers else place

    def take_off(self, model: Any) -> None:
        """Leave the model as it was without the adapter."""
        model.update_modules(tree_unflatten([(path, layer.base) for path, layer in self.layers.items()]))
        model.update(tree_unflatten(list(self.originals.items())))

    @contextlib.contextmanager
    def disabled(self, model: Any) -> Iterator[None]:
        """Within this context the layers do what their bases do."""
        trained = {place: tensor for place, tensor in tree_flatten(model.parameters()) if place in self.originals}
        for layer in self.layers.values():
            layer.disabled = True
        model.update(tree_unflatten(list(self.originals.items())))
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.disabled = False
            model.update(tree_unflatten(list(trained.items())))

    @contextlib.contextmanager
    def learning(self, key: mx.array) -> Iterator[None]:
        """Within this context each layer learns, and drops its share of its input, as `key` draws it."""
        keys = mx.random.split(key, len(self.layers)) if self.target.dropout else [None] * len(self.layers)
        for layer, own in zip(self.layers.values(), keys, strict=True):
            layer.key, layer.learning = own, True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.key, layer.learning = None, False


def layer_shapes(loaded: Loaded) -> Layers:
    """(outputs, inputs) of each linear layer by transformers' path: the true ones, packed or not."""
    layers = linear_layers(loaded.model)
    return {loaded.names.shown(path): tuple(full_weight(module).shape) for path, module in layers.items()}


def weight_shapes(loaded: Loaded) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of a model without an adapter, by transformers' name, as its full files have it."""
    tensors = loaded.names.to_files(in_full(loaded.model, dict(tree_flatten(loaded.model.parameters()))))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_packed(loaded: Loaded, target: AdapterTarget | None) -> None:
    """Refuse to train packed weights: whole modules beside an adapter or, where `target` is None, all of the model.

    Raises:
        ModelError: one would have to be.
    """
    packed = [loaded.names.shown(path.removesuffix(".base")) for path in packed_layers(loaded.model)]
    wanted = packed if target is None else [path for name in target.saved for path in ends_with(packed, name)]
    if wanted:
        raise ModelError(
            f"{wanted[0]} is quantised, and what is quantised cannot be trained whole",
            hint="train an adapter and no such module, or load the full model",
        )


def draw_tensors(loaded: Loaded, layers: Layers, target: AdapterTarget, key: mx.array) -> Tensors:
    """A fresh adapter: A uniform within 1 / sqrt(inputs), layer by layer; B zero; magnitudes the base's lengths.

    Raises:
        ModelError: a name in `target.modules` matches no linear layer.
    """
    paths = adapted_layers(layers, target.modules)
    bases = {loaded.names.shown(path): module for path, module in linear_layers(loaded.model).items()}
    parts = {}
    for path, own in zip(paths, mx.random.split(key, len(paths)), strict=True):
        (outputs, inputs), rank = layers[path], target.rank_of(path)
        bound = 1 / math.sqrt(inputs)
        down, up = mx.random.uniform(-bound, bound, (rank, inputs), key=own), mx.zeros((outputs, rank))
        lengths = mx.linalg.norm(full_weight(bases[path]).astype(mx.float32), axis=1) if target.kind == "dora" else None
        parts[path] = Parts(down, up, lengths)
    own_weights = {loaded.names.shown(place): tensor for place, tensor in tree_flatten(loaded.model.parameters())}
    return Tensors(parts, {name: own_weights[name] for name in saved_weights(own_weights, target)})


def put_on(loaded: Loaded, target: AdapterTarget, tensors: Tensors) -> MlxAdapter:
    """Put an adapter of these tensors on a model that has none.

    Raises:
        ModelError: mlx-lm keeps a layer in another form than the model's files, so that the adapter would fit none.
    """
    names, parts = loaded.names, tensors.parts
    names.refuse_foreign([*(f"{path}.weight" for path in parts), *tensors.saved], "an adapter for them")
    places = dict(tree_flatten(loaded.model.parameters()))
    originals = {place: tensor for place, tensor in places.items() if names.shown(place) in tensors.saved}
    layers = {}
    for path, base in linear_layers(loaded.model).items():
        shown = names.shown(path)
        if shown in parts:
            layers[path] = LoRALinear(base, parts[shown], target.scale_of(shown), target.dropout)
    loaded.model.update_modules(tree_unflatten(list(layers.items())))
    own = {place: tensors.saved[names.shown(place)].astype(tensor.dtype) for place, tensor in originals.items()}
    loaded.model.update(tree_unflatten(list(own.items())))
    mx.eval(loaded.model.parameters())
    return MlxAdapter(target, layers, originals)
