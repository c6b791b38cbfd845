"""GGUF's side of each model family: its keys, and the layout of its weights.

Sources: `convert_hf_to_gguf.py` and `src/models` of llama.cpp, the `configuration_*.py` of Hugging Face transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import ModelError
from finetune.export.rope import RopeSettings, read_rope
from finetune.export.settings import Settings

Array = NDArray[Any]
_SILU, _GELU_TANH = ("silu", "swish"), ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of llama.cpp.

    Attributes:
        permuted: GGUF interleaves the rotary halves of queries and keys.
        transposed: names of layers whose weights transformers stores as (inputs, outputs).
        norm_offset: added to the gains of norms; Gemma stores them less one.
        acts, scalings: the activations and rope scalings that llama.cpp computes for the family.
        head_width_equals_hidden: heads times head width must be the hidden size.
        always_tied: llama.cpp takes the embedding table for the output head.
    """

    arch: str
    acts: tuple[str, ...] = _SILU
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    permuted: bool = False
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0
    head_width_equals_hidden: bool = False
    always_tied: bool = False

    @property
    def activation_from_table(self) -> bool:
        """Whether llama.cpp looks the activation up in a table of f16 numbers."""
        return self.acts == _GELU_TANH


_LLAMA = Family("llama", scalings=("default", "linear", "yarn", "llama3"), permuted=True)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", head_width_equals_hidden=True),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", _GELU_TANH, ("default", "linear"), norm_offset=1.0, always_tied=True),
    "gemma2": Family("gemma2", _GELU_TANH, ("default", "linear"), norm_offset=1.0, always_tied=True),
    "gemma3_text": Family("gemma3", _GELU_TANH, ("default", "linear"), norm_offset=1.0),
    "phi3": Family("phi3", scalings=("default", "longrope"), head_width_equals_hidden=True),
    "gpt2": Family("gpt2", _GELU_TANH, transposed=("c_attn", "c_proj", "c_fc")),
}
"""The families that can be written, by `model_type`."""


@dataclass(frozen=True, slots=True)
class Described:
    """A model's GGUF keys, the tensors that follow from its settings, and notes for the user."""

    family: Family
    metadata: dict[str, Any]
    extra: dict[str, Array]
    heads: int
    kv_heads: int
    notes: tuple[str, ...] = ()

    @property
    def tried_context(self) -> int:
        """The longest context in which llama.cpp computes what the trainer does.

        With LongRoPE llama.cpp takes the long factors for any text once it is opened for more than the original
        context, while transformers chooses by the length of the text.
        """
        context: int = self.metadata[f"{self.family.arch}.context_length"]
        original: int = self.metadata.get(f"{self.family.arch}.rope.scaling.original_context_length", context)
        return min(context, original) if "rope_factors_short.weight" in self.extra else context


def family_of(config: Mapping[str, object]) -> Family:
    """The family of a config.

    Raises:
        ModelError: GGUF is not written for this architecture; those for which it is are listed.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(
            f"model_type {kind!r} cannot be written as GGUF", hint=f"what can be: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]


def describe_model(config: Mapping[str, object], *, tied: bool, vocab_size: int) -> Described:
    """The GGUF keys of a config.

    Args:
        tied: the embedding table is the output head too.
        vocab_size: the rows of that table.

    Raises:
        ModelError: llama.cpp does not compute this architecture, or one of its settings.
    """
    family = family_of(config)
    settings = Settings(config)
    if family.always_tied and not tied:
        raise ModelError(
            f"this {family.arch} has an output head of its own, and llama.cpp takes the embedding table for it",
            hint="export it where the head is tied",
        )
    act = config.get("hidden_activation") or config.get("hidden_act") or config.get("activation_function")
    if family.arch == "gemma" and act == "gelu":  # transformers computes tanh's approximation for it all the same
        act = "gelu_pytorch_tanh"
    settings.require("hidden_act", act, family.acts)
    described = _gpt2(settings, family) if family.arch == "gpt2" else _with_rope(settings, family)
    described.metadata[f"{family.arch}.vocab_size"] = vocab_size
    return described


def _gpt2(settings: Settings, family: Family) -> Described:
    settings.require(
        "scale_attn_by_inverse_layer_idx", settings.get("scale_attn_by_inverse_layer_idx", False), (False,)
    )
    settings.require("scale_attn_weights", settings.get("scale_attn_weights", True), (True,))
    width, heads = settings.whole("n_embd", "hidden_size"), settings.whole("n_head", "num_attention_heads")
    metadata = {
        "block_count": settings.whole("n_layer", "num_hidden_layers"),
        "context_length": settings.whole("n_positions", "n_ctx", "max_position_embeddings"),
        "embedding_length": width,
        "feed_forward_length": settings.whole("n_inner", default=4 * width),
        "attention.head_count": heads,
        "attention.layer_norm_epsilon": settings.number("layer_norm_epsilon", default=1e-5),
    }
    return Described(family, {f"gpt2.{key}": value for key, value in metadata.items()}, {}, heads, heads)


def _with_rope(settings: Settings, family: Family) -> Described:
    width, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    kv_heads = settings.whole("num_key_value_heads", default=heads)
    head = settings.whole("head_dim", default=width // heads)
    if family.head_width_equals_hidden and heads * head != width:
        raise ModelError(
            f"{heads} heads of {head} are not as wide as the model ({width}), which llama.cpp wants of {family.arch}",
            hint="this model cannot be written as GGUF",
        )
    newer = settings.get("rope_parameters")
    inner = newer.get("partial_rotary_factor", 1.0) if isinstance(newer, Mapping) else 1.0
    partial = settings.number("partial_rotary_factor", default=float(inner))
    if partial != 1 and family.arch != "phi3":
        raise ModelError(f"partial_rotary_factor is {partial}, and llama.cpp turns all of a head of {family.arch}")
    context, notes = _context(settings, family)
    rope = read_rope(settings, family.scalings, int(head * partial), context)
    metadata: dict[str, Any] = {
        "block_count": settings.whole("num_hidden_layers"),
        "context_length": context,
        "embedding_length": width,
        "feed_forward_length": settings.whole("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": settings.number("rms_norm_eps", default=1e-6),
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": int(head * partial),
        **rope.metadata,
        **_windows_and_caps(settings, family, rope, head),
    }
    named = {f"{family.arch}.{key}": value for key, value in metadata.items()}
    return Described(family, named, rope.tensors, heads, kv_heads, (*notes, *rope.notes))


def _context(settings: Settings, family: Family) -> tuple[int, tuple[str, ...]]:
    """The context length, cut to the sliding window where llama.cpp has no window for the family."""
    context = settings.whole("max_position_embeddings")
    window = settings.get("sliding_window")
    used = (
        window is not None and settings.get("use_sliding_window") is not False and not family.arch.startswith("gemma")
    )
    if not used or int(window) >= context:
        return context, ()
    note = f"context cut from {context} to the sliding window, {window}: llama.cpp would look beyond it"
    return int(window), (note,)


def _windows_and_caps(settings: Settings, family: Family, rope: RopeSettings, head: int) -> dict[str, Any]:
    """The keys that only Phi-3 and Gemma have: sliding windows and caps of logits."""
    if family.arch == "phi3":
        return {"attention.sliding_window": 0}
    if family.arch not in ("gemma2", "gemma3"):
        return {}
    layers = settings.whole("num_hidden_layers")
    every = 2 if family.arch == "gemma2" else settings.whole("sliding_window_pattern", default=6)
    kinds = settings.get("layer_types") or [
        "sliding_attention" if (index + 1) % every else "full_attention" for index in range(layers)
    ]
    scale = settings.number("query_pre_attn_scalar", default=float(head))
    # llama.cpp has no key for this scale: it takes the head width, but hidden / heads in the 27B models, which it tells
    # by their number of layers.
    largest = (family.arch, layers) in (("gemma2", 46), ("gemma3", 62))
    computed = settings.whole("hidden_size") // settings.whole("num_attention_heads") if largest else head
    settings.require("query_pre_attn_scalar", scale, (float(computed),))
    own: dict[str, Any] = {
        "attention.sliding_window": settings.whole("sliding_window"),
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
    }
    if family.arch == "gemma2":
        own["attn_logit_softcapping"] = settings.number("attn_logit_softcapping")
    else:
        settings.require("attn_logit_softcapping", settings.get("attn_logit_softcapping"), (None,))
        own["rope.freq_base_swa"] = rope.local_theta
    if settings.get("final_logit_softcapping") is not None:
        own["final_logit_softcapping"] = settings.number("final_logit_softcapping")
    elif family.arch == "gemma2":
        settings.require("final_logit_softcapping", None, ("a number",))
    return own


def to_gguf_layout(described: Described, name: str, weight: Array) -> Array:
    """A weight as GGUF stores it; `name` is that of the model's own files."""
    module, family = name.split(".")[-2] if "." in name else name, described.family
    if module in family.transposed and weight.ndim == 2:
        return weight.T
    if heads := permuted_heads(described, module):
        return interleave(weight, heads)
    return weight + family.norm_offset if module.endswith("norm") else weight


def from_gguf_layout(described: Described, name: str, weight: Array) -> Array:
    """A weight as transformers stores it, of GGUF's: the inverse of `to_gguf_layout`."""
    module, family = name.split(".")[-2], described.family
    if module in family.transposed and weight.ndim == 2:
        return weight.T
    if heads := permuted_heads(described, module):
        return separate(weight, heads)
    return weight - np.float32(family.norm_offset) if module.endswith("norm") and family.norm_offset else weight


def interleaved_rows(described: Described, name: str, rows: Array) -> Array:
    """Rows that a weight of this name makes (such as LoRA's B), in GGUF's order."""
    heads = permuted_heads(described, name.split(".")[-2])
    return interleave(rows, heads) if heads else rows


def permuted_heads(described: Described, module: str) -> int:
    """The number of heads to interleave a module's rows by; 0 to keep their order."""
    if not described.family.permuted:
        return 0
    return {"q_proj": described.heads, "k_proj": described.kv_heads}.get(module, 0)


def interleave(rows: Array, heads: int) -> Array:
    """Take the rows of each head in turns from its first and its second half: 0, half, 1, half + 1, ...

    transformers rotates the pairs (i, i + half), llama.cpp's `llama` the pairs (2i, 2i + 1).
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def separate(rows: Array, heads: int) -> Array:
    """Put the rows of each head back in halves: the inverse of `interleave`."""
    turns = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(turns.swapaxes(1, 2)).reshape(rows.shape)
