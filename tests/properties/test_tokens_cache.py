"""Laws of the token cache: its name changes exactly when the tokens would, and it never gives back other ones."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from finetune.chat.cache import cache_key, dump_marked, load_marked
from finetune.chat.encode import mark_rows
from finetune.records import Document, Rendered, Segment
from finetune_strategies.conversations import conversations, texts
from finetune_strategies.profiles import examples
from finetune_strategies.tokenizers import TokenizerKind
from support.conversations import FIRST, FULL, NAMES, talk, template_of, tokenizer_of


def rendered_rows() -> st.SearchStrategy[list[Rendered]]:
    """Rows as they are encoded, of any template, conversations and plain text."""
    chat = st.builds(lambda name, one: template_of(FIRST, name).render(one), st.sampled_from(NAMES), conversations())
    plain = texts().map(lambda text: template_of(FIRST, "alpaca").render_document(Document(text, "a:1")))
    return st.lists(chat | plain, max_size=4)


def tokens(kind: TokenizerKind, rows: list[Rendered]) -> list[Any]:
    """What the rows become."""
    return [(row.ids, row.marks, row.document) for row in mark_rows(rows, tokenizer_of(kind))]


def altered(row: Rendered, at: int, **changes: Any) -> Rendered:
    """The row with one segment changed."""
    segments = list(row.segments)
    segments[at % len(segments)] = replace(segments[at % len(segments)], **changes)
    return Rendered(tuple(segments), row.where)


@given(rendered_rows(), st.data())
def test_cache_key_changes_with_the_tokens(rows: list[Rendered], data: st.DataObject) -> None:
    """Rows whose tokens or marks differ have different names, whatever small change made them differ."""
    changed = list(rows)
    kind = FIRST
    what = data.draw(st.sampled_from(["text", "trained", "control", "role", "drop", "twice", "swap", "tokenizer"]))
    at = data.draw(st.integers(0, 30))
    if what == "tokenizer":
        kind = data.draw(FULL)
    elif rows:
        row = rows[at % len(rows)]
        segment = row.segments[at % len(row.segments)]
        change: dict[str, list[Rendered]] = {
            "text": [altered(row, at, text=segment.text + data.draw(st.sampled_from([" ", "a", "\0", "<|im_end|>"])))],
            "trained": [altered(row, at, trained=not segment.trained)],
            "control": [altered(row, at, control=not segment.control)],
            "role": [altered(row, at, role=data.draw(st.sampled_from(["user", "assistant", "text"])))],
            "drop": [],
            "twice": [row, row],
            "swap": [Rendered(row.segments[::-1], row.where)],
        }
        changed[at % len(rows) : at % len(rows) + 1] = change[what]
    if tokens(kind, changed) != tokens(FIRST, rows):
        assert cache_key(changed, tokenizer_of(kind)) != cache_key(rows, tokenizer_of(FIRST))


@given(rendered_rows())
@examples(1 / 2)
def test_cache_key_is_of_nothing_but_what_is_encoded(rows: list[Rendered]) -> None:
    """The file, the line and the name of a prompt's role change no token, and so not the name."""
    elsewhere = [
        Rendered(
            tuple(replace(s, role="system") if s.role == "user" else s for s in row.segments), f"other.csv:{number}"
        )
        for number, row in enumerate(rows)
    ]
    assert tokens(FIRST, elsewhere) == tokens(FIRST, rows)
    assert cache_key(elsewhere, tokenizer_of(FIRST)) == cache_key(rows, tokenizer_of(FIRST))


@given(FULL, rendered_rows())
def test_cache_gives_back_what_was_put_in(kind: TokenizerKind, rows: list[Rendered]) -> None:
    """What is read back is what was encoded, each row with its own place."""
    marked = list(mark_rows(rows, tokenizer_of(kind)))
    moved = [Rendered(row.segments, f"other:{number}") for number, row in enumerate(rows)]
    found = load_marked(dump_marked(marked), moved)
    assert found is not None
    assert [replace(row, where="") for row in found] == [replace(row, where="") for row in marked]
    assert [row.where for row in found] == [row.where for row in moved]


@given(st.data())
def test_cache_torn_or_changed_is_not_believed(data: st.DataObject) -> None:
    """Bytes that are cut off, flipped, lengthened or of other rows are no answer, and no error either."""
    rows = [template_of(FIRST, "chatml").render(talk("user:a b c", "assistant:d e f"))] * 2
    content = dump_marked(list(mark_rows(rows, tokenizer_of(FIRST))))
    at = data.draw(st.integers(0, len(content) - 1))
    flipped = bytes([content[at] ^ data.draw(st.sampled_from([1, 0x80, 0xFF]))])
    for broken in (content[:at], content[:at] + flipped + content[at + 1 :], content + b"\0", b""):
        assert load_marked(broken, rows) is None
    assert load_marked(content, rows[:1]) is None
    assert load_marked(content, [*rows, Rendered((Segment("a", "text", True, False),), "a:1")]) is None
    assert load_marked(content, rows) is not None
