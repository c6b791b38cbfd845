"""Tables of which some rows are trained: the embedding and, where it is a table of its own, the output head."""

from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from finetune.backends.mlx.load import Loaded
from finetune.backends.mlx.packed import full_weight


class TableWithRows(nn.Module):  # type: ignore[misc]
    """A table some of whose rows are others: `rows` (count, width) stand for those that `numbers` names.

    The base stays as it is, packed or not: what it makes of the other tokens is the same to the last bit.
    """

    def __init__(self, base: Any, rows: mx.array, numbers: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        self.numbers = list(numbers)
        self.disabled = False
        known = full_weight(base).shape[0]
        slots = mx.full((known,), -1)
        slots[mx.array(self.numbers)] = mx.arange(len(self.numbers))
        # A name with an underscore is no weight to MLX: the place of each token's row among `rows`, or -1.
        self._slots = slots

    def __call__(self, x: mx.array) -> mx.array:
        """Embedding: ids (...) -> (..., width); head: (..., width) -> (..., words)."""
        if not hasattr(self.base, "as_linear"):
            return self._with_words(self.base(x), x)
        found = self.base(x)
        if self.disabled:
            return found
        slots = self._slots[x]
        own = self.rows[mx.maximum(slots, 0)].astype(found.dtype)
        return mx.where((slots >= 0)[..., None], own, found)

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as the output head of a tied model: (..., width) -> (..., words)."""
        return self._with_words(self.base.as_linear(x), x)

    def _with_words(self, found: mx.array, x: mx.array) -> mx.array:
        if self.disabled:
            return found
        own = (x @ self.rows.astype(x.dtype).T).astype(found.dtype)
        return mx.where(self._slots >= 0, mx.take(own, mx.maximum(self._slots, 0), axis=-1), found)

    def merged(self) -> mx.array:
        """The full weight (words, width) of a plain table that computes the same, in the base's dtype."""
        weight = mx.array(full_weight(self.base))
        weight[mx.array(self.numbers)] = self.rows.astype(weight.dtype)
        return weight


def tables_of(loaded: Loaded, rows: Collection[str]) -> dict[str, Any]:
    """The modules of the tables at these paths of transformers', by mlx-lm's own."""
    leaves = tree_flatten(loaded.model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: module for path, module in leaves if loaded.names.shown(path) in rows}
