"""A Llama as arithmetic: what it computes, and the gradient of every weight, written out by hand in float64.

Letters in shapes: r rows, n tokens per row, t = r x n tokens, h hidden, d head width, k key heads, g query heads per
key head, m positions attended to, v vocabulary. A forward function returns its value and a `Backward`, which turns the
gradient of the value into the gradient of the input and adds the gradients of the weights on its way.

Source: `modeling_llama.py` of Hugging Face transformers, whose parts in float32 are float64 here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.kind import LayerPass
from finetune.adapters.kinds import kind_of
from finetune.adapters.peft_files import layer_tensors, rows_name, saved_name
from finetune.backends.reference.adapter import ReferenceAdapter
from finetune.backends.reference.architecture import EMBEDDING, FINAL_NORM, HEAD, Architecture, block_path

Array = NDArray[np.float64]
Backward = Callable[[Array], Array]


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one trip stand: the same for each of its layers, so it is made once."""

    rows: int
    tokens: int
    past: int
    """How many tokens of each row went through the model before these."""
    angles: tuple[Array, Array]
    seen: NDArray[np.bool_]


@dataclass
class ReferencePass:
    """One trip through the model: forward, and back when `with_gradients` names tensors whose gradients are to be made.

    `weights` are the base's, or the adapter's own where it trains a module or rows. `random` draws the dropout of the
    adapter's inputs; without it the model is at rest. `cache` keeps the keys and
    values of each layer from one trip to the next, so that a continuation needs only its new tokens.
    """

    shape: Architecture
    weights: Mapping[str, Array]
    adapter: ReferenceAdapter | None = None
    with_gradients: frozenset[str] = frozenset()
    random: np.random.Generator | None = None
    gradients: dict[str, Array] = field(default_factory=dict)
    cache: dict[str, tuple[Array, Array]] | None = None

    def hidden(self, ids: NDArray[np.int64], starts: NDArray[np.int64]) -> tuple[Array, Backward]:
        """The last hidden states (t, h) of ids (r, n), padded on the right: no real token ever sees what follows it.

        `starts` (r, n) says where in its sequence the row of each token starts: what stands before, it never sees.
        """
        embedding = f"{EMBEDDING}.weight"
        x = self.weights[embedding][ids.reshape(-1)]
        positions = self._positions(starts, x.dtype)
        backs = []
        for index in range(self.shape.num_hidden_layers):
            x, back = self.block(block_path(index), x, positions)
            backs += [back] if self.with_gradients else []
        x, norm_back = self.norm(FINAL_NORM, x)

        def backward(dx: Array) -> Array:
            dx = norm_back(dx)
            for back in reversed(backs):
                dx = back(dx)
            if embedding in self.with_gradients:
                table = np.zeros_like(self.weights[embedding])
                np.add.at(table, ids.reshape(-1), dx)
                self._add(embedding, table)
            return dx

        return x, backward

    def block(self, path: str, x: Array, positions: Positions) -> tuple[Array, Backward]:
        """One layer (t, h) -> (t, h): each half reads the normalised stream and adds to it."""
        normed, norm_back = self.norm(f"{path}.input_layernorm", x)
        attended, attention_back = self.attention(f"{path}.self_attn", normed, positions)
        middle = x + attended
        normed, second_norm_back = self.norm(f"{path}.post_attention_layernorm", middle)
        thought, mlp_back = self.mlp(f"{path}.mlp", normed)

        def backward(dy: Array) -> Array:
            dy = dy + second_norm_back(mlp_back(dy))
            return dy + norm_back(attention_back(dy))

        return middle + thought, backward

    def norm(self, path: str, x: Array) -> tuple[Array, Backward]:
        """RMSNorm (t, h) -> (t, h): each token divided by its root mean square, then scaled by a gain (h,)."""
        gain = self.weights[f"{path}.weight"]
        width = x.shape[-1]
        scale = 1 / np.sqrt((x * x).sum(axis=-1, keepdims=True) / width + self.shape.rms_norm_eps)
        unit = x * scale

        def backward(dy: Array) -> Array:
            self._add(f"{path}.weight", (dy * unit).sum(axis=0))
            dunit = dy * gain
            along: Array = (dunit * unit).sum(axis=-1, keepdims=True) / width
            dx: Array = scale * (dunit - unit * along)
            return dx

        return unit * gain, backward

    def linear(self, path: str, x: Array) -> tuple[Array, Backward]:
        """(t, inputs) -> (t, outputs): x W^T, or what the adapter makes of that where one sits."""
        name = f"{EMBEDDING if path == HEAD and self.shape.tie_word_embeddings else path}.weight"
        weight = self.weights[name]
        if self.adapter and path in self.adapter.layers:
            return self.adapter_output(path, x, weight)

        def backward(dy: Array) -> Array:
            dx: Array = dy @ weight
            if name in self.with_gradients:
                self._add(name, dy.T @ x)
            return dx

        return x @ weight.T, backward

    def adapter_output(self, path: str, x: Array, weight: Array) -> tuple[Array, Backward]:
        """What a layer with an adapter makes of x, as the adapter's kind has it; its own weight is frozen."""
        assert self.adapter is not None
        target, parts = self.adapter.target, self.adapter.layers[path]
        keep = self._dropout(x.shape, target.dropout)
        kept = x if keep is None else x * keep
        seen = LayerPass(x, kept, keep, lambda read: read @ weight.T, lambda: weight, None, target.scale_of(path))
        y, saved = kind_of(target).forward(np, parts, seen)

        def backward(dy: Array) -> Array:
            dx: Array
            gradients, dx = kind_of(target).backward(parts, seen, saved, dy)
            names = layer_tensors(target, path)
            for key, gradient in gradients.items():
                self._add(names[key], gradient)
            return dx

        return y, backward

    def attention(self, path: str, x: Array, positions: Positions) -> tuple[Array, Backward]:
        """Causal attention (t, h) -> (t, h). The g query heads that share a key head are simply more of its queries."""
        rows, tokens, keys = positions.rows, positions.tokens, self.shape.num_key_value_heads
        (q, q_back), (k, k_back), (v, v_back) = (self.linear(f"{path}.{name}_proj", x) for name in "qkv")
        angles = positions.angles
        q = _rotated(_split(q, rows, tokens, self.shape.head_dim), angles).reshape(rows, keys, -1, self.shape.head_dim)
        k = _rotated(_split(k, rows, tokens, self.shape.head_dim), angles)
        v = _split(v, rows, tokens, self.shape.head_dim)
        if self.cache is not None:
            if positions.past:
                k, v = (np.concatenate(pair, axis=2) for pair in zip(self.cache[path], (k, v), strict=True))
            self.cache[path] = k, v
        temperature = self.shape.head_dim**-0.5
        scores = q @ k.swapaxes(2, 3) * temperature
        chance = softmax(scores, positions.seen)  # (r, k, g x n, m)
        mixed = (chance @ v).reshape(rows, -1, tokens, self.shape.head_dim)
        y, o_back = self.linear(f"{path}.o_proj", _joined(mixed))

        def backward(dy: Array) -> Array:
            dmixed = _split(o_back(dy), rows, tokens, self.shape.head_dim).reshape(q.shape)
            dv = chance.swapaxes(2, 3) @ dmixed
            dscores = softmax_backward(chance, dmixed @ v.swapaxes(2, 3)) * temperature
            dq = (dscores @ k).reshape(rows, -1, tokens, self.shape.head_dim)
            dk = dscores.swapaxes(2, 3) @ q
            turned_back = angles[0], -angles[1]
            dx = q_back(_joined(_rotated(dq, turned_back))) + k_back(_joined(_rotated(dk, turned_back)))
            return dx + v_back(_joined(dv))

        return y, backward

    def mlp(self, path: str, x: Array) -> tuple[Array, Backward]:
        """SwiGLU (t, h) -> (t, h): down(silu(gate(x)) x up(x)), where silu(z) = z sigmoid(z)."""
        gate, gate_back = self.linear(f"{path}.gate_proj", x)
        up, up_back = self.linear(f"{path}.up_proj", x)
        sigmoid = 1 / (1 + np.exp(-gate))
        open_ = gate * sigmoid
        y, down_back = self.linear(f"{path}.down_proj", open_ * up)

        def backward(dy: Array) -> Array:
            dproduct = down_back(dy)
            slope = sigmoid * (1 + gate * (1 - sigmoid))
            return gate_back(dproduct * up * slope) + up_back(dproduct * open_)

        return y, backward

    def _positions(self, starts: NDArray[np.int64], dtype: np.dtype[Any]) -> Positions:
        """What attention asks of the places of a trip, given where in its sequence each token's row starts (r, n).

        RoPE turns the i-th pair of a head by position x theta^(-2i/d): cosine and sine (r, 1, n, d/2). A query sees
        (r, 1, g x n, m) no position after its own and none before its row's start.
        """
        (rows, tokens), width = starts.shape, self.shape.head_dim
        past = next(iter(self.cache.values()))[0].shape[2] if self.cache else 0
        places = past + np.arange(tokens)
        table = _turns(1 << (past + tokens).bit_length(), width, self.shape.rope_theta)
        cos, sin = (part[places - starts][:, None].astype(dtype, copy=False) for part in table)
        keys = np.arange(past + tokens)
        seen = (keys <= places[:, None]) & (keys >= starts[:, :, None])
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        return Positions(rows, tokens, past, (cos, sin), np.tile(seen, (1, group, 1))[:, None])

    def _dropout(self, shape: tuple[int, ...], rate: float) -> Array | None:
        """What to multiply with: 0 with probability `rate`, else 1 / (1 - rate); None when nothing is dropped."""
        if self.random is None or rate == 0:
            return None
        return (self.random.random(shape) >= rate) / (1 - rate)

    def _add(self, name: str, gradient: Array) -> None:
        if name not in self.with_gradients:
            return
        path = name.removesuffix(".weight")
        if self.adapter and path in self.adapter.rows:
            name, gradient = rows_name(path), gradient[list(self.adapter.target.rows[path])]
        elif self.adapter and name in self.adapter.saved:
            name = saved_name(name)
        self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient


def softmax(scores: Array, seen: NDArray[np.bool_]) -> Array:
    """Each last axis as probabilities, 0 where `seen` is not; `scores` are used up."""
    np.copyto(scores, -np.inf, where=~seen)
    scores -= scores.max(axis=-1, keepdims=True)
    raised = np.exp(scores, where=seen, out=np.zeros_like(scores))  # an exponential costs more than all else here
    raised /= raised.sum(axis=-1, keepdims=True)
    return raised


def softmax_backward(chance: Array, dchance: Array) -> Array:
    """The gradient of the scores from that of the probabilities."""
    mean: Array = (dchance * chance).sum(axis=-1, keepdims=True)
    return chance * (dchance - mean)


def cross_entropy(logits: Array, targets: NDArray[np.int64], smoothing: float = 0.0) -> tuple[Array, Array]:
    """The loss in nats of each target (n,) from logits (n, v), and the gradient of its own logits, (n, v).

    With smoothing, the target is (1 - smoothing) of the right word and smoothing / v of every word.
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    chance = np.exp(shifted)
    total = chance.sum(axis=-1, keepdims=True)
    chance /= total
    right = np.arange(len(targets)), targets
    missed: Array = np.log(total[:, 0])
    if not smoothing:
        chance[right] -= 1
        return missed - shifted[right], chance
    chance[right] -= 1 - smoothing
    chance -= smoothing / logits.shape[-1]
    return missed - (1 - smoothing) * shifted[right] - smoothing * shifted.mean(axis=-1), chance


@lru_cache(maxsize=8)
def _turns(length: int, width: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine (length, d/2) of every angle up to a length; most trips ask for the same."""
    angles = np.arange(length)[:, None] * theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    return np.cos(angles), np.sin(angles)


def _rotated(x: Array, angles: tuple[Array, Array]) -> Array:
    """RoPE on (r, heads, n, d): element i of a head's first half turns with element i of its second half."""
    half, (cos, sin) = x.shape[-1] // 2, angles
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _split(x: Array, rows: int, tokens: int, width: int) -> Array:
    """(t, heads x d) -> (r, heads, n, d)."""
    return x.reshape(rows, tokens, -1, width).transpose(0, 2, 1, 3)


def _joined(x: Array) -> Array:
    """(r, heads, n, d) -> (t, heads x d)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0] * x.shape[2], -1)
