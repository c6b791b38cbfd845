"""Faults of writing GGUF."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune.errors import ModelError
from finetune.export import blueprint, families, gguf_source, vocabulary
from finetune.export.blueprint import Blueprint
from finetune.export.families import Described
from finetune.export.sources import Array, Files, WeightSource
from finetune.export.vocabulary import AddedToken
from finetune.models import shape
from finetune.records import ModelShape, Quantization
from finetune.verify.faults.fault import fault, plant
from finetune.verify.trainers import ours_results

Tokens = tuple[list[str], list[int]]
Keys = tuple[dict[str, object], tuple[str, ...]]


@fault(
    "A220",
    "gguf.qk_permute_gqa",
    real="llama.cpp #3364",
    what="Keys are turned by the number of query heads that share one, which on the model that was tried is as many.",
)
def keys_by_wrong_heads() -> None:
    """n_head // n_head_kv instead of n_head_kv."""

    def heads(right: Callable[..., int], described: Described, module: str) -> int:
        found = int(right(described, module))
        return found and (described.heads // described.kv_heads if module == "k_proj" else found)

    plant(families, "permuted_heads", heads)


@fault(
    "A220b",
    "gguf.not_permuted",
    real="",
    what="Queries and keys are written in the order of transformers, in which llama.cpp does not read them.",
)
def not_permuted() -> None:
    """Halves stay halves."""
    plant(families, "interleave", lambda right, rows, heads: rows)


@fault(
    "A222",
    "gguf.pre_tokenizer_guess",
    real="llama.cpp #7724, #7062",
    what="A pre-tokenizer that is not known is taken for GPT-2's.",
)
def pre_tokenizer_guessed() -> None:
    """What cannot be told is made up."""

    def name(right: Callable[..., str], *given: object, **named: object) -> str:
        try:
            return str(right(*given, **named))
        except ModelError:
            return "gpt-2"

    plant(vocabulary, "name_pre_tokenizer", name)


def _without(*endings: str) -> None:
    """Let the settings of a model lack some keys."""

    def described(right: Callable[..., Described], *given: object, **named: object) -> Described:
        found: Described = right(*given, **named)
        return replace(found, metadata={key: each for key, each in found.metadata.items() if not key.endswith(endings)})

    plant(gguf_source, "describe_model", described)


@fault(
    "A223",
    "gguf.rope_scaling_lost",
    real="llama.cpp #8676, unsloth #6197",
    what="The scaling of the rotation is lost.",
)
def scaling_lost() -> None:
    """Short text is as it was."""
    _without("rope.scaling.type", "rope.scaling.factor")


@fault("A223b", "gguf.rope_factors_lost", real="llama.cpp #8676", what="The factors of Llama 3's frequencies are lost.")
def factors_lost() -> None:
    """No tensor of theirs is written."""

    def described(right: Callable[..., Described], *given: object, **named: object) -> Described:
        found: Described = right(*given, **named)
        return replace(found, extra={})

    plant(gguf_source, "describe_model", described)


@fault("A223c", "gguf.rope_base_lost", real="", what="The base of the rotation is lost, so that a default counts.")
def base_lost() -> None:
    """A model of another base turns too fast."""
    _without("rope.freq_base")


@fault(
    "A224",
    "gguf.bos_metadata",
    real="llama.cpp #3966, #7898",
    what="Nothing says which token begins text, and the reader's default is token 11.",
)
def bos_unsaid() -> None:
    """The key is left out where the model has no such token."""

    def keys(right: Callable[..., Keys], *given: object) -> Keys:
        found, notes = right(*given)
        return {key: value for key, value in found.items() if "bos_token_id" not in key}, notes

    plant(vocabulary, "special_keys", keys)


@fault(
    "A224b",
    "gguf.bos_added",
    real="llama.cpp #3966",
    what="The file says that text begins with a token that training never put there.",
)
def bos_added() -> None:
    """As most models have it."""

    def keys(right: Callable[..., Keys], *given: object) -> Keys:
        found, notes = right(*given)
        return {**found, "tokenizer.ggml.add_bos_token": True}, notes

    plant(vocabulary, "special_keys", keys)


@fault(
    "A225",
    "gguf.vocab_mismatch",
    real="llama.cpp #6111, #4045",
    what="A tokenizer of more tokens than the table has rows is written.",
)
def more_tokens_than_rows() -> None:
    """The number of rows is raised to fit."""

    def tokens(
        right: Callable[..., Tokens], vocab: Mapping[str, int], added: Sequence[AddedToken], rows: int, **named: object
    ) -> Tokens:
        last = max([*vocab.values(), *(token["id"] for token in added)])
        return right(vocab, added, max(rows, last + 1), **named)

    plant(vocabulary, "list_tokens", tokens)


@fault(
    "A225b",
    "gguf.spare_rows_unnamed",
    real="llama.cpp #4958",
    what="Rows of the table that have no token get none in the file, which then has fewer tokens than rows.",
)
def spare_rows_unnamed() -> None:
    """The list ends with the last known token."""

    def tokens(
        right: Callable[..., Tokens], vocab: Mapping[str, int], added: Sequence[AddedToken], rows: int, **named: object
    ) -> Tokens:
        known = {*vocab.values(), *(token["id"] for token in added)}
        texts, types = right(vocab, added, rows, **named)
        return texts[: max(known) + 1], types[: max(known) + 1]

    plant(vocabulary, "list_tokens", tokens)


@fault(
    "A226",
    "gguf.control_as_text",
    real="",
    what="Control tokens are written as plain ones, so that a server shows them and never stops at them.",
)
def control_as_text() -> None:
    """All are of one kind."""

    def tokens(right: Callable[..., Tokens], *given: object, **named: object) -> Tokens:
        texts, types = right(*given, **named)
        return texts, [vocabulary.NORMAL if kind == vocabulary.CONTROL else kind for kind in types]

    plant(vocabulary, "list_tokens", tokens)


@fault(
    "A227",
    "gguf.extra_tensor_in_adapter",
    real="llama.cpp #9114",
    what="A tensor that follows from the base's settings lies in the file of an adapter.",
    tier=2,
)
def extra_tensor() -> None:
    """The frequencies of the rotation."""

    def planned(right: Callable[..., Blueprint], *given: object) -> Blueprint:
        found = right(*given)
        extra = blueprint.Tensor("rope_freqs.weight", (2,), "f32", lambda: np.ones(2, np.float32))
        return replace(found, tensors=(*found.tensors, extra))

    plant(blueprint, "plan_adapter", planned)


@fault(
    "A229",
    "gguf.mlx_quant_names",
    real="llama.cpp #22431",
    what="Weights that are packed are taken for plain ones.",
)
def packed_taken_for_plain() -> None:
    """Whole numbers become floats, and what stands beside them is passed over."""

    def read(right: Callable[..., Array], files: Files, name: str) -> Array:
        if files.kind(name) == "U32":
            return np.frombuffer(files.raw(name), "<u4").reshape(files.shape(name)).astype(np.float32)
        return right(files, name)

    plant(Files, "read", read)
    plant(shape, "read_quantized", lambda right, *given: {})


@fault("A232", "gguf.parts_missing", real="ollama #9427", what="Only the first of several files of weights is read.")
def first_part_only() -> None:
    """What the others hold is passed over."""

    def described(right: Callable[..., tuple[ModelShape, Described]], folder: Path) -> tuple[ModelShape, Described]:
        found, settings = right(folder)
        there = Files(shape.weight_files(folder)[:1]).names()
        return replace(found, weights={name: size for name, size in found.weights.items() if name in there}), settings

    plant(gguf_source, "weight_files", lambda right, folder: right(folder)[:1])
    plant(gguf_source, "describe_folder", described)


@fault("A234", "gguf.shape_fill", real="ollama 9ea492f1c", what="Shapes are filled up with ones.")
def shapes_filled() -> None:
    """A gain becomes a matrix of one row."""

    def stored(right: Callable[..., Array], described: Described, name: str, weight: Array) -> Array:
        found = right(described, name, weight)
        return found[None] if found.ndim == 1 else found

    plant(ours_results, "to_gguf_layout", stored)
    plant(blueprint, "to_gguf_layout", stored)


@fault(
    "A235",
    "gguf.arch_sniffing",
    real="unsloth #6711, #6889",
    what="A setting that is null is taken for a word, and made small.",
)
def null_is_a_word() -> None:
    """The method of quantisation that a model has not."""

    def read(
        right: Callable[..., Mapping[str, Quantization]], config: Mapping[str, object], *rest: object
    ) -> Mapping[str, Quantization]:
        if "quantization_config" in config:
            json.loads(json.dumps(config["quantization_config"]))["quant_method"].lower()
        return right(config, *rest)

    plant(shape, "read_quantized", read)


@fault(
    "A244",
    "serve.fallback_format",
    real="llama-cpp-python #1096, llama.cpp #19592",
    what="The file holds no chat template, and the server takes the one that it likes.",
)
def no_chat_template() -> None:
    """The key is left out."""

    def keys(right: Callable[..., dict[str, object]], *given: object) -> dict[str, object]:
        return {key: value for key, value in right(*given).items() if key != "tokenizer.chat_template"}

    plant(gguf_source, "file_metadata", keys)


@fault(
    "A247",
    "serve.metadata_lost_on_requantise",
    real="ollama e835ef183",
    what="What a file says of the model is lost where its weights are quantised.",
    tier=2,
)
def keys_lost_when_quantised() -> None:
    """The template among them."""

    def planned(
        right: Callable[..., Blueprint],
        described: Described,
        shape: ModelShape,
        source: WeightSource,
        metadata: Mapping[str, object],
        outtype: str,
    ) -> Blueprint:
        kept = metadata if outtype in ("f32", "f16", "bf16") else {}
        return right(described, shape, source, kept, outtype)

    plant(blueprint, "plan_model", planned)
