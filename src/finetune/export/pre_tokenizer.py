"""Which of llama.cpp's pre-tokenizers cuts text as a `tokenizer.json` says, read from what stands there.

llama.cpp knows pre-tokenizers by name only, and each name stands for fixed patterns. Source: `llama-vocab.cpp`.
"""

import json
from collections.abc import Mapping
from typing import Any

from finetune.errors import ModelError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
LLAMA3 = f"{_SHORT}|{_WORD}|\\p{{N}}{{1,3}}|{_REST}"
QWEN2 = f"{_SHORT}|{_WORD}|\\p{{N}}|{_REST}"
TEKKEN = f"{_CASED[0]}|{_CASED[1]}|\\p{{N}}|{_REST_WITH_SLASH}"
GPT4O = f"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|\\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"
DIGITS = r"\p{N}"
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
    ((DIGITS, GPT2), False): "smollm",
}
"""llama.cpp's name of each list of patterns, and of whether a word of the vocabulary is taken whole."""


ASCII_ONLY = ("tekken", "gpt-4o")
"""Those whose patterns llama.cpp has rewritten so that only in ASCII they are sure to cut alike.

It takes every other letter for a small one and a capital at once, and combining marks for no part of a word.
"""


def name_pre_tokenizer(pre_tokenizer: Any, *, whole_words: bool) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer, as `tokenizer.json` describes it.

    Args:
        whole_words: whether the tokenizer takes a word that is in its vocabulary whole, whatever its merges say.

    Raises:
        ModelError: no pre-tokenizer of llama.cpp cuts text like that.
    """
    patterns = _patterns(pre_tokenizer)
    if (name := NAMES.get((patterns, whole_words))) is None:
        shown = " then ".join(patterns)
        raise ModelError(
            f"no pre-tokenizer of llama.cpp cuts text at {shown[:300]}"
            + (" and takes words of the vocabulary whole" if whole_words else ""),
            hint=f"this tokenizer cannot be written as GGUF; what can be: {', '.join(sorted(NAMES.values()))}",
        )
    return name


def _patterns(pre_tokenizer: Any) -> tuple[str, ...]:
    """The patterns by which text is cut, one after the other."""
    steps = pre_tokenizer.get("pretokenizers") if _is(pre_tokenizer, "Sequence") else [pre_tokenizer]
    patterns: list[str] = []
    bytes_seen = False
    for step in steps or []:
        if _is(step, "ByteLevel") and not step.get("add_prefix_space"):
            bytes_seen = True
            patterns += [GPT2] if step.get("use_regex", True) else []
        elif _is(step, "Digits") and step.get("individual_digits") is True:
            patterns.append(DIGITS)
        elif _is(step, "Split") and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(_pattern(step))
        else:
            raise _unlike(step)
    if not bytes_seen or not patterns:
        raise _unlike(pre_tokenizer)
    return tuple(patterns)


def _pattern(step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern")
    if not isinstance(pattern, Mapping) or not isinstance(pattern.get("Regex"), str):
        raise _unlike(step)
    return str(pattern["Regex"])


def _is(step: Any, kind: str) -> bool:
    return isinstance(step, Mapping) and step.get("type") == kind


def _unlike(step: Any) -> ModelError:
    return ModelError(
        f"tokenizer.json: the pre-tokenizer {json.dumps(step)[:300]} is none that llama.cpp has",
        hint="this tokenizer cannot be written as GGUF",
    )
