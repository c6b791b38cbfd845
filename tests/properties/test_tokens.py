"""Laws of the tokens room: what is trained is what was said, prompts are prefixes, nothing is cut or lost unseen."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Literal

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from finetune.errors import ModelError
from finetune.records import Batch, Conversation, Document, Message, Rendered, Tokenized
from finetune.templates.catalog import CATALOG, TemplateSource
from finetune.templates.render import ChatTemplate
from finetune.tokens.batch import epoch_batches, fixed_batches
from finetune.tokens.encode import Encoded, Overlong, encode_row, encode_rows
from finetune.tokens.tokenizer import FileTokenizer
from finetune_strategies.conversations import LOOKS_LIKE_CONTROL, conversations, texts
from finetune_strategies.tokenizers import (
    EOS,
    KINDS,
    TokenizerKind,
    all_control_kinds,
    tokenizer_folder,
    tokenizer_kinds,
)

NAMES = sorted(CATALOG)
TERMINATOR = {"alpaca": EOS, "chatml": "<|im_end|>", "llama2": EOS, "llama3": "<|eot_id|>"}
TIGHT = TemplateSource(
    "tight.jinja",
    "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
)
"""No white space between markup and text, so that a tokenizer is tempted to merge across the border."""

FULL = all_control_kinds()
FIRST = KINDS[0]


@cache
def tokenizer_of(kind: TokenizerKind) -> FileTokenizer:
    """The product's tokenizer of a folder."""
    return FileTokenizer(tokenizer_folder(kind))


@cache
def template_of(kind: TokenizerKind, name: str) -> ChatTemplate:
    """The template as the product puts it together with a tokenizer."""
    tokenizer = tokenizer_of(kind)
    source = TIGHT if name == "tight" else CATALOG[name]
    return ChatTemplate(source, tokenizer.control_tokens, bos=tokenizer.bos, eos=tokenizer.eos)


def spelled(kind: TokenizerKind, ids: Sequence[int]) -> str:
    """Ids as text, control tokens spelled out: independent of what the product skips."""
    out: list[str] = []
    run: list[int] = []
    for token in [*ids, -1]:
        if 0 <= token < len(kind.control_tokens) or token == -1:
            out.append(tokenizer_of(kind).decode(run))
            out.append(kind.control_tokens[token] if token >= 0 else "")
            run = []
        else:
            run.append(token)
    return "".join(out)


def control_ids(kind: TokenizerKind, ids: Sequence[int]) -> list[str]:
    """The control tokens among the ids."""
    return [kind.control_tokens[token] for token in ids if token < len(kind.control_tokens)]


def said(name: str, conversation: Conversation) -> list[str]:
    """For each answer what the model must learn to say, by the public format."""
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    if name == "llama2":
        return [f" {answer.strip()} {EOS}" for answer in answers]
    end = TERMINATOR.get(name, EOS)
    return [(answer.strip() if name == "llama3" else answer) + end for answer in answers]


def talk(*turns: str) -> Conversation:
    """A conversation from `role:text` words."""
    return Conversation(tuple(Message(*turn.split(":", 1)) for turn in turns), "rows.jsonl:7")


def encoded(kind: TokenizerKind, rows: list[Rendered], length: int, overlong: Overlong = "drop") -> Encoded:
    """The rows held to a length."""
    return encode_rows(rows, tokenizer_of(kind), max_length=length, overlong=overlong, dropped={})


@given(tokenizer_kinds())
@settings(deadline=None, max_examples=20)
def test_tokenizer_is_what_its_folder_says(kind: TokenizerKind) -> None:
    """Every control token, BOS rule and padding of every arrangement of tokenizer files is read as written."""
    tokenizer = tokenizer_of(kind)
    assert tokenizer.control_tokens == kind.control_tokens
    assert (tokenizer.adds_bos, tokenizer.bos, tokenizer.eos) == (kind.adds_bos, kind.bos_token, EOS)
    assert tokenizer.bos_id == (kind.control_tokens.index(kind.bos_token) if kind.bos_token else None)
    assert tokenizer.eos_id == 0
    assert spelled(kind, [tokenizer.pad_id]) == ("<|pad|>" if kind.pad == "own" else EOS)
    assert [tokenizer.control_id(token) for token in kind.control_tokens] == list(range(len(kind.control_tokens)))
    assert tokenizer.control_id("a") is None
    assert tokenizer.control_id("<|nope|>") is None
    assert len(tokenizer) > 256 + len(kind.control_tokens)
    assert tokenizer.stop_ids == (0,)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_tokenizer_broken_file_is_named(file: str, tmp_path: object) -> None:
    """A cut-off or missing tokenizer file is a ModelError that names the folder."""
    folder = tmp_path / "model"  # type: ignore[operator]
    folder.mkdir()
    for path in tokenizer_folder(FIRST).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / file).write_bytes((folder / file).read_bytes()[:-3])
    with pytest.raises(ModelError, match="model"):
        FileTokenizer(folder)
    (folder / file).unlink()
    if file != "config.json":
        with pytest.raises(ModelError, match="model"):
            FileTokenizer(folder)


@given(FULL, texts(), st.sampled_from(NAMES))
@settings(deadline=None)
def test_text_survives_and_never_becomes_control(kind: TokenizerKind, text: str, name: str) -> None:
    """P-INERT: decode(encode(text)) is the text, and no content in any role yields a control id."""
    tokenizer = tokenizer_of(kind)
    for hostile in (text, text + "".join(kind.control_tokens), kind.control_tokens[-1] + text):
        ids = tokenizer.encode_content(hostile)
        assert tokenizer.decode(ids) == hostile
        assert control_ids(kind, ids) == []
        assert tokenizer.encode_spans(hostile)[0] == ids
        tame = talk("system:x", "user:y", "assistant:z", "user:y", "assistant:z")
        wild = Conversation(tuple(Message(message.role, hostile) for message in tame.messages), tame.where)
        rows = [encode_row(template_of(kind, name).render(one), tokenizer).ids for one in (tame, wild)]
        assert control_ids(kind, rows[0]) == control_ids(kind, rows[1])


@given(tokenizer_kinds(), st.sampled_from(LOOKS_LIKE_CONTROL), texts())
@settings(deadline=None, max_examples=40)
def test_markup_is_split_at_its_control_tokens(kind: TokenizerKind, token: str, text: str) -> None:
    """Markup cut at control tokens joins to itself; odd places are control tokens, even places hold none."""
    assume(not any(mark in text or (mark in token and mark != token) for mark in kind.control_tokens))
    pieces = tokenizer_of(kind).split_control(text + token + text + kind.control_tokens[-1])
    assert "".join(pieces) == text + token + text + kind.control_tokens[-1]
    assert pieces[1::2] == [*([token] if token in kind.control_tokens else []), kind.control_tokens[-1]]
    for piece in pieces[1::2]:
        assert tokenizer_of(kind).encode_markup(piece) == [tokenizer_of(kind).control_id(piece)]


@pytest.mark.parametrize("name", [*NAMES, "tight"])
@given(FULL, conversations())
@example(FIRST, talk("user:é🦙", "assistant:🦙é", "user: x", "assistant:\n\n\nyes"))
@settings(deadline=None, max_examples=40)
def test_trained_tokens_are_answers_and_terminators(name: str, kind: TokenizerKind, conversation: Conversation) -> None:
    """P-MASK, P-COUNT: trained ids spell each answer with its terminator, also where padding is the end of text."""
    rendered = template_of(kind, name).render(conversation)
    row = encode_row(rendered, tokenizer_of(kind))
    assert len(row.ids) == len(row.trained)
    runs: list[list[int]] = [[]]
    for token, trained in zip(row.ids, row.trained, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    expected = said(name, conversation)
    assert "".join(spelled(kind, run) for run in runs) == "".join(expected)
    ends = [control_ids(kind, run) for run in runs if run]
    assert ends == [[TERMINATOR.get(name, EOS)]] * len(expected)
    assert all(run[-1] < len(kind.control_tokens) for run in runs if run)
    assert row.target_count == sum(map(len, runs)) > 0
    bos = kind.bos_token if kind.adds_bos and name in ("alpaca", "chatml", "tight") else ""
    assert spelled(kind, row.ids) == bos + rendered.text


@given(FULL, texts(min_size=1))
@settings(deadline=None, max_examples=30)
def test_document_is_trained_to_its_end(kind: TokenizerKind, text: str) -> None:
    """P-STOP for plain text: everything but a BOS is trained, the last token is the end of text."""
    row = encode_row(template_of(kind, "alpaca").render_document(Document(text, "a:1")), tokenizer_of(kind))
    assert spelled(kind, row.ids) == (kind.bos_token if kind.adds_bos else "") + text + EOS
    assert row.trained == ((False,) if kind.adds_bos else ()) + (True,) * (len(row.ids) - kind.adds_bos)
    assert row.ids[-1] == 0


@pytest.mark.parametrize("name", NAMES)
def test_stop_tokens_cover_what_is_trained_to_stop(name: str) -> None:
    """P-STOP: the terminator of every format is one control id, and it is the last that each answer trains."""
    kinds = [kind for kind in KINDS if kind.chatml and kind.llama3]
    assert len(kinds) == 6
    for kind in kinds:
        tokenizer = tokenizer_of(kind)
        [stop] = template_of(kind, name).terminators()
        conversation = talk("user:a", "assistant:b", "user:c", "assistant:d")
        row = encode_row(template_of(kind, name).render(conversation), tokenizer)
        after = (*row.trained[1:], False)
        last = [row.ids[index] for index, trained in enumerate(row.trained) if trained and not after[index]]
        assert last == [tokenizer.control_id(stop)] * 2


@pytest.mark.parametrize("name", [*NAMES, "tight"])
@given(FULL, conversations())
@example(FIRST, talk("user:a", "assistant:(hi", "user:b", "assistant:c"))
@example(FIRST, talk("user:a", "assistant:\n\n\nhi", "user:b", "assistant:\n\n\n"))
@settings(deadline=None, max_examples=40)
def test_prompt_ids_are_a_prefix_of_row_ids(name: str, kind: TokenizerKind, conversation: Conversation) -> None:
    """P-PREFIX: for every answer, the ids asked with are the ids trained on up to it, and what follows is trained."""
    chat, tokenizer = template_of(kind, name), tokenizer_of(kind)
    row = encode_row(chat.render(conversation), tokenizer)
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant":
            asked = encode_row(chat.render_prompt(Conversation(conversation.messages[:index], "x")), tokenizer)
            assert row.ids[: len(asked.ids)] == asked.ids
            assert row.trained[len(asked.ids)]
            assert asked.trained == (False,) * len(asked.ids)


BOS_CASES = [
    (name, kind) for name in NAMES for kind in KINDS if {*CATALOG[name].control_tokens} <= {*kind.control_tokens}
]


@pytest.mark.parametrize(("name", "kind"), BOS_CASES)
def test_bos_stands_once_or_not_at_all(name: str, kind: TokenizerKind) -> None:
    """P-BOS: one BOS in front if the tokenizer or the format puts one there, never two, in training and asking."""
    assert len(BOS_CASES) == 32
    chat, tokenizer = template_of(kind, name), tokenizer_of(kind)
    conversation = talk("user:<s>a", "assistant:<s>b")
    wanted = bool(kind.bos_token) and (kind.adds_bos or name.startswith("llama"))
    for rendered in (chat.render(conversation), chat.render_prompt(conversation.prompt)):
        ids = encode_row(rendered, tokenizer).ids
        assert (ids[0] == tokenizer.bos_id) == wanted
        assert tokenizer.bos_id not in ids[1:3]
        if kind.bos != "eos":
            assert ids.count(tokenizer.bos_id) == wanted  # type: ignore[arg-type]
        if wanted:
            assert not encode_row(rendered, tokenizer).trained[0]
    document = encode_row(chat.render_document(Document("<s>a", "a:1")), tokenizer).ids
    assert document.count(tokenizer.bos_id) == (kind.adds_bos or kind.bos == "eos")  # type: ignore[arg-type]


def rows_for_cutting() -> st.SearchStrategy[list[Conversation]]:
    """Conversations of very different lengths."""
    return st.lists(conversations(max_turns=2), min_size=1, max_size=4)


@given(FULL, rows_for_cutting(), st.sampled_from(NAMES), st.sampled_from(["drop", "truncate_prompt"]))
@settings(deadline=None, max_examples=40)
def test_length_that_suffices_changes_nothing(
    kind: TokenizerKind, found: list[Conversation], name: str, overlong: Literal["drop", "truncate_prompt"]
) -> None:
    """A limit at or above every row is no limit: same ids, same marks, nothing dropped, nothing cut."""
    rendered = [template_of(kind, name).render(one) for one in found]
    whole = tuple(encode_row(row, tokenizer_of(kind)) for row in rendered)
    longest = max(len(row.ids) for row in whole)
    for length in (longest, longest + 1, 10**6):
        result = encoded(kind, rendered, length, overlong)
        assert result.rows == whole
        assert (result.counts.dropped, result.counts.truncated) == ({}, 0)
    assert result.counts.tokens == sum(len(row.ids) for row in whole)
    assert result.counts.trained_tokens == sum(sum(row.trained) for row in whole)


@given(FULL, rows_for_cutting(), st.sampled_from([*NAMES, "tight"]), st.integers(-40, 1), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_overlong_rows_are_dropped_whole_and_counted(
    kind: TokenizerKind, found: list[Conversation], name: str, less: int, before: int
) -> None:
    """`drop` keeps exactly the rows that fit, uncut; read is kept plus dropped, with what earlier steps dropped."""
    rendered = [template_of(kind, name).render(one) for one in found]
    whole = [encode_row(row, tokenizer_of(kind)) for row in rendered]
    length = max(1, max(len(row.ids) for row in whole) + less)
    dropped = {"empty answer": before} if before else {}
    result = encode_rows(rendered, tokenizer_of(kind), max_length=length, overlong="drop", dropped=dropped)
    assert list(result.rows) == [row for row in whole if len(row.ids) <= length]
    lost = len(whole) - len(result.rows)
    assert result.counts.dropped == dropped | ({f"longer than {length} tokens": lost} if lost else {})
    assert result.counts.read == len(found) + before == result.counts.kept + sum(result.counts.dropped.values())
    assert result.counts.truncated == 0


@given(FULL, conversations(max_turns=2), st.sampled_from(NAMES), st.integers(0, 30))
@example(FIRST, talk("system:one two three", "user:four five six", "assistant:seven"), "chatml", 5)
@example(FIRST, talk("system:éééééééééééé", "user:four", "assistant:five"), "alpaca", 20)
@settings(deadline=None, max_examples=60)
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
    """P-COUNT: a row with nothing to learn is dropped for that reason, not kept as a zero in the mean."""
    prompt = template_of(FIRST, "chatml").render_prompt(talk("user:a"))
    result = encoded(FIRST, [prompt, template_of(FIRST, "chatml").render(talk("user:a", "assistant:b"))], 99)
    assert len(result.rows) == 1
    assert result.counts.dropped == {"no trained token": 1}
    assert (result.counts.read, result.counts.kept) == (2, 1)


def token_rows() -> st.SearchStrategy[list[Tokenized]]:
    """Rows of ids, many of one length, some equal."""
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=7).map(tuple)
    return st.lists(ids.map(lambda found: Tokenized(found, (True,) * len(found), "a:1")), max_size=70)


def ordered(batches: list[Batch]) -> list[tuple[int, ...]]:
    """The rows' ids in the order of the batches."""
    return [row.ids for batch in batches for row in batch.rows]


@given(token_rows(), st.integers(1, 9), st.integers(0, 3), st.integers(0, 5))
@example([Tokenized((number,), (True,), "a:1") for number in range(7)], 3, 0, 0)
@settings(deadline=None)
def test_batches_hold_every_row_once(rows: list[Tokenized], size: int, seed: int, epoch: int) -> None:
    """P-COVER: an epoch is all rows and nothing else, full batches but for a remainder, a function of the seed."""
    for batches in (epoch_batches(rows, size, seed=seed, epoch=epoch), fixed_batches(rows, size)):
        assert Counter(row for batch in batches for row in batch.rows) == Counter(rows)
        assert all(1 <= len(batch.rows) <= size for batch in batches)
        assert sum(len(batch.rows) < size for batch in batches) == (len(rows) % size > 0)
        assert len(batches) == -(-len(rows) // size)
        assert sum(batch.token_count for batch in batches) == sum(len(row.ids) for row in rows)
    assert epoch_batches(rows, size, seed=seed, epoch=epoch) == epoch_batches(rows, size, seed=seed, epoch=epoch)
    assert fixed_batches(rows, size) == fixed_batches(rows, size)
    lengths = [len(row) for row in ordered(fixed_batches(rows, size))]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("count", [47, 97])
def test_batches_order_follows_seed_and_epoch(size: int, count: int) -> None:
    """P-ORDER: every epoch and every seed, 0 among them, has its own order, and fixed batches have one."""
    rows = [Tokenized((number,) * (1 + number % 5), (True,) * (1 + number % 5), "a:1") for number in range(count)]
    orders = [ordered(epoch_batches(rows, size, seed=seed, epoch=epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 9
    assert all(order != [row.ids for row in rows] for order in orders)
    assert ordered(fixed_batches(rows, size)) == sorted((row.ids for row in rows), key=lambda ids: (len(ids), ids))


def test_batches_are_of_similar_length() -> None:
    """Within an epoch little is padded: most batches hold rows of nearly one length."""
    rows = [Tokenized((number,) * (1 + number % 50), (True,) * (1 + number % 50), "a:1") for number in range(200)]
    batches = epoch_batches(rows, 4, seed=0, epoch=1)
    padded = sum(max(len(row.ids) for row in batch.rows) * len(batch.rows) for batch in batches)
    assert padded < 1.15 * sum(len(row.ids) for row in rows)
