"""Trips through a model: batches to summed losses, prompts to answers."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from finetune.backends.generate import answer_by_length, until_stops
from finetune.backends.mlx.tensors import first_line
from finetune.errors import ModelError, TrainingError
from finetune.ports import ChooseTokens, Objective
from finetune.records import Batch, TokenizedRow

_TRUNKS = ("model", "transformer", "backbone")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What limits a trip: the words and the tokens that a model knows, and what rows are padded with."""

    vocab_size: int
    context: int
    pad_id: int


@dataclass(frozen=True, slots=True)
class Arrays:
    """A batch, its ids (sequences, length), targets (n,), the flat places of their logits, and its rows' starts."""

    batch: Batch
    ids: mx.array
    targets: mx.array
    places: mx.array
    starts: mx.array | None


def arrays_of(batch: Batch, sizes: Sizes) -> Arrays:
    """The batch padded on the right, where causal attention never looks.

    Raises:
        TrainingError: a row holds a word that the model does not know, which MLX itself would not notice, or is
            longer than its context.
    """
    for row in batch.rows:
        _check_row(row, sizes)
    arrays = batch.arrays(sizes.pad_id)
    return Arrays(
        batch=batch,
        ids=mx.array(arrays.ids.astype(np.int32)),
        targets=mx.array(arrays.targets.astype(np.int32)),
        places=mx.array(np.flatnonzero(arrays.here)),
        starts=mx.array(arrays.starts.astype(np.int32)) if arrays.starts.any() else None,
    )


def _check_row(row: TokenizedRow, sizes: Sizes) -> None:
    low, high = min(row.ids, default=0), max(row.ids, default=0)
    if low < 0 or high >= sizes.vocab_size:
        strange = low if low < 0 else high
        raise TrainingError(
            f"{row.where} holds token {strange}; the model knows those from 0 to {sizes.vocab_size - 1}"
        )
    if len(row.ids) > sizes.context:
        raise TrainingError(
            f"{row.where} has {len(row.ids)} tokens; the model takes {sizes.context}", hint="lower tokens.max_length"
        )


class _HiddenStateFilter:
    """A trunk of which only some places go on to the head: (rows, tokens, width) -> (1, places, width)."""

    def __init__(self, trunk: Any, places: mx.array) -> None:
        self._trunk = trunk
        self._places = places

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        hidden = self._trunk(*args, **kwargs)
        return hidden.reshape(-1, hidden.shape[-1])[self._places][None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """The way through one model; of what its module `trunk` returns only some places need go on to its head."""

    model: Any
    trunk: str | None
    sizes: Sizes

    def logits(self, ids: Sequence[int]) -> mx.array:
        """The logits (tokens, vocabulary) after each token of a prompt, in float32."""
        row = TokenizedRow(tuple(ids), (False,) * len(ids), "a prompt")
        _check_row(row, self.sizes)
        return self.model(mx.array([row.ids]))[0].astype(mx.float32)

    def logits_at(self, ids: mx.array, places: mx.array, **given: object) -> mx.array:
        """The logits (places, vocabulary) at these places, counted through all rows, and no others where it can be.

        The model's own code makes them, so that tied heads, scales and caps are what they are: only what it hands to
        its head is sieved.
        """
        if self.trunk is None:
            logits: mx.array = self.model(ids, **given)
            return logits.reshape(-1, logits.shape[-1])[places]
        # An attribute of the object goes before its module of that name, and leaves the tree of weights alone.
        vars(self.model)[self.trunk] = _HiddenStateFilter(self.model[self.trunk], places)
        try:
            logits = self.model(ids, **given)
        finally:
            del vars(self.model)[self.trunk]
        return logits[0]

    def loss(self, arrays: Arrays, objective: Objective) -> mx.array:
        """The objective's loss of the batch, in float32."""
        given = {} if arrays.starts is None else {"cache": [_PackedMask(arrays.starts)] * len(self.model.layers)}
        logits = self.logits_at(arrays.ids, arrays.places, **given)
        losses = nn.losses.cross_entropy(
            logits.astype(mx.float32),
            arrays.targets,
            label_smoothing=objective.label_smoothing,
            reduction="sum" if objective.summed else "none",
        )
        if objective.summed:
            return losses
        value, slopes = objective.total(arrays.batch, np.array(mx.stop_gradient(losses)).astype(np.float64))
        total = (losses * mx.array(slopes.astype(np.float32))).sum()
        # The gradient is that of the weighed losses, the value is the objective's own.
        return total + (value - mx.stop_gradient(total))

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        choose: ChooseTokens | None = None,
    ) -> list[list[int]]:
        """Continuations without the prompt and without the stop token, in the order of `prompts`."""
        for index, prompt in enumerate(prompts):
            if len(prompt) < self.sizes.context:  # others have no room for an answer, and are not asked
                _check_row(TokenizedRow(tuple(prompt), (), f"prompt {index}"), self.sizes)
        return answer_by_length(
            prompts,
            max_new_tokens,
            self.sizes.context,
            lambda alike, room: until_stops(islice(self._words(alike, choose), room), len(alike), stop_ids),
        )

    def _words(self, prompts: Sequence[Sequence[int]], choose: ChooseTokens | None) -> Iterator[list[int]]:
        """The next word of each prompt, again and again; each is read before the next is made."""
        cache = make_prompt_cache(self.model)
        ids = mx.array([list(prompt) for prompt in prompts])
        while True:
            last = mx.arange(1, len(ids) + 1) * ids.shape[1] - 1
            logits = self.logits_at(ids, last, cache=cache)
            ids = mx.array(choose(np.array(logits.astype(mx.float32)))) if choose else mx.argmax(logits, axis=-1)
            ids = ids[:, None]
            mx.eval(ids, [each.state for each in cache])
            yield [int(word) for word in ids[:, 0].tolist()]


def plan_forward(model: Any, sizes: Sizes) -> ForwardPass:
    """The shortest way through a model, found by trying.

    Its head can be given a few places only where a trunk hands over hidden states and the head treats every token
    alike. A model whose logits come out differently that way, or not at all, keeps making all of them.

    Raises:
        ModelError: mlx-lm's code fails on this model's sizes.
    """
    ids, places = mx.array([[0, 1, 0, 1], [1, 1, 0, 0]]), mx.array([1, 3, 6])
    whole = ForwardPass(model, None, sizes)
    try:
        wanted = whole.logits_at(ids, places).astype(mx.float32)
        mx.eval(wanted)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ModelError(
            f"mlx-lm cannot compute this {model.model_type}: {first_line(error)}", hint="use the torch backend for it"
        ) from None
    for name in (name for name in _TRUNKS if name in model):
        sieved = ForwardPass(model, name, sizes)
        with contextlib.suppress(ValueError, TypeError, AttributeError, IndexError):
            found = sieved.logits_at(ids, places).astype(mx.float32)
            if found.shape == wanted.shape and mx.abs(found - wanted).max() <= 1e-2 * mx.abs(wanted).max():
                return sieved
    return whole


class _PackedMask:
    """Stands where mlx-lm expects a cache, to say who sees whom: rows that share a sequence never see each other.

    It keeps nothing. Positions go on through the sequence; a model that knows distances only cannot tell.
    """

    offset = 0

    def __init__(self, starts: mx.array) -> None:
        self._starts = starts

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, count: int, *, return_array: bool = False, window_size: int | None = None) -> mx.array:
        del return_array  # there is no shorter way to say it than the whole mask
        places = mx.arange(count)
        seen = (places[None] <= places[:, None]) & (places >= self._starts[..., None])
        if window_size is not None:
            seen = seen & (places[None] > places[:, None] - window_size)
        return seen[:, None]
