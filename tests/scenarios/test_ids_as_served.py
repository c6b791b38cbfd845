"""Ids are those that servers send: of real templates on real tokenizers, held to transformers and llama.cpp.

Two things differ on purpose. What follows the prompt of the last answer is encoded apart where a token would reach
across its end, since a server encodes the prompt alone. And a control token that somebody's words name stays text.
"""

from functools import cache

import pytest

pytest.importorskip("transformers", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

from support.real_chats import CONVERSATIONS, Outcome, Pair, compare, compare_llama_cpp, describe, pairs
from support.real_tokenizers import HOME, REMEDY, TEMPLATES, TOKENIZERS, tokenizer_folder

PAIRS = {f"{pair.tokenizer} x {pair.name}": pair for pair in pairs()}


@cache
def _compared(name: str) -> Outcome:
    return compare(PAIRS[name])


def wrong(pair: Pair, outcome: Outcome, kinds: tuple[str, ...]) -> list[str]:
    """The differences of these kinds, in words."""
    return [describe(pair, each) for each in outcome.differences if each.kind in kinds]


@pytest.mark.parametrize("name", [*TOKENIZERS, *(f"templates/{source}" for source in TEMPLATES)])
def test_what_the_laws_are_tried_on_is_here(name: str) -> None:
    """8 tokenizers and the templates of 2 packages; without one of them the laws below see less."""
    if not (HOME / name).exists():
        pytest.skip(f"{name} is not here: {REMEDY}")
    part = name.removeprefix("templates/")
    assert any(part == pair.tokenizer or pair.name.startswith(f"{part}/") for pair in PAIRS.values())


@pytest.mark.parametrize("name", PAIRS)
def test_ids_are_those_of_transformers(name: str) -> None:
    """Prompts and rows of each of 49 conversations that the template takes."""
    outcome = _compared(name)
    assert wrong(PAIRS[name], outcome, ("prompt", "row")) == []
    assert outcome.equal["prompt"] + outcome.named + len(outcome.refused) == len(CONVERSATIONS) == 49


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_ids_are_those_of_llama_cpp(tokenizer: str) -> None:
    """The same texts, and those of an export's proof, cut by llama.cpp from the file that we export."""
    if not tokenizer_folder(tokenizer).exists():
        pytest.skip(f"{tokenizer} is not here: {REMEDY}")
    outcomes = [_compared(name) for name, pair in PAIRS.items() if pair.tokenizer == tokenizer]
    assert compare_llama_cpp(tokenizer, outcomes) == ""
    kinds = ("prompt in llama.cpp", "row in llama.cpp", "proof in llama.cpp")
    assert [words for outcome in outcomes for words in wrong(outcome.pair, outcome, kinds)] == []
