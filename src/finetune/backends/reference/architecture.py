"""What a Llama's `config.json` says of its computation; whatever we do not compute is refused, not passed over."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import ModelError

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
_HINT = "use the torch backend for this model"
_ROPE_KEYS = {"rope_type", "type", "rope_theta"}


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
        paths = map(block_path, range(self.num_hidden_layers))
        layers = {f"{path}.{name}": shape for path in paths for name, shape in block.items()}
        return layers if self.tie_word_embeddings else {**layers, HEAD: (self.vocab_size, hidden)}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its name, in the order of transformers; a tied head is no weight of its own."""
        linear = {f"{name}.weight": shape for name, shape in self.linear_layers().items()}
        shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_hidden_layers):
            shapes |= {name: shape for name, shape in linear.items() if name.startswith(f"{block_path(index)}.")}
            shapes[f"{block_path(index)}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"{block_path(index)}.post_attention_layernorm.weight"] = (self.hidden_size,)
        head = {} if self.tie_word_embeddings else {f"{HEAD}.weight": linear[f"{HEAD}.weight"]}
        return {**shapes, f"{FINAL_NORM}.weight": (self.hidden_size,), **head}


def block_path(index: int) -> str:
    """The path of a layer's weights."""
    return f"model.layers.{index}"


def read_architecture(config: Mapping[str, object], owner: str) -> Architecture:
    """The architecture that a config describes, with the defaults of transformers for what it leaves out.

    Raises:
        ModelError: it is no Llama, or a Llama with something that the reference backend does not compute: biases,
            attention dropout, another activation than SiLU, another RoPE than the default one.
    """
    if config.get("model_type") != "llama":
        raise ModelError(
            f"{owner} is of type {config.get('model_type')!r}; the reference backend computes 'llama' only", hint=_HINT
        )
    _refuse_extras(config, owner)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    values: dict[str, Any] = {
        "num_key_value_heads": heads,
        "head_dim": hidden // heads if type(hidden) is int and type(heads) is int and heads > 0 else None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **{key: value for key, value in config.items() if value is not None},
        "rope_theta": rope_theta(config, owner),
    }
    for name, kind in Architecture.__annotations__.items():
        value = values.get(name)
        sound = type(value) is bool if kind is bool else type(value) in (int, kind) and value > 0  # type: ignore[operator]
        if not sound:
            raise ModelError(f"{owner}: {name} in config.json is {value!r}", hint="get the model's files again")
    shape = Architecture(**{name: values[name] for name in Architecture.__annotations__})
    if shape.num_attention_heads % shape.num_key_value_heads or shape.head_dim % 2:
        raise ModelError(
            f"{owner}: {shape.num_attention_heads} heads of {shape.head_dim} on {shape.num_key_value_heads} key heads: "
            "heads must divide evenly among the key heads, and a head's width into two halves"
        )
    return shape


def _refuse_extras(config: Mapping[str, object], owner: str) -> None:
    plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0}
    odd = {key: config[key] for key, value in plain.items() if config.get(key, value) != value}
    if odd:
        key = min(odd)
        told = ", ".join(f"{name} {value!r}" for name, value in plain.items())
        raise ModelError(f"{owner} has {key} {odd[key]!r}; the reference backend computes {told} only", hint=_HINT)


def rope_theta(config: Mapping[str, Any], owner: str) -> Any:
    """RoPE's base, from `rope_parameters` or, in older configs, from `rope_theta` next to `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    extras = sorted(set(rope) - _ROPE_KEYS) if isinstance(rope, dict) else []
    if kind != "default" or extras:
        told = f"rope_type {kind!r}" + (f" with {', '.join(extras)}" if extras else "")
        raise ModelError(f"{owner} has {told}; the reference backend computes rope_type 'default' only", hint=_HINT)
    return rope.get("rope_theta", config.get("rope_theta", 10000.0))
