"""Makes a model's tokenizer files of GGUF's keys: the inverse of `vocabulary`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import ModelError
from finetune.export.pre_tokenizer import ALIASES, pre_tokenizer_named
from finetune.export.vocabulary import (
    BYTE,
    CONTROL,
    NO_BOS,
    NORMAL,
    PHI3_NAMES,
    SPACE,
    SWALLOW_NOTHING,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

_KEY = "tokenizer.ggml"
_GET = "get the file again, or the model's own files"
_ADDS_BOS = ("llama-bpe", "tekken")
"""Pre-tokenizers with which llama.cpp puts a begin-of-text token in front where the file does not say."""
_LONGEST_PIECE = 1024
_LARGEST_TEMPLATE = 1 << 20


@dataclass(frozen=True, slots=True)
class ImportedTokenizer:
    """A tokenizer's files before they are written.

    `template` is the chat template, byte for byte; `ids` are those with a task, by the names of transformers' config.
    """

    file: dict[str, Any]
    settings: dict[str, Any]
    template: str | None
    ids: dict[str, Any]
    notes: tuple[str, ...]


def read_tokenizer(metadata: Mapping[str, Any], rows: int, context: int) -> ImportedTokenizer:
    """The tokenizer that a file describes.

    Args:
        rows: of the embedding table.

    Raises:
        ModelError: there is none, it is of an unknown kind, or it contradicts itself or the table.
    """
    keys = _TokenizerKeys(metadata, rows)
    ids = {name: keys.id(name) for name in ("bos", "eos", "padding", "unknown", "eot", "eom")}
    eos = ids["eos"]
    if eos is None:
        raise ModelError(f"{_KEY}.eos_token_id is missing: no token ends a text", hint=_GET)
    adds_bos = keys.flag("add_bos_token", default=keys.kind == "llama" or keys.pre in _ADDS_BOS)
    template, notes = keys.template()
    bos = ids["bos"]
    if template is not None and template.startswith(NO_BOS) and bos == eos and not adds_bos:
        template, bos = template.removeprefix(NO_BOS), None
    if adds_bos and bos is None:
        raise ModelError(f"{_KEY}.add_bos_token is true, and {_KEY}.bos_token_id is missing", hint=_GET)
    around = (bos if adds_bos else None, eos if keys.flag("add_eos_token", default=False) else None)
    file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": keys.added(ids["unknown"]),
        **(keys.pieces(ids["unknown"]) if keys.kind == "llama" else keys.byte_level()),
        "post_processor": _around(around, keys.texts),
    }
    named = {"bos": bos, "eos": eos, "pad": ids["padding"], "unk": ids["unknown"]}
    settings: dict[str, Any] = {
        f"{name}_token": keys.texts[number] for name, number in named.items() if number is not None
    }
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
    settings |= {"clean_up_tokenization_spaces": False, "add_bos_token": adds_bos}
    stops = list(dict.fromkeys(number for number in (eos, ids["eot"], ids["eom"]) if number is not None))
    told = {"bos_token_id": bos, "eos_token_id": stops if len(stops) > 1 else eos, "pad_token_id": ids["padding"]}
    return ImportedTokenizer(file, settings, template, told, notes)


class _TokenizerKeys:
    """The tokenizer's keys, each held to what it may be."""

    def __init__(self, metadata: Mapping[str, Any], rows: int) -> None:
        self._metadata = metadata
        self.kind = metadata.get(f"{_KEY}.model")
        if self.kind not in ("gpt2", "llama"):
            told = "is missing: the file has no tokenizer" if self.kind is None else f"is {str(self.kind)[:80]!r}"
            raise ModelError(f"{_KEY}.model {told}", hint="what can be read: gpt2 (byte-level BPE) and llama (pieces)")
        pre = str(metadata.get(f"{_KEY}.pre", "default"))
        self.pre = ALIASES.get(pre, pre)
        self.texts: list[str] = self._list("tokens", str, None)
        if len(self.texts) > rows:
            raise ModelError(
                f"{_KEY}.tokens has ids up to {len(self.texts) - 1}, and the embedding table {rows} rows", hint=_GET
            )
        self._types: list[int] = self._list("token_type", int, [NORMAL] * len(self.texts))
        if odd := sorted(set(self._types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}):
            raise ModelError(f"{_KEY}.token_type holds {odd[0]}, which is no type of token", hint=_GET)
        # Rows without a token bear a made-up name: transformers leaves them without one.
        self.vocab = {
            text: number
            for number, (text, kind) in enumerate(zip(self.texts, self._types, strict=True))
            if kind != UNUSED or text.strip("[]") != f"PAD{number}"
        }
        if len({*self.texts}) < len(self.texts):
            seen: set[str] = set()
            twice = next(text for text in self.texts if text in seen or seen.add(text))  # type: ignore[func-returns-value]
            raise ModelError(f"{_KEY}.tokens has {twice[:80]!r} twice", hint=_GET)

    def _list(self, key: str, kind: type, default: list[Any] | None) -> list[Any]:
        found = self._metadata.get(f"{_KEY}.{key}", default)
        if not isinstance(found, list) or not found or not all(type(each) is kind for each in found):
            raise ModelError(f"{_KEY}.{key} is missing, empty or no list of {kind.__name__}", hint=_GET)
        if key not in ("tokens", "merges") and len(found) != len(self.texts):
            raise ModelError(f"{_KEY}.{key} has {len(found)} values for {len(self.texts)} tokens", hint=_GET)
        return found

    def id(self, name: str) -> int | None:
        """The id of a token with a task."""
        found = self._metadata.get(f"{_KEY}.{name}_token_id")
        if found is None:
            return None
        if type(found) is not int or not 0 <= found < len(self.texts) or self.texts[found] not in self.vocab:
            raise ModelError(
                f"{_KEY}.{name}_token_id is {str(found)[:80]}, and there are {len(self.texts)} tokens", hint=_GET
            )
        return found

    def flag(self, key: str, *, default: bool) -> bool:
        """A yes or no."""
        found = self._metadata.get(f"{_KEY}.{key}", default)
        if type(found) is not bool:
            raise ModelError(f"{_KEY}.{key} is {str(found)[:80]}, neither true nor false", hint=_GET)
        return found

    def template(self) -> tuple[str | None, tuple[str, ...]]:
        """The chat template, and a note on others that are not taken over."""
        found = self._metadata.get("tokenizer.chat_template")
        if found is not None and (not isinstance(found, str) or len(found) > _LARGEST_TEMPLATE):
            raise ModelError(f"tokenizer.chat_template is no text of up to {_LARGEST_TEMPLATE:,} characters", hint=_GET)
        others = sorted(key for key in self._metadata if key.startswith("tokenizer.chat_template."))
        return found, ((f"chat templates beside the first are left out: {', '.join(others)[:300]}",) if others else ())

    def added(self, unknown: int | None) -> list[dict[str, Any]]:
        """Tokens that stand apart from the vocabulary."""
        name = str(self._metadata.get("general.name", "")).lower()
        swallow = any(word in name for word in PHI3_NAMES)
        return [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": swallow and text not in SWALLOW_NOTHING,
                "normalized": False,
                "special": kind != USER_DEFINED or number == unknown,
            }
            for number, (text, kind) in enumerate(zip(self.texts, self._types, strict=True))
            if kind in (CONTROL, USER_DEFINED, UNKNOWN) or (swallow and text == "</s>")
        ]

    def byte_level(self) -> dict[str, Any]:
        """Byte-level BPE: merges as they stand in the file."""
        cuts, whole_words = pre_tokenizer_named(str(self._metadata.get(f"{_KEY}.pre", "default")))
        merges = [merge.split(" ", 1) for merge in self._list("merges", str, None)]
        for place, pair in enumerate(merges):
            if len(pair) != 2 or not {*pair, "".join(pair)} <= self.vocab.keys():
                raise ModelError(
                    f"{_KEY}.merges: merge {place} is {' '.join(pair)[:80]!r}, no pair of tokens that makes one",
                    hint=_GET,
                )
        return {
            "normalizer": None,
            "pre_tokenizer": cuts,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": self.vocab, "merges": merges, "ignore_merges": whole_words},
        }

    def pieces(self, unknown: int | None) -> dict[str, Any]:
        """SentencePiece's BPE: any pair that makes a piece is a merge; the piece of the highest score comes first."""
        scores = [float(score) for score in self._list("scores", float, None)]
        joined = (NORMAL, USER_DEFINED)
        own = [text for text, kind in zip(self.texts, self._types, strict=True) if kind in joined]
        if longest := next((text for text in own if len(text) > _LONGEST_PIECE), ""):
            raise ModelError(
                f"{_KEY}.tokens: {longest[:40]!r}... has {len(longest):,} characters, at most {_LONGEST_PIECE}",
                hint=_GET,
            )
        known = set(own)
        pairs = [
            (-scores[self.vocab[text]], self.vocab[text[:cut]], self.vocab[text[cut:]], text[:cut], text[cut:])
            for text in own
            for cut in range(1, len(text))
            if text[:cut] in known and text[cut:] in known
        ]
        front = [{"type": "Prepend", "prepend": SPACE}] if self.flag("add_space_prefix", default=True) else []
        steps = [*front, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
        decoders: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if front else []
        return {
            "normalizer": {"type": "Sequence", "normalizers": steps} if front else steps[0],
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "vocab": self.vocab,
                "merges": [[left, right] for *_, left, right in sorted(pairs)],
                "byte_fallback": True,
                "fuse_unk": True,
                "unk_token": None if unknown is None else self.texts[unknown],
            },
        }


def _around(ids: tuple[int | None, int | None], texts: Sequence[str]) -> dict[str, Any] | None:
    """The post-processor that puts these tokens in front of a text and behind it."""
    if ids == (None, None):
        return None
    front, back = ([{"SpecialToken": {"id": texts[each], "type_id": 0}}] if each is not None else [] for each in ids)
    both = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    known = {
        texts[each]: {"id": texts[each], "ids": [each], "tokens": [texts[each]]} for each in ids if each is not None
    }
    single, pair = [*front, both[0], *back], [*front, both[0], *back, *front, both[1], *back]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
