"""Tiny random models of every family that can be written as GGUF, with tokenizers of both kinds."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.export.corpus import nasty_texts
from finetune.export.gguf_source import Exportable, exportable_model
from finetune.export.pre_tokenizer import DIGITS, GPT2, NAMES

CONTROL = ("<|pad|>", "</s>", "<s>", "<|im_start|>", "<|im_end|>")
IDS = {"vocab_size": 640, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_CORE = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 256,
    "factor": 2.0,
    "long_factor": [1 + place / 3 for place in range(12)],
    "short_factor": [1 + place / 9 for place in range(12)],
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_FOUR = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    # The number of key heads is neither that of heads nor its root; the heads are not as wide as the model.
    "llama": {"model_type": "llama", **_CORE, "head_dim": 10, "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
    "llama with biases, Llama 3's rope": {
        "model_type": "llama",
        **_CORE,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": _LLAMA3,
        "tie_word_embeddings": True,
    },
    "llama, linear rope": {
        "model_type": "llama",
        **_CORE,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    },
    "llama, yarn": {"model_type": "llama", **_CORE, "rope_parameters": _YARN},
    "mistral": {
        "model_type": "mistral",
        **_CORE,
        "sliding_window": None,
        "head_dim": 32,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "mistral, window": {"model_type": "mistral", **_CORE, "sliding_window": 48},
    "qwen2": {"model_type": "qwen2", **_CORE, "tie_word_embeddings": True},
    "qwen2, yarn": {"model_type": "qwen2", **_CORE, "rope_parameters": _YARN},
    "qwen3": {"model_type": "qwen3", **_CORE, "head_dim": 12, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **_CORE, "head_dim": 32, "num_key_value_heads": 1},
    "gemma2": {
        "model_type": "gemma2",
        **_CORE,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 8,
        "num_hidden_layers": 3,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_CORE,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 8,
        "num_hidden_layers": 7,
        "rope_parameters": _GEMMA3_ROPE,
    },
    "phi3": {"model_type": "phi3", **_CORE, "tie_word_embeddings": False},
    "phi3, long": {
        "model_type": "phi3",
        **_CORE,
        **_FOUR,
        "max_position_embeddings": 512,
        "rope_parameters": _LONG,
        "original_max_position_embeddings": 256,
    },
    "phi3, half turned": {
        "model_type": "phi3",
        **_CORE,
        **_FOUR,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 90,
        "n_head": 6,
        "n_layer": 2,
        "n_positions": 128,
        "n_inner": 70,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 0.01,
        "initializer_range": 0.15,
    },
}

PIECES = {"mistral": True, "phi3": True, "gemma": False, "gemma3": False}
"""Models with a tokenizer of pieces, and whether it puts a space in front."""


def make_model(kind: str, folder: Path, **changes: Any) -> Path:
    """A model of random weights; with biases and gains that are not what every model starts with."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir(parents=True)
    open_backend("torch").create({**IDS, **CONFIGS[kind], **changes}, folder, seed=5)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for place, name in enumerate(sorted(weights)):
        if weights[name].ndim == 1:
            size = len(weights[name])
            weights[name] = weights[name] + 0.1 * ((7 * place + 3 * _numbers(size)) % 11 - 5).astype("float32") / 5
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def _numbers(size: int) -> Any:
    import numpy as np

    return np.arange(size)


def give_tokenizer(kind: str, folder: Path) -> str:
    """A tokenizer for a model, of another sort for each kind; returns llama.cpp's name of its pre-tokenizer."""
    if kind in PIECES:
        pieces(folder, prefix=PIECES[kind])
        return "default"
    number = [each for each in CONFIGS if each not in PIECES].index(kind)
    (patterns, whole_words), name = list(NAMES.items())[number % len(NAMES)]
    byte_level(folder, patterns, whole_words=whole_words, adds_bos=number % 2 == 0)
    return name


def exportable(name: str | Path) -> Exportable:
    """A model, its truth computed by torch."""
    return exportable_model(str(name), partial(open_backend, "torch"))


def byte_level(folder: Path, patterns: Sequence[str], *, whole_words: bool = False, adds_bos: bool = True) -> None:
    """A byte-level tokenizer that cuts text by these patterns."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    steps: list[Any] = []
    for pattern in patterns:
        if pattern == DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif pattern != GPT2:
            steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in patterns))
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(CONTROL),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(nasty_texts(()), trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    _save(tokenizer.to_str(), folder)


def pieces(folder: Path, *, prefix: bool) -> None:
    """A tokenizer as one converted from SentencePiece: bytes to fall back on, and every pair that makes a piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [*([normalizers.Prepend("\u2581")] if prefix else []), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps) if prefix else steps[0]
    spaces = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    special = [*CONTROL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [
        "the cat sat on the mat",
        "a cat and the hat",
        "1 2 3 12 123",
        "\u0434\u0430 \u043d\u0435\u0442 \u0434\u0430",
        "aa aaa aaaa",
    ]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False, limit_alphabet=40)
    tokenizer.train_from_iterator([text for text in texts for _ in range(3)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    said = json.loads(tokenizer.to_str())
    said["added_tokens"] = [token for token in said["added_tokens"] if not token["content"].startswith("<0x")]
    vocab = said["model"]["vocab"]
    cuts = [(text[:place], text[place:]) for text in vocab for place in range(1, len(text))]
    known = [pair for pair in cuts if set(pair) <= set(vocab) and not "".join(pair).startswith("<")]
    said["model"]["merges"] = sorted(known, key=lambda pair: (vocab["".join(pair)], vocab[pair[0]], vocab[pair[1]]))
    _save(json.dumps(said), folder)


def _save(said: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(said, encoding="utf-8")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


gpt2_like = partial(byte_level, patterns=(GPT2,))
