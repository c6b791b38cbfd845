"""Finds the pre-tokenizer of llama.cpp that splits text as a `tokenizer.json` does.

llama.cpp knows pre-tokenizers by name only, and each name stands for fixed patterns. Source: `llama-vocab.cpp`.
"""

import json
from collections.abc import Callable
from typing import TypedDict

from finetune.errors import ModelError


class Step(TypedDict, total=False):
    """A pre-tokenizer or normalizer of `tokenizer.json`; which keys there are depends on `type`."""

    type: str
    pretokenizers: "list[Step]"
    normalizers: "list[Step]"
    pattern: dict[str, str]
    behavior: str
    invert: bool
    add_prefix_space: bool
    trim_offsets: bool
    use_regex: bool
    individual_digits: bool
    replacement: str
    prepend_scheme: str
    split: bool
    prepend: str
    content: str


# The patterns of llama.cpp, character for character: another spelling of the same pattern is not recognised.
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
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
DIGITS = r"\p{N}"
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
    ((DIGITS, GPT2), False): "smollm",
    (DEEPSEEK, False): "deepseek-v3",
}
"""llama.cpp's name by the patterns, in order, and by whether words of the vocabulary are taken whole.

llama-bpe and dbrx split alike, but only the former skips the merges of a word that is in the vocabulary.
"""

ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("phi-2", "jina-es", "jina-de", "mellum", "modern-bert"), "gpt-2"),
    "deepseek-r1-qwen": "qwen2",
    "smaug-bpe": "dbrx",
    **dict.fromkeys(("llama4", "kanana2"), "gpt-4o"),
    **dict.fromkeys(("hunyuan-dense", "joyai-llm"), "deepseek-v3"),
}
"""Other names that llama.cpp has for the same patterns."""

ASCII_ONLY = ("tekken", "gpt-4o")
"""Pre-tokenizers whose patterns llama.cpp has rewritten, so that only ASCII text is sure to be split alike.

The rewritten ones take other letters for upper and lower case at once, and combining marks for no part of a word.
"""


def name_pre_tokenizer(
    pre_tokenizer: Step | None, *, whole_words: bool, same: Callable[[], bool] = lambda: False
) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer of `tokenizer.json`.

    Args:
        whole_words: the tokenizer takes a word of its vocabulary whole, whatever its merges say.
        same: whether that makes no difference, since its merges make each word of its parts.

    Raises:
        ModelError: no pre-tokenizer of llama.cpp splits text like that.
    """
    patterns = _patterns(pre_tokenizer)
    name = NAMES.get((patterns, whole_words))
    if name is None and (patterns, not whole_words) in NAMES and same():
        name = NAMES[patterns, not whole_words]
    if name is None:
        shown = " then ".join(patterns)
        raise ModelError(
            f"no pre-tokenizer of llama.cpp cuts text at {shown[:300]}"
            + (" and takes words of the vocabulary whole" if whole_words else ""),
            hint=f"this tokenizer cannot be written as GGUF; what can be: {', '.join(sorted(NAMES.values()))}",
        )
    return name


def pre_tokenizer_named(name: str) -> tuple[Step, bool]:
    """The pre-tokenizer of `tokenizer.json` behind llama.cpp's name, and whether whole words are taken.

    The inverse of `name_pre_tokenizer`.

    Raises:
        ModelError: the name is unknown.
    """
    name = ALIASES.get(name, name)
    found = next((key for key, known in NAMES.items() if known == name), None)
    if found is None:
        raise ModelError(
            f"tokenizer.ggml.pre is {name[:80]!r}, a pre-tokenizer that is unknown here",
            hint=f"what can be read: {', '.join(sorted([*NAMES.values(), *ALIASES]))}",
        )
    patterns, whole_words = found
    steps = [
        Step(type="Digits", individual_digits=True)
        if pattern == DIGITS
        else Step(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
        for pattern in patterns
        if pattern != GPT2
    ]
    steps.append(Step(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=GPT2 in patterns))
    return steps[0] if len(steps) == 1 else Step(type="Sequence", pretokenizers=steps), whole_words


def _patterns(pre_tokenizer: Step | None) -> tuple[str, ...]:
    """The patterns that split text, in order."""
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        steps = list(pre_tokenizer.get("pretokenizers") or [])
    else:
        steps = [pre_tokenizer] if pre_tokenizer else []
    patterns: list[str] = []
    bytes_seen = False
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            bytes_seen = True
            patterns += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits") is True:
            patterns.append(DIGITS)
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert") and _regex(step):
            patterns.append(_regex(step))
        else:
            raise _unknown(step)
    if not bytes_seen or not patterns:
        raise _unknown(pre_tokenizer)
    return tuple(patterns)


def _regex(step: Step) -> str:
    """The regular expression of a step; "" where it splits at a plain string."""
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return regex if isinstance(regex, str) else ""


def _unknown(step: Step | None) -> ModelError:
    return ModelError(
        f"tokenizer.json: the pre-tokenizer {json.dumps(step)[:300]} is none that llama.cpp has",
        hint="this tokenizer cannot be written as GGUF",
    )
