"""Adapters on mlx-lm's linear layers: how they are put on a model, taken off and merged; what they do, their kind says.

The tensors of an adapter are float32 whatever the base computes in.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from finetune.adapters.choose import ends_with, saved_weights
from finetune.adapters.kind import LayerPass, Parts
from finetune.adapters.kinds import kind_of
from finetune.adapters.peft_files import Layers, adapted_layers, layer_tensors, rows_name, saved_name
from finetune.backends.mlx.fold import through_folded
from finetune.backends.mlx.load import Loaded, linear_layers
from finetune.backends.mlx.names import WeightNames
from finetune.backends.mlx.packed import full_weight, in_full, packed_layers
from finetune.backends.mlx.token_rows import TableWithRows, tables_of
from finetune.errors import ModelError
from finetune.records import AdapterTarget


@dataclass(frozen=True, slots=True)
class Tensors:
    """An adapter apart from any model: each layer's tensors by transformers' path of it, weights of modules trained
    whole, by transformers' names, and the trained rows of tables by the tables' paths.
    """

    parts: Mapping[str, Parts]
    saved: dict[str, mx.array]
    rows: Mapping[str, mx.array] = field(default_factory=dict)


class AdaptedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer with an adapter; `key` draws the dropout of the adapter's input, None leaves it out.

    While it is `learning`, the adapter is folded into the weight where that computes the same in fewer passes.
    """

    def __init__(self, base: Any, parts: Parts, target: AdapterTarget, path: str) -> None:
        super().__init__()
        self.base = base
        self.kind = kind_of(target)
        for tensor in self.kind.tensors:
            setattr(self, tensor.key, parts[tensor.key])
        self.rank, self.scale = target.rank_of(path), target.scale_of(path)
        self.share_dropped = target.dropout
        self.key: mx.array | None = None
        self.disabled = False
        self.learning = False

    @property
    def parts(self) -> Parts:
        """The tensors of the adapter by the keys of their kind."""
        return {tensor.key: self[tensor.key] for tensor in self.kind.tensors}

    def __call__(self, x: mx.array) -> mx.array:
        """(..., inputs) -> (..., outputs), in the base's dtype."""
        bias = self.base.bias if "bias" in self.base else None
        if self.learning and self._folds(x):
            y = through_folded(x, self.base.weight, self.A, self.scale * self.B)
            return y if bias is None else y + bias
        if self.disabled:
            return self.base(x)
        seen, keep = x if x.dtype == mx.float64 else x.astype(mx.float32), None
        if self.key is not None:
            share = 1 - self.share_dropped
            keep = mx.random.bernoulli(share, seen.shape, key=self.key)
            seen = seen * keep / share
        y, _ = self.kind.forward(mx, self.parts, LayerPass(x, seen, keep, self.base, self.weight, bias, self.scale))
        return y.astype(x.dtype)

    def _folds(self, x: mx.array) -> bool:
        # In half precision the sum W + s B A would round small changes away.
        plain = type(self.base) is nn.Linear and self.base.weight.dtype == x.dtype == mx.float32
        return plain and self.key is None and self.kind.low_rank

    def weight(self) -> mx.array:
        """The base's weight (outputs, inputs) in float32, unpacked where it is packed."""
        return full_weight(self.base).astype(mx.float32)

    def merged(self) -> dict[str, mx.array]:
        """Weight (outputs, inputs) and bias, if any, of a plain layer that computes the same, in the base's dtypes."""
        weight = self.kind.merged(mx, self.parts, self.scale, self.weight())
        merged = {"weight": weight.astype(full_weight(self.base).dtype)}
        if "bias" in self.base:
            merged["bias"] = self.kind.merged_bias(self.parts, self.base.bias).astype(self.base.bias.dtype)
        return merged


@dataclass(frozen=True, slots=True)
class MlxAdapter:
    """An adapter that sits on a model: its layers by mlx-lm's paths.

    `originals` are the base's weights of modules that are trained whole, by where they lie in the model; `tables` those
    of which rows are trained, by mlx-lm's paths.
    """

    target: AdapterTarget
    layers: dict[str, AdaptedLinear]
    originals: dict[str, mx.array]
    tables: dict[str, TableWithRows]

    def tensors(self, names: WeightNames) -> dict[str, str]:
        """Where each trained tensor lies in the model, by its name in a PEFT model."""
        places = {
            name: f"{path}.{key}"
            for path in self.layers
            for key, name in layer_tensors(self.target, names.shown(path)).items()
        }
        places |= {rows_name(names.shown(path)): f"{path}.rows" for path in self.tables}
        return places | {saved_name(names.shown(place)): place for place in self.originals}

    def own(self, place: str) -> str:
        """Where a tensor of the base lies when the adapter is off."""
        path, _, leaf = place.rpartition(".")
        inner = path.removesuffix(".base")
        return f"{inner}.{leaf}" if inner in self.layers or inner in self.tables else place

    def take_off(self, model: Any) -> None:
        """Leave the model as it was without the adapter."""
        bases = [(path, layer.base) for path, layer in self.layers.items()]
        bases += [(path, table.base) for path, table in self.tables.items()]
        model.update_modules(tree_unflatten(bases))
        model.update(tree_unflatten(list(self.originals.items())))

    @contextlib.contextmanager
    def disabled(self, model: Any) -> Iterator[None]:
        """Within this context the layers do what their bases do."""
        trained = {place: tensor for place, tensor in tree_flatten(model.parameters()) if place in self.originals}
        around: list[AdaptedLinear | TableWithRows] = [*self.layers.values(), *self.tables.values()]
        for module in around:
            module.disabled = True
        model.update(tree_unflatten(list(self.originals.items())))
        try:
            yield
        finally:
            for module in around:
                module.disabled = False
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
    """A fresh adapter, layer by layer; modules and rows that are trained themselves start as copies.

    Raises:
        ModelError: a name in `target.modules` matches no linear layer.
    """
    paths = adapted_layers(layers, target.modules)
    bases = {loaded.names.shown(path): module for path, module in linear_layers(loaded.model).items()}
    kind, parts = kind_of(target), {}
    for path, own in zip(paths, mx.random.split(key, len(paths)), strict=True):

        def uniform(bound: float, shape: tuple[int, ...], own: mx.array = own) -> mx.array:
            return mx.random.uniform(-bound, bound, shape, key=own)

        def weight(path: str = path) -> mx.array:
            return full_weight(bases[path]).astype(mx.float32)

        parts[path] = kind.start(mx, kind.shapes(target, path, *layers[path]), uniform, weight)
    own_weights = {loaded.names.shown(place): tensor for place, tensor in tree_flatten(loaded.model.parameters())}
    rows = {
        shown: full_weight(table)[mx.array(target.rows[shown])].astype(mx.float32)
        for path, table in tables_of(loaded, target.rows).items()
        for shown in [loaded.names.shown(path)]
    }
    return Tensors(parts, {name: own_weights[name] for name in saved_weights(own_weights, target)}, rows)


def put_on(loaded: Loaded, target: AdapterTarget, tensors: Tensors) -> MlxAdapter:
    """Put an adapter of these tensors on a model that has none.

    Raises:
        ModelError: mlx-lm keeps a layer in another form than the model's files, so that the adapter would fit none.
    """
    names, parts = loaded.names, tensors.parts
    changed = [*(f"{path}.weight" for path in (*parts, *tensors.rows)), *tensors.saved]
    names.refuse_foreign(changed, "an adapter for them")
    places = dict(tree_flatten(loaded.model.parameters()))
    originals = {place: tensor for place, tensor in places.items() if names.shown(place) in tensors.saved}
    layers = {}
    for path, base in linear_layers(loaded.model).items():
        shown = names.shown(path)
        if shown in parts:
            layers[path] = AdaptedLinear(base, parts[shown], target, shown)
    tables = {
        path: TableWithRows(base, tensors.rows[names.shown(path)], target.rows[names.shown(path)])
        for path, base in tables_of(loaded, tensors.rows).items()
    }
    loaded.model.update_modules(tree_unflatten([*layers.items(), *tables.items()]))
    own = {place: tensors.saved[names.shown(place)].astype(tensor.dtype) for place, tensor in originals.items()}
    loaded.model.update(tree_unflatten(list(own.items())))
    mx.eval(loaded.model.parameters())
    return MlxAdapter(target, layers, originals, tables)
