"""Laws of the length limit: what does not fit is cut or left out as declared, and every row is accounted for."""

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.chat.encode import encode_row, mark_rows
from finetune.errors import DataError
from finetune.records import Conversation, Document, Message, Rendered
from finetune_strategies.conversations import conversations
from finetune_strategies.profiles import examples
from finetune_strategies.tokenizers import TokenizerKind
from support.conversations import FIRST, FULL, NAMES, control_ids, encoded, spelled, talk, template_of, tokenizer_of


def rows_for_cutting() -> st.SearchStrategy[list[Conversation]]:
    """Conversations of very different lengths."""
    return st.lists(conversations(max_turns=2), min_size=1, max_size=4)


@given(FULL, conversations(max_turns=2), st.sampled_from(NAMES), st.integers(0, 30))
@example(FIRST, talk("system:one two three", "user:four five six", "assistant:seven"), "chatml", 5)
@example(FIRST, talk("system:éééééééééééé", "user:four", "assistant:five"), "alpaca", 20)
def test_truncation_takes_only_the_oldest_prompt_words(
    kind: TokenizerKind, conversation: Conversation, name: str, cut: int
) -> None:
    """`truncate_prompt` takes the oldest words of the prompt and no other token; where they do not suffice, the row."""
    rendered = template_of(kind, name).render(conversation)
    whole = encode_row(rendered, tokenizer_of(kind))
    result = encoded(kind, [rendered], max(1, len(whole.ids) - cut), "truncate_prompt")
    assert result.counts.read == 1 == result.counts.kept + sum(result.counts.dropped.values())
    untouchable = len(encode_row(emptied(rendered), tokenizer_of(kind)).ids)
    if not result.rows:
        assert cut > 0
        assert result.counts.truncated == 0
        assert max(1, len(whole.ids) - cut) < untouchable + 2 * len(conversation.messages)
        return
    [row] = result.rows
    assert len(row.ids) == len(whole.ids) - min(cut, len(whole.ids) - 1)
    assert result.counts.truncated == (len(row.ids) < len(whole.ids))
    assert row.target_count == whole.target_count == result.counts.trained_tokens
    assert [t for t, mark in zip(row.ids, row.trained, strict=True) if mark] == [
        t for t, mark in zip(whole.ids, whole.trained, strict=True) if mark
    ]
    assert control_ids(kind, row.ids) == control_ids(kind, whole.ids)
    remaining = iter(whole.ids)
    assert all(token in remaining for token in row.ids)
    left, at = spelled(kind, row.ids), 0
    for markup in (segment.text for segment in rendered.segments if segment.control):
        assert markup in left[at:]
        at = left.index(markup, at) + len(markup)


def emptied(rendered: Rendered) -> Rendered:
    """The row without the words of its prompt: what truncation may not touch."""
    return Rendered(tuple(s for s in rendered.segments if s.control or s.trained), rendered.where)


def test_truncation_starts_at_the_oldest_word() -> None:
    """Of system text, question and later question the first words go first, and markup stays as it is."""
    kind, name = FIRST, "chatml"
    conversation = talk("system:1 2 3", "user:4 5 6", "assistant:7", "user:8 9", "assistant:0")
    rendered = template_of(kind, name).render(conversation)
    length = len(encode_row(rendered, tokenizer_of(kind)).ids)
    left = ["1234567890"[start:] for start in range(7)] + ["790", "70"]
    seen = []
    for cut in range(length):
        result = encoded(kind, [rendered], length - cut, "truncate_prompt")
        if not result.rows:
            assert result.counts.dropped == {f"longer than {length - cut} tokens": 1}
            break
        text = spelled(kind, result.rows[0].ids)
        assert (text.count("<|im_start|>"), text.count("\n"), text.count("user")) == (5, 10, 2)
        seen.append(left.index("".join(filter(str.isdigit, text))))
    assert seen == sorted(seen)
    assert set(seen) == set(range(9))


def test_row_without_trained_token_is_dropped_and_counted() -> None:
    """A row with nothing to learn is dropped for that reason, not kept as a zero in the mean."""
    prompt = template_of(FIRST, "chatml").render_prompt(talk("user:a"))
    result = encoded(FIRST, [prompt, template_of(FIRST, "chatml").render(talk("user:a", "assistant:b"))], 99)
    assert len(result.rows) == 1
    assert result.counts.dropped == {"no trained token": 1}
    assert (result.counts.read, result.counts.kept) == (2, 1)


def document(kind: TokenizerKind, text: str) -> Rendered:
    """Plain text as a row."""
    return template_of(kind, "alpaca").render_document(Document(text, "rows.jsonl:3"))


@given(FULL, rows_for_cutting(), st.integers(-30, 1))
@examples(1 / 2)
def test_refuse_names_every_row_that_is_too_long(kind: TokenizerKind, found: list[Conversation], less: int) -> None:
    """`refuse` keeps all rows or says of each one that is too long where it stands and how long it is."""
    rendered = [
        Rendered(template_of(kind, "chatml").render(one).segments, f"rows.jsonl:{number}")
        for number, one in enumerate(found, start=101)
    ]
    whole = [encode_row(row, tokenizer_of(kind)) for row in rendered]
    length = max(1, max(len(row.ids) for row in whole) + less)
    long = [f"{row.where}: {len(row.ids)} tokens" for row in whole if len(row.ids) > length]
    if not long:
        assert list(encoded(kind, rendered, length, "refuse").rows) == whole
        return
    with pytest.raises(DataError) as caught:
        encoded(kind, rendered, length, "refuse")
    told = str(caught.value)
    assert all(place in told for place in long)
    assert told.count("rows.jsonl:") == len(long)
    rows, tokens = "rows are" if len(long) > 1 else "row is", "tokens" if length > 1 else "token"
    assert told.startswith(f"{len(long)} {rows} longer than {length} {tokens}")
    assert "tokens.max_length" in caught.value.hint


def test_refuse_shows_twenty_and_counts_the_rest() -> None:
    """Thousands of rows that are too long are one error of twenty lines and a count."""
    with pytest.raises(DataError, match="and 5 more") as caught:
        encoded(FIRST, [document(FIRST, "one two three four")] * 25, 3, "refuse")
    assert str(caught.value).count(":3") == 20


@pytest.mark.slow
def test_long_conversations_take_time_in_proportion() -> None:
    """12,800 messages are encoded in seconds, not minutes: no answer's prefix is gone through for each answer."""
    kind = TokenizerKind()
    template, tokenizer = template_of(kind, "chatml"), tokenizer_of(kind)
    messages = (Message("user", "hi"), Message("assistant", "ho")) * 6400
    start = time.process_time()
    [row] = mark_rows([template.render(Conversation(messages, "a:1"))], tokenizer)
    assert time.process_time() - start < 6
    assert row.tokenized().target_count > 6400


def test_markup_that_differs_in_every_row_is_named_as_any_other() -> None:
    """What is kept of markup is bounded, and whether it was kept makes no other text of it."""
    tokenizer = tokenizer_of(TokenizerKind())
    token = tokenizer.control_tokens[-1]
    texts = [f"{token}{number}{token}" for number in range(600)] + [token + "a" * 20_000 + token]
    for text in [*texts, *texts[400:], *texts[400:]]:
        said, places = tokenizer.by_name(text)
        names = list(re.finditer("\U0010fffd.*?\U0010fffd", said))
        assert re.sub("\U0010fffd.*?\U0010fffd", token, said) == text
        assert list(places) == [name.start() for name in names]
        assert len(tokenizer._named) <= 256
