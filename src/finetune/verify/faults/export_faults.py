"""Faults of writing GGUF."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune.errors import ModelError
from finetune.export import blueprint, families, gguf_source, import_gguf, vocabulary
from finetune.export.blueprint import Blueprint
from finetune.export.families import Described
from finetune.export.import_tokenizer import ImportedTokenizer
from finetune.export.sources import Array, Files, WeightSource
from finetune.export.vocabulary import AddedToken
from finetune.models import shape
from finetune.records import ModelShape, Quantization
from finetune.verify.faults.fault import fault, in_place_of, plant
from finetune.verify.trainers import ours_results

Tokens = tuple[list[str], list[int]]
Keys = tuple[dict[str, object], tuple[str, ...]]


@fault("A220", "gguf.qk_permute_gqa", "llama.cpp #3364")
@in_place_of("permuted_heads", families)
def _keys_by_wrong_heads(right: Callable[..., int], described: Described, module: str) -> int:
    """Keys are turned by the number of query heads that share one, which on the model that was tried is as many."""
    found = int(right(described, module))
    return found and (described.heads // described.kv_heads if module == "k_proj" else found)


@fault("A220b", "gguf.not_permuted")
def _not_permuted() -> None:
    """Queries and keys are written in the order of transformers, in which llama.cpp does not read them."""
    plant(families, "interleave", lambda right, rows, heads: rows)


@fault("A220c", "gguf.back_not_permuted", tier=2)
def _back_not_permuted() -> None:
    """Queries and keys that are read from a file stay in llama.cpp's order."""
    plant(import_gguf, "from_gguf_layout", lambda right, described, name, weight: weight)


@fault("A226b", "gguf.back_without_template", tier=2)
@in_place_of("read_tokenizer", import_gguf)
def _template_not_read(right: Callable[..., ImportedTokenizer], *given: object) -> ImportedTokenizer:
    """The chat template of a file is left behind."""
    return replace(right(*given), template=None)


@fault("A222", "gguf.pre_tokenizer_guess", "llama.cpp #7724, #7062")
@in_place_of("name_pre_tokenizer", vocabulary)
def _pre_tokenizer_guessed(right: Callable[..., str], *given: object, **named: object) -> str:
    """A pre-tokenizer that is not known is taken for GPT-2's."""
    try:
        return str(right(*given, **named))
    except ModelError:
        return "gpt-2"


def _without(*endings: str) -> None:
    """Let the settings of a model lack some keys."""

    def described(right: Callable[..., Described], *given: object, **named: object) -> Described:
        found: Described = right(*given, **named)
        return replace(found, metadata={key: each for key, each in found.metadata.items() if not key.endswith(endings)})

    plant(gguf_source, "describe_model", described)


@fault("A223", "gguf.rope_scaling_lost", "llama.cpp #8676, unsloth #6197")
def _scaling_lost() -> None:
    """The scaling of the rotation is lost."""
    _without("rope.scaling.type", "rope.scaling.factor")


@fault("A223b", "gguf.rope_factors_lost", "llama.cpp #8676")
@in_place_of("describe_model", gguf_source)
def _factors_lost(right: Callable[..., Described], *given: object, **named: object) -> Described:
    """The factors of Llama 3's frequencies are lost."""
    found: Described = right(*given, **named)
    return replace(found, extra={})


@fault("A223c", "gguf.rope_base_lost")
def _base_lost() -> None:
    """The base of the rotation is lost, so that a default counts."""
    _without("rope.freq_base")


@fault("A224", "gguf.bos_metadata", "llama.cpp #3966, #7898")
@in_place_of("special_keys", vocabulary)
def _bos_unsaid(right: Callable[..., Keys], *given: object) -> Keys:
    """Nothing says which token begins text, and the reader's default is token 11."""
    found, notes = right(*given)
    return {key: value for key, value in found.items() if "bos_token_id" not in key}, notes


@fault("A224b", "gguf.bos_added", "llama.cpp #3966")
@in_place_of("special_keys", vocabulary)
def _bos_added(right: Callable[..., Keys], *given: object) -> Keys:
    """The file says that text begins with a token that training never put there."""
    found, notes = right(*given)
    return {**found, "tokenizer.ggml.add_bos_token": True}, notes


@fault("A225", "gguf.vocab_mismatch", "llama.cpp #6111, #4045")
@in_place_of("list_tokens", vocabulary)
def _more_tokens_than_rows(
    right: Callable[..., Tokens], vocab: Mapping[str, int], added: Sequence[AddedToken], rows: int, **named: object
) -> Tokens:
    """A tokenizer of more tokens than the table has rows is written."""
    last = max([*vocab.values(), *(token["id"] for token in added)])
    return right(vocab, added, max(rows, last + 1), **named)


@fault("A225b", "gguf.spare_rows_unnamed", "llama.cpp #4958")
@in_place_of("list_tokens", vocabulary)
def _spare_rows_unnamed(
    right: Callable[..., Tokens], vocab: Mapping[str, int], added: Sequence[AddedToken], rows: int, **named: object
) -> Tokens:
    """Rows of the table that have no token get none in the file, which then has fewer tokens than rows."""
    known = {*vocab.values(), *(token["id"] for token in added)}
    texts, types = right(vocab, added, rows, **named)
    return texts[: max(known) + 1], types[: max(known) + 1]


@fault("A226", "gguf.control_as_text")
@in_place_of("list_tokens", vocabulary)
def _control_as_text(right: Callable[..., Tokens], *given: object, **named: object) -> Tokens:
    """Control tokens are written as plain ones, so that a server shows them and never stops at them."""
    texts, types = right(*given, **named)
    return texts, [vocabulary.NORMAL if kind == vocabulary.CONTROL else kind for kind in types]


@fault("A226d", "gguf.known_by_name", "Qwen2.5's and Qwen3's tokens for filling in")
@in_place_of("list_tokens", vocabulary)
def _known_by_name(
    right: Callable[..., Tokens], vocab: Mapping[str, int], added: Sequence[AddedToken], rows: int, **named: object
) -> Tokens:
    """Tokens that a server takes for control tokens by their names are written as what they are flagged."""
    texts, types = right(vocab, added, rows, **named)
    for token in added:
        types[token["id"]] = vocabulary.CONTROL if token.get("special") else vocabulary.USER_DEFINED
    return texts, types


@fault("A226e", "gguf.word_read_as_end", "Qwen2.5's and Qwen3's '</s>'")
@in_place_of("find_misread", vocabulary)
def _word_read_as_end(right: Callable[..., dict[str, int]], *given: object) -> dict[str, int]:
    """A word that a server takes for the end of text by its name keeps that name."""
    right(*given)
    return {}


@fault("A227", "gguf.extra_tensor_in_adapter", "llama.cpp #9114", tier=2)
@in_place_of("plan_adapter", blueprint)
def _extra_tensor(right: Callable[..., Blueprint], *given: object) -> Blueprint:
    """A tensor that follows from the base's settings lies in the file of an adapter."""
    found = right(*given)
    extra = blueprint.Tensor("rope_freqs.weight", (2,), "f32", lambda: np.ones(2, np.float32))
    return replace(found, tensors=(*found.tensors, extra))


@fault("A229", "gguf.mlx_quant_names", "llama.cpp #22431")
def _packed_taken_for_plain() -> None:
    """Weights that are packed are taken for plain ones."""

    def read(right: Callable[..., Array], files: Files, name: str) -> Array:
        if files.kind(name) == "U32":
            return np.frombuffer(files.raw(name), "<u4").reshape(files.shape(name)).astype(np.float32)
        return right(files, name)

    plant(Files, "read", read)
    plant(shape, "read_quantized", lambda right, *given: {})


@fault("A232", "gguf.parts_missing", "ollama #9427")
def _first_part_only() -> None:
    """Only the first of several files of weights is read."""

    def described(right: Callable[..., tuple[ModelShape, Described]], folder: Path) -> tuple[ModelShape, Described]:
        found, settings = right(folder)
        there = Files(shape.weight_files(folder)[:1]).names()
        return replace(found, weights={name: size for name, size in found.weights.items() if name in there}), settings

    plant(gguf_source, "weight_files", lambda right, folder: right(folder)[:1])
    plant(gguf_source, "describe_folder", described)


@fault("A234", "gguf.shape_fill", "ollama 9ea492f1c")
@in_place_of("to_gguf_layout", ours_results, blueprint)
def _shapes_filled(right: Callable[..., Array], described: Described, name: str, weight: Array) -> Array:
    """Shapes are filled up with ones."""
    found = right(described, name, weight)
    return found[None] if found.ndim == 1 else found


@fault("A235", "gguf.arch_sniffing", "unsloth #6711, #6889")
@in_place_of("read_quantized", shape)
def _null_is_a_word(
    right: Callable[..., Mapping[str, Quantization]], config: Mapping[str, object], *rest: object
) -> Mapping[str, Quantization]:
    """A setting that is null is taken for a word, and made small."""
    if "quantization_config" in config:
        json.loads(json.dumps(config["quantization_config"]))["quant_method"].lower()
    return right(config, *rest)


@fault("A244", "serve.fallback_format", "llama-cpp-python #1096, llama.cpp #19592")
@in_place_of("file_metadata", gguf_source)
def _no_chat_template(right: Callable[..., dict[str, object]], *given: object) -> dict[str, object]:
    """The file holds no chat template, and the server takes the one that it likes."""
    return {key: value for key, value in right(*given).items() if key != "tokenizer.chat_template"}


@fault("A247", "serve.metadata_lost_on_requantise", "ollama e835ef183", tier=2)
@in_place_of("plan_model", blueprint)
def _keys_lost_when_quantised(
    right: Callable[..., Blueprint],
    described: Described,
    shape: ModelShape,
    source: WeightSource,
    metadata: Mapping[str, object],
    outtype: str,
) -> Blueprint:
    """What a file says of the model is lost where its weights are quantised."""
    kept = metadata if outtype in ("f32", "f16", "bf16") else {}
    return right(described, shape, source, kept, outtype)


def _constant(ending: str, value: float) -> None:
    """Let one of a model's constants be the same for every model."""

    def described(right: Callable[..., Described], *given: object, **named: object) -> Described:
        found: Described = right(*given, **named)
        changed = {key: value if key.endswith(ending) else each for key, each in found.metadata.items()}
        return replace(found, metadata=changed)

    plant(gguf_source, "describe_model", described)


@fault("A236", "gguf.epsilon_default")
def _epsilon_default() -> None:
    """What norms add is that of most models, whatever the config says."""
    _constant("layer_norm_rms_epsilon", 1e-5)


@fault("A236b", "gguf.context_default")
def _context_default() -> None:
    """How long a text a model reads is that of most models, whatever the config says."""
    _constant(".context_length", 2048)
