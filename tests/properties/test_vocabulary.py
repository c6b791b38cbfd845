"""What llama.cpp takes tokens for by their names is what a GGUF file says of them, and is told."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest

from finetune.errors import ModelError
from finetune.export.by_name import LoadedTokenizer, control_ids, end_ids
from finetune.export.pre_tokenizer import GPT4O
from finetune.export.vocabulary import CONTROL, UNUSED, USER_DEFINED, Special, describe_vocabulary, find_misread
from finetune_strategies.tokenizers import TokenizerKind, tokenizer_folder

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": GPT4O}, "behavior": "Isolated", "invert": False}
CUTS = {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}


def _with_words(
    words: Sequence[str], merges: Sequence[Sequence[str]] = (), added: Mapping[str, bool] | None = None
) -> tuple[dict[str, Any], dict[str, int]]:
    """A byte-level tokenizer with more words, and added tokens with a flag each; and the ids of all of them."""
    said = json.loads((tokenizer_folder(TokenizerKind("none", "own")) / "tokenizer.json").read_text(encoding="utf-8"))
    vocab: dict[str, int] = said["model"]["vocab"]
    ids = {text: len(vocab) + place for place, text in enumerate([*words, *(added or {})])}
    vocab.update({text: ids[text] for text in words})
    said["model"]["merges"] += merges
    rules = said["added_tokens"][0]
    said["added_tokens"] += [
        {**rules, "id": ids[text], "content": text, "special": flag} for text, flag in (added or {}).items()
    ]
    return said, ids


def test_tokens_that_llama_cpp_knows_by_name_are_what_it_takes_them_for() -> None:
    """Names of control tokens are control tokens, flagged or not; other added ones are not; all of it is told."""
    flags = {"<|fim_pad|>": False, "<think>": False, "<｜x｜>": False, "<|channel|>": True}
    said, ids = _with_words(["<EOT>"], added=flags)
    told = describe_vocabulary(said, Special(None, 0, 0, (0,), adds_bos=False), 500)
    texts, types = (told.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    kinds = {text: types[number] for text, number in ids.items()}
    assert kinds == {**dict.fromkeys(flags, CONTROL), "<think>": USER_DEFINED, "<EOT>": UNUSED}
    assert "<EOT>" not in texts
    assert {text for text, number in ids.items() if number in told.control} == {"<|fim_pad|>", "<｜x｜>"}
    for note, words in zip(
        told.notes, (("<｜x｜>", "not show"), ("<|channel|>", "it shows"), ("'<EOT>'",)), strict=True
    ):
        assert all(word in note for word in words)
    assert ids["<|fim_pad|>"] in end_ids(texts)


def test_word_that_llama_cpp_takes_for_a_control_token_keeps_its_name_where_it_has_a_task() -> None:
    """The token that ends text is one, whatever it is flagged; a word of ordinary text refuses the tokenizer."""
    said, ids = _with_words(["<EOT>"])
    number = ids["<EOT>"]
    told = describe_vocabulary(said, Special(None, number, 0, (number,), adds_bos=False), 500)
    assert told.metadata["tokenizer.ggml.tokens"][number] == "<EOT>"
    said, _ = _with_words(["<E", "<EO", "<EOT", "<EOT>"], [("<", "E"), ("<E", "O"), ("<EO", "T"), ("<EOT", ">")])
    said["pre_tokenizer"] = BYTES
    with pytest.raises(ModelError, match=r"'<EOT>' is a word of ordinary text"):
        find_misread(said, said["added_tokens"], Special(None, 0, 0, (0,), adds_bos=False))


def test_end_of_an_answer_in_harmony_is_none() -> None:
    """Where there are tokens to return and to call with, `<|end|>` only ends a message."""
    assert end_ids(["<|end|>", "x", "<|return|>"]) == [0, 2]
    assert end_ids(["<|end|>", "<|call|>", "<|return|>"]) == [1, 2]
    assert control_ids(["<|end|>", "<|call|>", "<|return|>", "x"], [True, True, True, False]) == {1, 2}


def test_whole_words_are_no_matter_where_merges_make_them() -> None:
    """A name for the same patterns is taken where each word of the vocabulary is what its merges make."""
    for word, merges, fits in (("ab", [["a", "b"]], True), ("ab", [], False)):
        vocab = {text: number for number, text in enumerate(("a", "b", word))}
        model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}
        said = {"model": model, "pre_tokenizer": CUTS, "added_tokens": []}
        describe = partial(describe_vocabulary, said, Special(None, 0, 0, (0,), adds_bos=False), 3)
        if fits:
            assert describe().metadata["tokenizer.ggml.pre"] == "gpt-4o"
        else:
            with pytest.raises(ModelError, match="takes words of the vocabulary whole"):
                describe()


def test_tokenizer_as_llama_cpp_loads_it_reads_its_control_tokens_only_where_told() -> None:
    """A word with a control token's name is read whole in markup, cut in plain text, and not shown."""
    said, ids = _with_words(["<EOT>"], added={"<think>": False, "<|channel|>": True})
    texts = [""] * (1 + max(ids.values()))
    for text, number in [*said["model"]["vocab"].items(), *ids.items()]:
        texts[number] = text
    loaded = LoadedTokenizer(
        said, control_ids(texts, [number == ids["<|channel|>"] for number in range(len(texts))]), texts
    )
    every = "<EOT><think><|channel|>"
    assert loaded.markup(every) == [ids["<EOT>"], ids["<think>"], ids["<|channel|>"]]
    assert loaded.plain(every)[-2:] == [ids["<think>"], ids["<|channel|>"]]
    assert len(loaded.plain("<EOT>")) > 1
    assert loaded.decode(loaded.markup(every)) == "<think><|channel|>"
