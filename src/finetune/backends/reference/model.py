"""A Llama as arithmetic: what it computes, and the gradient of every weight, written out by hand in float64.

Letters in shapes: r rows, n tokens per row, t = r x n tokens, h hidden, d head width, k key heads, g query heads per
key head, m positions attended to, v vocabulary. A forward function returns its value and a `Backward`, which turns the
gradient of the value into the gradient of the input and adds the gradients of the weights on its way.

Source: `modeling_llama.py` of Hugging Face transformers, whose parts in float32 are float64 here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from finetune.backends.reference.adapter import Adapter, tensor_name

Array = NDArray[np.float64]
Backward = Callable[[Array], Array]
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes and constants of a Llama, under the names of its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Each linear layer's (outputs, inputs) by its path, in the order in which transformers names them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        block = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        layers = {f"{_block(i)}.{name}": shape for i in range(self.num_hidden_layers) for name, shape in block.items()}
        return layers if self.tie_word_embeddings else {**layers, HEAD: (self.vocab_size, hidden)}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its name, in the order of transformers; a tied head is no weight of its own."""
        linear = {f"{name}.weight": shape for name, shape in self.linear_layers().items()}
        shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_hidden_layers):
            shapes |= {name: shape for name, shape in linear.items() if name.startswith(f"{_block(index)}.")}
            shapes[f"{_block(index)}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"{_block(index)}.post_attention_layernorm.weight"] = (self.hidden_size,)
        head = {} if self.tie_word_embeddings else {f"{HEAD}.weight": linear[f"{HEAD}.weight"]}
        return {**shapes, f"{FINAL_NORM}.weight": (self.hidden_size,), **head}


@dataclass
class Pass:
    """One trip through the model: forward, and back when `wanted` names tensors whose gradients are to be made.

    `random` draws the dropout of the adapter's inputs; without it the model is at rest. `cache` keeps the keys and
    values of each layer from one trip to the next, so that a continuation needs only its new tokens.
    """

    shape: Architecture
    weights: Mapping[str, Array]
    adapter: Adapter | None = None
    wanted: frozenset[str] = frozenset()
    random: np.random.Generator | None = None
    gradients: dict[str, Array] = field(default_factory=dict)
    cache: dict[str, tuple[Array, Array]] | None = None

    def hidden(self, ids: NDArray[np.int64], real: NDArray[np.bool_]) -> tuple[Array, Backward]:
        """The last hidden states (t, h) of right-padded ids (r, n); `real` (r, n) is false where there is padding."""
        embedding = f"{EMBEDDING}.weight"
        x = self.weights[embedding][ids.reshape(-1)]
        backs = []
        for index in range(self.shape.num_hidden_layers):
            x, back = self.block(_block(index), x, real)
            backs += [back] if self.wanted else []
        x, norm_back = self.norm(FINAL_NORM, x)

        def backward(dx: Array) -> Array:
            dx = norm_back(dx)
            for back in reversed(backs):
                dx = back(dx)
            if embedding in self.wanted:
                table = np.zeros_like(self.weights[embedding])
                np.add.at(table, ids.reshape(-1), dx)
                self._add(embedding, table)
            return dx

        return x, backward

    def block(self, path: str, x: Array, real: NDArray[np.bool_]) -> tuple[Array, Backward]:
        """One layer (t, h) -> (t, h): each half reads the normalised stream and adds to it."""
        normed, norm_back = self.norm(f"{path}.input_layernorm", x)
        attended, attention_back = self.attention(f"{path}.self_attn", normed, real)
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
        scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.shape.rms_norm_eps)
        unit = x * scale

        def backward(dy: Array) -> Array:
            self._add(f"{path}.weight", (dy * unit).sum(axis=0))
            dunit = dy * gain
            along: Array = np.mean(dunit * unit, axis=-1, keepdims=True)
            return scale * (dunit - unit * along)

        return unit * gain, backward

    def linear(self, path: str, x: Array) -> tuple[Array, Backward]:
        """x W^T, (t, inputs) -> (t, outputs), plus alpha / rank x dropout(x) A^T B^T where the adapter sits."""
        name = f"{EMBEDDING if path == HEAD and self.shape.tie_word_embeddings else path}.weight"
        weight = self.weights[name]
        y = x @ weight.T
        pair = self.adapter.pairs.get(path) if self.adapter else None
        if self.adapter and pair:
            down, up, scale = *pair, self.adapter.scale
            keep = self._dropout(x.shape, self.adapter.target.dropout)
            kept = x if keep is None else x * keep
            small = kept @ down.T
            y += scale * (small @ up.T)

        def backward(dy: Array) -> Array:
            dx: Array = dy @ weight
            if name in self.wanted:
                self._add(name, dy.T @ x)
            if pair:
                dsmall = scale * (dy @ up)
                self._add(tensor_name(path, "A"), dsmall.T @ kept)
                self._add(tensor_name(path, "B"), scale * (dy.T @ small))
                dkept = dsmall @ down
                dx += dkept if keep is None else dkept * keep
            return dx

        return y, backward

    def attention(self, path: str, x: Array, real: NDArray[np.bool_]) -> tuple[Array, Backward]:
        """Causal attention (t, h) -> (t, h). The g query heads that share a key head are simply more of its queries."""
        rows, tokens, keys = *real.shape, self.shape.num_key_value_heads
        (q, q_back), (k, k_back), (v, v_back) = (self.linear(f"{path}.{name}_proj", x) for name in "qkv")
        start = self.cache[path][0].shape[2] if self.cache and path in self.cache else 0
        angles = self._angles(start, tokens)
        q = _rotated(_split(q, rows, tokens, self.shape.head_dim), angles).reshape(rows, keys, -1, self.shape.head_dim)
        k = _rotated(_split(k, rows, tokens, self.shape.head_dim), angles)
        v = _split(v, rows, tokens, self.shape.head_dim)
        if self.cache is not None:
            if start:
                k, v = (np.concatenate(pair, axis=2) for pair in zip(self.cache[path], (k, v), strict=True))
            self.cache[path] = k, v
        # (r, n, m): a token sees itself and what came before, and no padding. Cached tokens are all real.
        seen = np.tri(tokens, start + tokens, start, dtype=bool) & np.pad(real, ((0, 0), (start, 0)), constant_values=True)[:, None]  # fmt: skip  # noqa: E501
        group = self.shape.num_attention_heads // keys
        temperature = self.shape.head_dim**-0.5
        scores = np.where(np.tile(seen, (1, group, 1))[:, None], q @ k.swapaxes(2, 3) * temperature, -np.inf)
        chance = softmax(scores)  # (r, k, g x n, m)
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

    def _angles(self, start: int, tokens: int) -> tuple[Array, Array]:
        """Cosine and sine (n, d/2) of RoPE's angles: position x theta^(-2i/d) for the i-th pair of a head."""
        width = self.shape.head_dim
        frequencies = self.shape.rope_theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        angles = np.arange(start, start + tokens, dtype=np.float64)[:, None] * frequencies
        return np.cos(angles), np.sin(angles)

    def _dropout(self, shape: tuple[int, ...], rate: float) -> Array | None:
        """What to multiply with: 0 with probability `rate`, else 1 / (1 - rate); None when nothing is dropped."""
        if self.random is None or rate == 0:
            return None
        keep = self.random.random(shape) >= rate
        return keep / (1 - rate) if rate < 1 else np.zeros(shape)

    def _add(self, name: str, gradient: Array) -> None:
        if name in self.wanted:
            self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient


def softmax(scores: Array) -> Array:
    """Each last axis as probabilities; -inf becomes 0."""
    raised: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def softmax_backward(chance: Array, dchance: Array) -> Array:
    """The gradient of the scores from that of the probabilities."""
    return chance * (dchance - (dchance * chance).sum(axis=-1, keepdims=True))


def cross_entropy(logits: Array, targets: NDArray[np.int64]) -> tuple[float, Array]:
    """The summed loss in nats of logits (targets, v) and its gradient, of the same shape."""
    chance = softmax(logits)
    rows = np.arange(len(targets))
    shifted = logits - logits.max(axis=-1, keepdims=True) if len(targets) else logits
    loss = float((np.log(np.exp(shifted).sum(axis=-1)) - shifted[rows, targets]).sum())
    chance[rows, targets] -= 1
    return loss, chance


def _rotated(x: Array, angles: tuple[Array, Array]) -> Array:
    """RoPE on (r, heads, n, d): element i of a head's first half turns with element i of its second half."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = angles
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _split(x: Array, rows: int, tokens: int, width: int) -> Array:
    """(t, heads x d) -> (r, heads, n, d)."""
    return x.reshape(rows, tokens, -1, width).transpose(0, 2, 1, 3)


def _joined(x: Array) -> Array:
    """(r, heads, n, d) -> (t, heads x d)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0] * x.shape[2], -1)


def _block(index: int) -> str:
    return f"model.layers.{index}"
