"""Translates a `tokenizer.json` into GGUF's tokenizer keys.

llama.cpp has two kinds that matter here. "gpt2" is byte-level BPE with merges. "llama" is SentencePiece's BPE, with
scores and no merges: any two neighbours that make a known piece may be merged, the piece of the highest score first.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from finetune.errors import ModelError
from finetune.export.by_name import CONTROL_BY_NAME, ENDS, control_ids, looks_special
from finetune.export.pre_tokenizer import ASCII_ONLY, Step, name_pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
PHI3_NAMES = ("phi-3", "phi3")
"""In models whose names hold one of these, llama.cpp lets control tokens swallow the space after them."""
SWALLOW_NOTHING = ("<unk>", "<s>", "<|endoftext|>")
"""Those of them that do not."""
SHOWN = 5
"""How many names a note tells."""
NO_BOS = "{%- set bos_token = '' -%}"
"""How a template begins that is to put no begin-of-text token anywhere."""
_FORMS = {
    "NFC": "llama.cpp does not bring text into Unicode's form NFC as this tokenizer does: send it in that form",
    "ASCII": "llama.cpp cuts words with combining marks, or with capitals inside that are no ASCII, otherwise than "
    "this tokenizer does: token ids were compared of ASCII text only",
}


class AddedToken(TypedDict, total=False):
    """A token of `tokenizer.json` that stands apart from the vocabulary."""

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


class BpeModel(TypedDict, total=False):
    """The `model` of a `tokenizer.json`; older files write a merge as one string."""

    type: str
    vocab: dict[str, int]
    merges: list[str] | list[list[str]]
    byte_fallback: bool
    ignore_merges: bool
    unk_token: str | None


class TokenizerFile(TypedDict, total=False):
    """The parts of a `tokenizer.json` that decide on ids."""

    model: BpeModel
    added_tokens: list[AddedToken]
    normalizer: Step | None
    pre_tokenizer: Step | None


@dataclass(frozen=True, slots=True)
class Special:
    """The ids with a task: begin and end of text, padding, and `stops`, at which an answer ends."""

    bos: int | None
    eos: int
    pad: int
    stops: tuple[int, ...]
    adds_bos: bool
    adds_eos: bool = False


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """A tokenizer's keys in GGUF.

    `form` is the text that llama.cpp is sure to tokenize alike: NFC, ASCII, or "" for all text. `needs_strip`: control
    tokens swallow the space after them. `control`: the ids that are control tokens to llama.cpp.
    """

    metadata: dict[str, Any]
    needs_strip: bool
    form: str = ""
    notes: tuple[str, ...] = ()
    control: frozenset[int] = frozenset()


def describe_vocabulary(tokenizer: Mapping[str, object], special: Special, rows: int) -> GgufVocabulary:
    """GGUF's keys for a tokenizer.

    Args:
        tokenizer: the content of `tokenizer.json`.
        rows: of the embedding table; ids up to it without a token get one that is marked as unused.

    Raises:
        ModelError: llama.cpp cannot do what this tokenizer does, or there are more tokens than rows.
    """
    file = cast("TokenizerFile", tokenizer)
    model, added = file.get("model") or BpeModel(), file.get("added_tokens") or []
    if model.get("type") != "BPE":
        raise ModelError(
            f"tokenizer.json: a {model.get('type')} tokenizer cannot be written as GGUF", hint="what can be: BPE"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ModelError(f"tokenizer.json: {key} is {model.get(key)!r}, which llama.cpp has not")
    pieces = bool(model.get("byte_fallback"))
    misread = find_misread(file, added, special)
    vocab = {text: number for text, number in model["vocab"].items() if text not in misread}
    texts, types = list_tokens(vocab, added, rows, pieces=pieces)
    needs_strip = _needs_strip(added)
    metadata: dict[str, Any] = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    form = ""
    if pieces:
        metadata |= _pieces(file, model, texts, types)
    else:
        name = name_pre_tokenizer(
            file.get("pre_tokenizer"),
            whole_words=bool(model.get("ignore_merges")),
            same=lambda: _merges_make_all(model),
        )
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
        }
        form = _form(file)
    ids, notes = special_keys(special, texts)
    if metadata.get("tokenizer.ggml.pre") in ASCII_ONLY:
        form = "ASCII"
    if form:
        notes = (*notes, _FORMS[form])
    if needs_strip:
        notes = (*notes, "behind control tokens llama.cpp swallows only the white space of ASCII")
    control = control_ids(texts, [kind == CONTROL for kind in types])
    notes = (*notes, *_notes_of_names(added, control, misread))
    return GgufVocabulary(metadata | ids, needs_strip, form, notes, control)


def find_misread(file: TokenizerFile, added: Sequence[AddedToken], special: Special) -> dict[str, int]:
    """Words of the vocabulary that this tokenizer makes of no text, and that llama.cpp takes for control tokens.

    Under their own names llama.cpp would read them in any text that names them: Qwen's "</s>". They get others.

    Raises:
        ModelError: this tokenizer makes such a word of text, so that it cannot have another name.
    """
    apart = {token["content"] for token in added} | CONTROL_BY_NAME - file["model"]["vocab"].keys()
    tasks = {special.bos, special.eos, special.pad, *special.stops}
    found = {text: file["model"]["vocab"][text] for text in sorted(CONTROL_BY_NAME - apart)}
    found = {text: number for text, number in found.items() if number not in tasks}
    if not found:
        return {}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(file))
    for text, number in found.items():
        if any(number in tokenizer.encode(text.join(around)).ids for around in (("", ""), ("a", "b"), (" ", " "))):
            raise ModelError(
                f"tokenizer.json: {text!r} is a word of ordinary text, which llama.cpp takes for a control token for "
                "its name",
                hint="this tokenizer cannot be written as GGUF",
            )
    return found


def _notes_of_names(added: Sequence[AddedToken], control: frozenset[int], misread: Mapping[str, int]) -> Iterable[str]:
    """What is to be told of tokens that llama.cpp takes otherwise than the tokenizer's file does."""
    hidden = [token["content"] for token in added if not token.get("special") and token["id"] in control]
    shown = [token["content"] for token in added if token.get("special") and token["id"] not in control]
    for names, told in ((hidden, "control tokens, which it does not show"), (shown, "words, which it shows")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            yield f"for their names llama.cpp takes these for {told}: {', '.join(names[:SHOWN])}{more}"
    for text, number in misread.items():
        yield (
            f"llama.cpp takes any token {text!r} for a control token: token {number}, which this tokenizer makes of no "
            "text, has another name in the file"
        )


def list_tokens(
    vocab: Mapping[str, int], added: Sequence[AddedToken], rows: int, *, pieces: bool
) -> tuple[list[str], list[int]]:
    """Text and type of every id, row by row of the embedding table."""
    known: dict[int, tuple[str, int]] = {number: (text, NORMAL) for text, number in vocab.items()}
    if pieces:
        for byte in range(256):
            text = f"<0x{byte:02X}>"
            if text not in vocab:
                raise ModelError(f"tokenizer.json: there is no token {text}, and llama.cpp needs one for every byte")
            known[vocab[text]] = (text, BYTE)
    for token in added:
        text = token["content"]
        # As llama.cpp's converter has it.
        control = token.get("special") or text in CONTROL_BY_NAME or looks_special(text)
        known[token["id"]] = (text, CONTROL if control else USER_DEFINED)
    last = max(known)
    if last >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {last}, and the embedding table {rows} rows",
            hint="resize the table: model.resize_token_embeddings(len(tokenizer))",
        )
    taken = {text for text, _ in known.values()}
    if len(taken) < len(known):
        seen: set[str] = set()
        twice = next(text for text, _ in known.values() if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise ModelError(f"tokenizer.json: two ids have the text {twice!r}, which llama.cpp does not take")
    for number in range(rows):
        if number not in known:
            text = f"[PAD{number}]"
            while text in taken:
                text = f"[{text}]"
            known[number] = (text, UNUSED)
    return [known[number][0] for number in range(rows)], [known[number][1] for number in range(rows)]


def _merges(model: BpeModel) -> Iterable[Sequence[str]]:
    """The merges as pairs, in either spelling."""
    return (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])


def _merges_make_all(model: BpeModel) -> bool:
    """Whether the merges alone make each word of the vocabulary of its bytes."""
    from tokenizers import Tokenizer

    merging = Tokenizer.from_str(json.dumps({"version": "1.0", "model": {**model, "ignore_merges": False}}))
    cut = merging.encode_batch_fast(list(model["vocab"]), add_special_tokens=False)
    return all(len(encoding.ids) == 1 for encoding in cut)


def _normalizers(file: TokenizerFile) -> list[Step]:
    normalizer = file.get("normalizer")
    if not normalizer:
        return []
    return (
        [step for step in normalizer.get("normalizers") or [] if step]
        if normalizer.get("type") == "Sequence"
        else [normalizer]
    )


def _form(file: TokenizerFile) -> str:
    """The Unicode form to which a byte-level tokenizer normalises text, or ""."""
    kinds = [step.get("type", "") for step in _normalizers(file)]
    if kinds in ([], ["NFC"]):
        return "".join(kinds)
    raise ModelError(
        f"tokenizer.json: the normalizer {' + '.join(map(str, kinds))} is none that llama.cpp has",
        hint="this tokenizer cannot be written as GGUF",
    )


def _pieces(file: TokenizerFile, model: BpeModel, texts: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    scores = _scores(model, {text for text, kind in zip(texts, types, strict=True) if kind == NORMAL})
    unknown = model.get("unk_token")
    ids: dict[str, Any] = {}
    if unknown is not None and unknown in model["vocab"]:
        ids["tokenizer.ggml.unknown_token_id"] = model["vocab"][unknown]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [
            scores.get(text, -1e6 if kind == NORMAL else 0.0) for text, kind in zip(texts, types, strict=True)
        ],
        "tokenizer.ggml.add_space_prefix": _prefixes_space(file),
        **ids,
    }


def _scores(model: BpeModel, pieces: set[str]) -> dict[str, float]:
    """A score for each piece, so that llama.cpp merges in the order of the merges.

    A merge's rank becomes the score of the piece that it makes: where several merges make one, the earliest counts.
    llama.cpp knows no pairs, so it would also join two pieces that no merge joins: such tokenizers are refused.

    Raises:
        ModelError: llama.cpp would merge a pair that these merges leave apart.
    """
    ranks: dict[str, int] = {}
    pairs: set[tuple[str, str]] = set()
    for rank, (left, right) in enumerate(_merges(model)):
        pairs.add((left, right))
        ranks.setdefault(left + right, rank)
    made = ranks.keys() | {text for text in pieces if len(text) == 1}
    for text in pieces:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in made and right in made and (left, right) not in pairs:
                raise ModelError(
                    f"tokenizer.json: llama.cpp would make {text!r} of {left!r} and {right!r}, which the merges of "
                    "this tokenizer leave apart",
                    hint="this tokenizer cannot be written as GGUF",
                )
    return {text: -float(rank + 1) for text, rank in ranks.items()}


def _prefixes_space(file: TokenizerFile) -> bool:
    """Whether text, and what follows a control token, gets a space in front."""
    told = [(step.get("type"), step.get("prepend") or step.get("content")) for step in _normalizers(file)]
    cuts = file.get("pre_tokenizer") or Step()
    if cuts.get("type") == "Metaspace" and not told and cuts.get("replacement") == SPACE and not cuts.get("split"):
        if cuts.get("prepend_scheme") in ("always", "never"):
            return cuts["prepend_scheme"] == "always"
        raise ModelError(
            "tokenizer.json: a space is put in front of the first word only, and llama.cpp puts one after each "
            "control token too",
            hint="this tokenizer cannot be written as GGUF",
        )
    # Gemma's pre-tokenizer splits at spaces, but its normalizer has replaced them all before.
    idle = not cuts or (cuts.get("type") == "Split" and cuts.get("pattern") == {"String": " "})
    if idle and told == [("Prepend", SPACE), ("Replace", SPACE)]:
        return True
    if idle and told == [("Replace", SPACE)]:
        return False
    raise ModelError(
        f"tokenizer.json: the normalizer {told} with the pre-tokenizer {cuts.get('type')} is none that llama.cpp has",
        hint="this tokenizer cannot be written as GGUF",
    )


def _needs_strip(added: Sequence[AddedToken]) -> bool:
    """Whether control tokens swallow the space after them, as Phi-3's do and no other's in llama.cpp.

    Raises:
        ModelError: an added token treats what is around it in a way that llama.cpp has not.
    """
    wanted = [token["content"] for token in added if token["content"] not in SWALLOW_NOTHING]
    swallowing = [token["content"] for token in added if token.get("rstrip")]
    odd = [token["content"] for token in added if token.get("lstrip") or token.get("single_word")]
    if swallowing and (swallowing != wanted or "</s>" not in wanted):
        odd += swallowing
    if odd:
        raise ModelError(
            f"tokenizer.json: the added token {odd[0]!r} swallows space around it, or stands only as a whole word, "
            "which llama.cpp has not",
            hint="this tokenizer cannot be written as GGUF",
        )
    return bool(swallowing)


def special_keys(special: Special, texts: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Keys of the special ids; llama.cpp takes the end-of-text token and two more to end an answer."""
    keys: dict[str, Any] = {
        # Without this key llama.cpp takes token 11 for the one that begins text.
        "tokenizer.ggml.bos_token_id": special.eos if special.bos is None else special.bos,
        "tokenizer.ggml.eos_token_id": special.eos,
        "tokenizer.ggml.padding_token_id": special.pad,
        "tokenizer.ggml.add_bos_token": special.adds_bos,
        "tokenizer.ggml.add_eos_token": special.adds_eos,
    }
    others = [number for number in special.stops if number != special.eos]
    nameless = [number for number in others if texts[number] not in ENDS]
    ordered = [*nameless, *(number for number in others if number not in nameless)]
    for key, number in zip(("eot", "eom"), ordered, strict=False):
        keys[f"tokenizer.ggml.{key}_token_id"] = number
    notes = tuple(f"llama.cpp does not stop at {texts[number]!r}: pass it as a stop word" for number in nameless[2:])
    return keys, notes


def serving_template(template: str, special: Special) -> str:
    """A chat template without a begin-of-text token where the tokenizer has none: llama.cpp would insert another."""
    if special.bos is None and "bos_token" in template:
        return NO_BOS + template
    return template
