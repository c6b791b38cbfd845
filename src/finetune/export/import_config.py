"""Makes a model's `config.json` of GGUF's keys, and names tensors as transformers does: the inverse of `families`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import ModelError
from finetune.export.blueprint import gguf_names
from finetune.export.families import FAMILIES, Described, Family, describe_model
from finetune.export.rope import rope_parameters, shortest
from finetune.models.gguf_file import GgufFile

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""The class of transformers by `model_type`; Mistral, which GGUF does not tell from Llama, is read as Llama."""
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are settings."""
_BIAS_SETTING = ("llama", "qwen3", "gemma", "gemma2", "gemma3")
"""Families whose config says whether attention has biases."""
_MOST = 1 << 31
_GET = "get the file again, or the model's own files"

# The sides of each weight as transformers stores it: h hidden, i inner, q all heads, k all key heads, d one head,
# a queries, keys and values, g gate and up, v vocabulary, c context.
_NORMS = {"input_layernorm": "h", "post_attention_layernorm": "h"}
_HEADS = {"self_attn.q_proj": "qh", "self_attn.k_proj": "kh", "self_attn.v_proj": "kh", "self_attn.o_proj": "hq"}
_GATED = {"mlp.gate_proj": "ih", "mlp.up_proj": "ih", "mlp.down_proj": "hi"}
_HEAD_NORMS = {"self_attn.q_norm": "d", "self_attn.k_norm": "d"}
_MORE_NORMS = {"pre_feedforward_layernorm": "h", "post_feedforward_layernorm": "h"}
_PACKED = {"self_attn.qkv_proj": "ah", "self_attn.o_proj": "hq", "mlp.gate_up_proj": "gh", "mlp.down_proj": "hi"}
_LLAMA = {**_NORMS, **_HEADS, **_GATED}
_BLOCKS: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, **_HEAD_NORMS},
    "gemma": _LLAMA,
    "gemma2": {**_LLAMA, **_MORE_NORMS},
    "gemma3": {**_LLAMA, **_MORE_NORMS, **_HEAD_NORMS},
    "phi3": {**_NORMS, **_PACKED},
    "gpt2": {"ln_1": "h", "attn.c_attn": "ha", "attn.c_proj": "hh", "ln_2": "h", "mlp.c_fc": "hi", "mlp.c_proj": "ih"},
}
_OUTER = {"model.embed_tokens": "vh", "model.norm": "h"}
_OUTER_GPT2 = {"transformer.wte": "vh", "transformer.wpe": "ch", "transformer.ln_f": "h"}


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """A model before it is written: its config, and by each weight's name the tensor of GGUF that holds it."""

    config: dict[str, Any]
    described: Described
    places: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Keys:
    """The architecture's own keys, each held to what it may be."""

    arch: str
    metadata: Mapping[str, Any]

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.arch}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < _MOST:
            raise ModelError(f"{self.arch}.{key} is {str(value)[:80]}, not a whole number from 1 to {_MOST}", hint=_GET)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ModelError(f"{self.arch}.{key} is {str(value)[:80]}, not a number", hint=_GET)
        return shortest(value)

    def rope(self) -> dict[str, Any]:
        """The keys of the rotation, without the prefix."""
        start = f"{self.arch}."
        found = {
            key.removeprefix(start): value for key, value in self.metadata.items() if key.startswith(f"{start}rope")
        }
        words = ("rope.scaling.type", "rope.scaling.finetuned")
        for key in found:
            if key not in words:
                self.number(key)
        return found


def plan_import(file: GgufFile) -> ImportPlan:
    """Read which model a file holds.

    Raises:
        ModelError: it holds none that is known, or lacks something of it, or says what contradicts its tensors.
    """
    kind, family = _family(file)
    keys = _Keys(family.arch, file.metadata)
    tied = "output.weight" not in file.tensors
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError(f"{file.path} has no table token_embd.weight", hint=_GET)
    layers = keys.whole("block_count")
    if layers > len(file.tensors):
        raise ModelError(
            f"{family.arch}.block_count is {layers:,}, and the file holds {len(file.tensors):,} tensors in all",
            hint=_GET,
        )
    config = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        **(_gpt2(keys) if family.arch == "gpt2" else _with_rope(kind, family, keys, file)),
        "vocab_size": table.shape[0],
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    described = describe_model(config, tied=tied, vocab_size=table.shape[0])
    wanted = _weights(family, config, layers, described)
    names = gguf_names(family.arch, layers, wanted)
    _hold_to(file, described, {names[name]: (name, shape) for name, shape in wanted.items()})
    _hold_keys(file, described)
    read = {key.removeprefix(f"{family.arch}.") for key in described.metadata} | {"rope.scaling.type"}
    unread = sorted(
        key for key in file.metadata if key.startswith(f"{family.arch}.") and key[len(family.arch) + 1 :] not in read
    )
    notes = (f"keys that say nothing to this family: {', '.join(unread)[:300]}",) if unread else ()
    return ImportPlan(config, described, names, notes)


def _family(file: GgufFile) -> tuple[str, Family]:
    arch, kind = file.metadata.get("general.architecture"), file.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            f"{file.path} is of general.type {str(kind)[:80]!r}, not a model", hint="name the model's file"
        )
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(
            f"{file.path} is one of several files", hint="join them: llama-gguf-split --merge FIRST OUTPUT"
        )
    found = next(((kind, family) for kind, family in FAMILIES.items() if family.arch == arch), None)
    if found is None:
        known = ", ".join(sorted({family.arch for family in FAMILIES.values()}))
        raise ModelError(
            f"{file.path}: general.architecture is {str(arch)[:80]!r}, which cannot be read",
            hint=f"what can be: {known}",
        )
    return found


def _gpt2(keys: _Keys) -> dict[str, Any]:
    width, context = keys.whole("embedding_length"), keys.whole("context_length")
    return {
        "n_embd": width,
        "n_head": keys.whole("attention.head_count"),
        "n_layer": keys.whole("block_count"),
        "n_positions": context,
        "n_ctx": context,
        "n_inner": keys.whole("feed_forward_length", 4 * width),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _with_rope(kind: str, family: Family, keys: _Keys, file: GgufFile) -> dict[str, Any]:
    width, heads, context = (keys.whole(key) for key in ("embedding_length", "attention.head_count", "context_length"))
    head = keys.whole("attention.key_length", width // heads or None)
    if (value := keys.whole("attention.value_length", head)) != head:
        raise ModelError(f"{keys.arch}.attention.value_length is {value}, and key_length {head}", hint=_GET)
    turned, kv_heads = keys.whole("rope.dimension_count", head), keys.whole("attention.head_count_kv", heads)
    if heads % kv_heads or turned % 2 or turned > head:
        raise ModelError(
            f"{heads} heads of {head} numbers and {kv_heads} key heads, {turned} turned, do not fit together",
            hint=_GET,
        )
    factors = {
        name: file.read(name) for name in FACTORS if name in file.tensors and file.tensors[name].shape[0] < _MOST
    }
    rope = rope_parameters(keys.rope(), factors, turned, context)
    config: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
    }
    config |= {} if family.head_width_equals_hidden else {"head_dim": head}
    act = "gelu_pytorch_tanh" if family.activation_from_table else "silu"
    config |= {"hidden_act": act, "hidden_activation": act} if family.arch.startswith("gemma") else {"hidden_act": act}
    if turned != head:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"] = turned / head
    if family.arch in _BIAS_SETTING:
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
    if kind == "llama":
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    if kind == "phi3":
        config["sliding_window"] = None
        if original := keys.get("rope.scaling.original_context_length"):
            config["original_max_position_embeddings"] = original
    return config | (_gemma(family, keys, config) if family.arch in ("gemma2", "gemma3") else {})


def _gemma(family: Family, keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding windows, caps of logits and the two rotations of Gemma 2 and 3."""
    layers, every = config["num_hidden_layers"], keys.get("attention.sliding_window_pattern")
    if every is None or type(every) is int:
        period = every or (2 if family.arch == "gemma2" else 6)
        every = [bool((index + 1) % period) for index in range(layers)]
    if not isinstance(every, list) or len(every) != layers or {*every} - {False, True}:
        raise ModelError(f"{keys.arch}.attention.sliding_window_pattern must say yes or no to each layer", hint=_GET)
    # The scale that llama.cpp takes, for which GGUF has no key: as in `families`.
    largest = (family.arch, layers) in (("gemma2", 46), ("gemma3", 62))
    scale = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if family.arch == "gemma2" else {}
    own: dict[str, Any] = {key: keys.number(key, default) for key, default in caps.items()}
    if family.arch == "gemma3":
        final = keys.get("final_logit_softcapping")
        local = keys.number("rope.freq_base_swa", 10_000.0)
        own = {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": keys.number("final_logit_softcapping") if final else None,
        }
        own["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return {
        **own,
        "sliding_window": keys.whole("attention.sliding_window"),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in every],
        "query_pre_attn_scalar": scale,
    }


def _weights(
    family: Family, config: Mapping[str, Any], layers: int, described: Described
) -> dict[str, tuple[int, ...]]:
    """The name and the shape of each weight that the model has."""
    gpt2 = family.arch == "gpt2"
    hidden = config["n_embd" if gpt2 else "hidden_size"]
    head = config.get("head_dim") or hidden // described.heads
    queries, keys = described.heads * head, described.kv_heads * head
    inner = config["n_inner" if gpt2 else "intermediate_size"]
    sides = {"h": hidden, "i": inner, "q": queries, "k": keys, "d": head, "a": queries + 2 * keys, "g": 2 * inner}
    sides |= {"v": config["vocab_size"], "c": config["n_positions" if gpt2 else "max_position_embeddings"]}
    blocks, start = _BLOCKS[family.arch], "transformer.h" if gpt2 else "model.layers"
    modules = {**(_OUTER_GPT2 if gpt2 else _OUTER)}
    modules |= {f"{start}.{layer}.{module}": told for layer in range(layers) for module, told in blocks.items()}
    modules |= {} if config["tie_word_embeddings"] else {"lm_head": "vh"}
    wanted = {f"{module}.weight": tuple(sides[side] for side in told) for module, told in modules.items()}
    biased: tuple[str, ...] = ("q_proj", "k_proj", "v_proj") if family.arch == "qwen2" else ()
    biased += ("q_proj", "k_proj", "v_proj", "o_proj") if config.get("attention_bias") else ()
    biased += ("gate_proj", "up_proj", "down_proj") if config.get("mlp_bias") else ()
    biased += ("ln_1", "ln_2", "ln_f", "c_attn", "c_proj", "c_fc") if gpt2 else ()
    for module, told in modules.items():
        if (leaf := module.rsplit(".", 1)[-1]) in biased:
            wanted[f"{module}.bias"] = (sides[told[-1 if leaf in family.transposed else 0]],)
    return wanted


def _hold_to(file: GgufFile, described: Described, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse a file whose tensors are not those of the model that its keys describe, all problems at once."""
    there = {name for name in file.tensors if name not in FACTORS}
    problems = [f"tensor {name} is missing" for name in sorted(wanted.keys() - there)]
    problems += [f"tensor {name} has no place in a {described.family.arch}" for name in sorted(there - wanted.keys())]
    for place, (name, shape) in wanted.items():
        turned = len(shape) == 2 and name.split(".")[-2] in described.family.transposed
        expected = shape[::-1] if turned else shape
        if place in there and (found := file.tensors[place].shape) != expected:
            problems.append(f"tensor {place} is {found}, and by the keys it should be {expected}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{file.path}: {'; '.join(problems[:5])}{more}", hint=_GET)


def _hold_keys(file: GgufFile, described: Described) -> None:
    """Refuse what was read otherwise than it is written: each key that the config gives again is held to the file's."""
    for key, value in described.metadata.items():
        said = file.metadata.get(key)
        if said is None or key.endswith(("sliding_window_pattern", "attention.sliding_window", "vocab_size")):
            continue
        same = said == value if isinstance(value, int | str) else shortest(said) == shortest(value)
        if not same:
            raise ModelError(f"{file.path}: {key} is {str(said)[:80]}, which is read as {str(value)[:80]}", hint=_GET)
