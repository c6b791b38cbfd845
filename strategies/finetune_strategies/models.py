"""Tiny models of awkward sizes: the config that a backend's `create` takes, and the shape that its files then have.

Equal sizes hide faults, so there are few: heads are no power of two and mostly share their keys, the heads together
are seldom as wide as the model, vocabularies are no multiple of 64, and no two sides of a matrix need be alike.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

from finetune.records import LinearLayer, ModelShape
from finetune_strategies.picks import EITHER, between, pick

Config = dict[str, Any]

_HEADS = ((3, 1), (5, 1), (6, 3), (6, 2), (3, 3), (5, 5))
"""(heads, key heads), the plainest first; only in the last two has each head a key head of its own."""
_ROPES: tuple[Config, ...] = (
    {"rope_theta": 30.0},
    {"rope_theta": 500_000.0},
    {"rope_parameters": {"rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
)
"""RoPE's base as older and newer configs write it."""
_ANY_ROPE = st.sampled_from(_ROPES)
_MOSTLY_TIED = st.sampled_from([True, True, False])


def _vocabularies(fixed: int | None) -> st.SearchStrategy[int]:
    return pick(61, 97, 131) if fixed is None else pick(fixed)


@st.composite
def llama_configs(draw: st.DrawFn, *, vocab_size: int | None = None, context: int = 24) -> Config:
    """Configs of tiny Llamas that every backend computes; `vocab_size` is drawn when it is not given."""
    heads, keys = draw(pick(*_HEADS))
    # transformers wants the width to be a multiple of the heads; an odd one, so that even heads never fill it.
    sizes: Config = {"hidden_size": heads * draw(pick(3, 5)), "head_dim": draw(pick(2, 6, 10))}
    if draw(between(0, 5)) == 5:  # as in most real configs: the width of a head follows from the others
        sizes = {"hidden_size": heads * draw(pick(2, 6))}
    return {
        "model_type": "llama",
        "vocab_size": draw(_vocabularies(vocab_size)),
        **sizes,
        "intermediate_size": draw(pick(7, 13)),
        "num_hidden_layers": draw(between(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "max_position_embeddings": context,
        "tie_word_embeddings": draw(EITHER),
        "rms_norm_eps": draw(pick(1e-6, 1e-5, 0.02)),
        **draw(_ANY_ROPE),
        "initializer_range": 0.4,
        "pad_token_id": 0,
    }


@st.composite
def gpt2_configs(draw: st.DrawFn, *, vocab_size: int | None = None, context: int = 24) -> Config:
    """Configs of tiny GPT-2s: weights stored the other way round, learned positions, biases, perhaps dropout."""
    heads = draw(pick(3, 5, 6, 7))
    width = heads * draw(pick(2, 3))
    dropout = draw(pick(0.0, 0.1))
    return {
        "model_type": "gpt2",
        "vocab_size": draw(_vocabularies(vocab_size)),
        "n_embd": width,
        "n_inner": draw(pick(None, 13)),
        "n_head": heads,
        "n_layer": draw(between(1, 2)),
        "n_positions": context,
        "tie_word_embeddings": draw(_MOSTLY_TIED),
        "layer_norm_epsilon": draw(pick(1e-5, 0.02)),
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "initializer_range": 0.4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def model_configs(*, vocab_size: int | None = None, context: int = 24) -> st.SearchStrategy[Config]:
    """Configs of tiny Llamas and GPT-2s."""
    return llama_configs(vocab_size=vocab_size, context=context) | gpt2_configs(vocab_size=vocab_size, context=context)


def model_shapes() -> st.SearchStrategy[ModelShape]:
    """Shapes of tiny models, as a look at their files would tell them."""
    return model_configs().map(shape_of_config)


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape that the files of a model with this config have: each layer and each number, counted by hand."""
    llama = config["model_type"] == "llama"
    width = config["hidden_size" if llama else "n_embd"]
    depth = config["num_hidden_layers" if llama else "n_layer"]
    block = dict(_llama_block(config) if llama else _gpt2_block(config))
    path = "model.layers" if llama else "transformer.h"
    layers = {f"{path}.{index}.{name}": shape for index in range(depth) for name, shape in block.items()}
    tables = config["vocab_size"] * width * (1 if config.get("tie_word_embeddings") else 2)
    rest = (2 * depth + 1) * width  # two norms a block and one at the end
    if not llama:
        inner = config["n_inner"] or 4 * width
        biases = 3 * width + width + inner + width
        rest = depth * (biases + 4 * width) + 2 * width + config["n_positions"] * width
    heads = config["num_attention_heads" if llama else "n_head"]
    return ModelShape(
        architecture="LlamaForCausalLM" if llama else "GPT2LMHeadModel",
        parameters=sum(rows * columns for rows, columns in layers.values()) + tables + rest,
        vocab_size=config["vocab_size"],
        hidden_size=width,
        layers=depth,
        context_length=config["max_position_embeddings" if llama else "n_positions"],
        linear_layers=tuple(LinearLayer(name, layers[name]) for name in sorted(layers)),
        heads=heads,
        kv_heads=config["num_key_value_heads"] if llama else heads,
        head_dim=config.get("head_dim") or width // heads,
        intermediate_size=config["intermediate_size"] if llama else inner,
        tied_head=bool(config.get("tie_word_embeddings")),
        attention_dropout=config.get("attn_pdrop", 0.0),
        hidden_dropout=config.get("resid_pdrop", 0.0),
        weights={f"{name}.weight": shape for name, shape in layers.items()} | dict(_other_weights(config)),
    )


def _other_weights(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tables, norms and biases."""
    llama = config["model_type"] == "llama"
    width, words = config["hidden_size" if llama else "n_embd"], config["vocab_size"]
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (words, width)
    if llama:
        yield "model.embed_tokens.weight", (words, width)
        yield "model.norm.weight", (width,)
        for index in range(config["num_hidden_layers"]):
            yield f"model.layers.{index}.input_layernorm.weight", (width,)
            yield f"model.layers.{index}.post_attention_layernorm.weight", (width,)
        return
    yield "transformer.wte.weight", (words, width)
    yield "transformer.wpe.weight", (config["n_positions"], width)
    norms = ["ln_f", *(f"h.{index}.{norm}" for index in range(config["n_layer"]) for norm in ("ln_1", "ln_2"))]
    for norm in norms:
        yield f"transformer.{norm}.weight", (width,)
        yield f"transformer.{norm}.bias", (width,)
    for index in range(config["n_layer"]):
        for name, (_, outputs) in _gpt2_block(config):
            yield f"transformer.h.{index}.{name}.bias", (outputs,)


def _llama_block(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "self_attn.q_proj", (queries, width)
    yield "self_attn.k_proj", (keys, width)
    yield "self_attn.v_proj", (keys, width)
    yield "self_attn.o_proj", (width, queries)
    yield "mlp.gate_proj", (inner, width)
    yield "mlp.up_proj", (inner, width)
    yield "mlp.down_proj", (width, inner)


def _gpt2_block(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    width = config["n_embd"]
    inner = config["n_inner"] or 4 * width
    yield "attn.c_attn", (width, 3 * width)
    yield "attn.c_proj", (width, width)
    yield "mlp.c_fc", (width, inner)
    yield "mlp.c_proj", (inner, width)
