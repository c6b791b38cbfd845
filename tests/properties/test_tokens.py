"""Laws of the tokens room: what is trained is what was said, prompts are prefixes, nothing is cut or lost unseen."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from finetune.chat import encode
from finetune.chat.catalog import CATALOG, TemplateSource
from finetune.chat.encode import REACHING, encode_row, mark_rows
from finetune.chat.encoder import Encoder
from finetune.chat.render import ChatTemplate
from finetune.chat.tokenizer import FileTokenizer
from finetune.config import Plan, TrainingConfig
from finetune.data.shape import ShapedRows
from finetune.errors import ModelError, TemplateError
from finetune.records import Conversation, Document, Message, ModelLocation
from finetune_strategies.conversations import LOOKS_LIKE_CONTROL, conversations, texts
from finetune_strategies.profiles import examples
from finetune_strategies.tokenizers import EOS, KINDS, SERVED, TokenizerKind, tokenizer_folder, tokenizer_kinds
from support.conversations import (
    FIRST,
    FULL,
    NAMES,
    TERMINATOR,
    TIGHT,
    control_ids,
    said,
    spelled,
    talk,
    template_of,
    tokenizer_of,
)

LONGEST = 12
"""Characters of the longest token of white space and marks in these vocabularies."""


@given(tokenizer_kinds())
@examples(1 / 3)
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
    with pytest.raises(ModelError, match="model") as caught:
        FileTokenizer(folder)
    assert caught.value.hint
    (folder / file).unlink()
    if file != "config.json":
        with pytest.raises(ModelError, match="model"):
            FileTokenizer(folder)


@given(FULL, texts(), st.sampled_from(NAMES))
def test_text_survives_and_never_becomes_control(kind: TokenizerKind, text: str, name: str) -> None:
    """Decode(encode(text)) is the text, and no content in any role yields a control id."""
    tokenizer = tokenizer_of(kind)
    for hostile in (text, text + "".join(kind.control_tokens), kind.control_tokens[-1] + text):
        ids = tokenizer.encode_content(hostile)
        assert tokenizer.decode(ids) == hostile
        assert control_ids(kind, ids) == []
        assert tokenizer.encode_spans([hostile])[0][0] == ids
        tame = talk("system:x", "user:y", "assistant:z", "user:y", "assistant:z")
        wild = Conversation(tuple(Message(message.role, hostile) for message in tame.messages), tame.where)
        rows = [encode_row(template_of(kind, name).render(one), tokenizer).ids for one in (tame, wild)]
        assert control_ids(kind, rows[0]) == control_ids(kind, rows[1])


@given(tokenizer_kinds(), st.sampled_from(LOOKS_LIKE_CONTROL), texts())
@examples(2 / 3)
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
@example(FIRST, talk("user:a", "assistant:(hi", "user:b", "assistant:c"))
@example(FIRST, talk("user: a ", "assistant:b", "user:c", "assistant: d "))
@example(FIRST, talk("user:a", "assistant:\n\n\nhi", "user:b", "assistant:\n\n\n"))
@examples(2 / 3)
def test_row_trains_its_answers_and_is_asked_for_each_as_it_trains(
    name: str, kind: TokenizerKind, conversation: Conversation
) -> None:
    """Trained ids spell the answers with their terminators, also where padding is the end of text.

    The ids to ask for the last answer with are those trained on up to it, and what follows is trained. An earlier
    answer is history: the token that reaches across its beginning is not trained.
    """
    chat, tokenizer = template_of(kind, name), tokenizer_of(kind)
    rendered = chat.render(conversation)
    row = encode_row(rendered, tokenizer)
    assert len(row.ids) == len(row.trained)
    runs: list[list[int]] = [[]]
    for token, trained in zip(row.ids, row.trained, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    expected = said(name, conversation)
    spoken = [spelled(kind, run) for run in runs if run]
    assert spoken[-1] == expected[-1]
    assert len(spoken) == len(expected)
    reaching = [whole.removesuffix(some) for some, whole in zip(spoken, expected, strict=True)]
    assert all(some + rest == whole for some, rest, whole in zip(reaching, spoken, expected, strict=True))
    assert all(len(some) <= LONGEST for some in reaching)
    assert next(mark_rows([rendered], tokenizer)).marks.count(REACHING) >= sum(map(bool, reaching))
    ends = [control_ids(kind, run) for run in runs if run]
    assert ends == [[TERMINATOR.get(name, EOS)]] * len(expected)
    assert all(run[-1] < len(kind.control_tokens) for run in runs if run)
    assert row.target_count == sum(map(len, runs)) > 0
    bos = kind.bos_token if kind.adds_bos and name in ("alpaca", "chatml", "tight") else ""
    assert spelled(kind, row.ids) == bos + rendered.text
    asked = encode_row(chat.render_prompt(conversation.prompt), tokenizer)
    assert row.ids[: len(asked.ids)] == asked.ids
    assert row.trained[len(asked.ids)]
    assert asked.trained == (False,) * len(asked.ids)


@pytest.mark.parametrize("name", [*NAMES, "tight"])
@given(st.sampled_from(SERVED), conversations(contents=texts() | st.text(" \n(:a", max_size=4)))
@example(SERVED[1], talk("user:Hi", "assistant:Yes"))
@example(SERVED[4], talk("user:Hi ", "assistant: Yes \n", "user: a", "assistant: b"))
@example(FIRST, talk("user:q", "assistant:\n\nreturn 1", "user:r", "assistant:\n\n"))
@example(SERVED[1], talk("user:q", "assistant:\nHello"))
@example(SERVED[2], talk("user:q", "assistant:\nHello"))
def test_row_has_the_ids_that_a_server_sends(name: str, kind: TokenizerKind, conversation: Conversation) -> None:
    """The ids are those of the whole text, all its control tokens with their rules among it, as a server encodes it.

    Where a token of it reaches across the beginning of the last answer, which no server can send, they are the
    prompt's and then those of the rest.
    """
    chat, tokenizer = template_of(kind, name), tokenizer_of(kind)
    assume(not any(token in message.content for message in conversation.messages for token in kind.control_tokens))
    rendered, asking = chat.render(conversation), chat.render_prompt(conversation.prompt)
    bare = Tokenizer.from_file(str(tokenizer_folder(kind) / "tokenizer.json"))
    begin = [tokenizer.bos_id] if kind.adds_bos and not rendered.text.startswith(kind.bos_token) else []
    whole, asked = (begin + bare.encode(each.text, add_special_tokens=False).ids for each in (rendered, asking))
    row = encode_row(rendered, tokenizer)
    assert list(encode_row(asking, tokenizer).ids) == asked
    assert list(row.ids[: len(asked)]) == asked
    if whole[: len(asked)] == asked:
        assert list(row.ids) == whole
    else:
        spelt = (bare.decode(ids, skip_special_tokens=False) for ids in (list(row.ids), whole))
        # A control token that takes the space before it takes it from the prompt in the whole text alone.
        found, expected = ("".join(text.split()) if kind.takes == "lstrip" else text for text in spelt)
        assert found == expected


@pytest.mark.parametrize("name", [*NAMES, "tight"])
@given(FULL, conversations())
@example(FIRST, talk("user:q", "assistant:\n\nreturn 1", "user:r", "assistant:\n\n"))
@examples(1 / 3)
def test_everything_is_learned_of_the_same_ids(name: str, kind: TokenizerKind, conversation: Conversation) -> None:
    """What is learned changes no id: of everything all tokens are, but a BOS that the tokenizer puts in front.

    As the first token, it is never a target.
    """
    chat, tokenizer = template_of(kind, name), tokenizer_of(kind)
    source = TIGHT if name == "tight" else CATALOG[name]
    ends = {"bos": tokenizer.bos, "eos": tokenizer.eos}
    all_of_it = ChatTemplate(source, tokenizer.control_tokens, **ends, train_on="everything")
    row, answers = (encode_row(each.render(conversation), tokenizer) for each in (all_of_it, chat))
    assert row.ids == answers.ids
    assert row.target_count == len(row.ids) - 1
    assert chat.terminators() == all_of_it.terminators()


@pytest.mark.parametrize("name", NAMES)
@given(st.sampled_from(SERVED), conversations(inputs=False, contents=texts().map(lambda text: text.replace("<", "("))))
@example(FIRST, talk("user:hi", "assistant:hello"))
@example(SERVED[1], talk("system:s", "user:hi", "assistant:hello", "user:a", "assistant:b"))
def test_text_that_holds_the_template_has_its_ids(name: str, kind: TokenizerKind, conversation: Conversation) -> None:
    """What the template makes of a conversation has the same ids when it comes as a text, or as prompt and completion.

    Control tokens in it are meant, none stands there twice, and of prompt and completion the completion is learned.
    In a message the same text is plain.
    """

    def words(ids: Sequence[int]) -> str:
        # A control token may take the space before it, which it does not where an answer begins at it.
        return "".join(spelled(kind, ids).split())

    chat, tokenizer = template_of(kind, name), tokenizer_of(kind)
    # A system text is all that Alpaca begins with.
    assume(name != "alpaca" or conversation.messages[0].role != "system")
    rendered, asking = chat.render(conversation), chat.render_prompt(conversation.prompt)
    row = encode_row(rendered, tokenizer)
    found = encode_row(chat.render_document(Document(rendered.text, "a")), tokenizer)
    assert words(found.ids) == words(row.ids)
    assert control_ids(kind, found.ids) == control_ids(kind, row.ids)
    assert found.target_count == len(found.ids) - 1
    answer = rendered.text[len(asking.text) :]
    turns = (Message("user", asking.text), Message("assistant", answer))
    for completion in (answer, answer.rstrip(), answer.rstrip().removesuffix(TERMINATOR[name])):
        pair = Conversation((turns[0], Message("assistant", completion)), "a", from_text=True)
        found = encode_row(chat.render(pair), tokenizer)
        assert words(found.ids) == words(row.ids)
        asked = encode_row(chat.render_prompt(pair.prompt), tokenizer).ids
        assert asked == encode_row(asking, tokenizer).ids == found.ids[: len(asked)]
        assert found.trained == (*(False,) * len(asked), *(True,) * (len(found.ids) - len(asked)))
    plain, other = (
        encode_row(chat.render(each), tokenizer) for each in (Conversation(turns, "a"), talk("user:a", "assistant:b"))
    )
    assert control_ids(kind, plain.ids) == control_ids(kind, other.ids)


BOS_CASES = [
    (name, kind) for name in NAMES for kind in KINDS if {*CATALOG[name].control_tokens} <= {*kind.control_tokens}
]


@pytest.mark.parametrize(("name", "kind"), BOS_CASES)
def test_bos_stands_once_or_not_at_all(name: str, kind: TokenizerKind) -> None:
    """One BOS in front if the tokenizer or the format puts one there, never two, in training and asking."""
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


def test_token_that_the_template_writes_is_text_in_somebodys_words(tmp_path: Path) -> None:
    """Turn markers that are not flagged special, as DeepSeek's, mark turns in markup and nothing in what is said.

    An added token that the template does not write is the token that it is to every server.
    """
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder(FIRST), folder)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<q>", "<a>", "<hole>")])
    file.save(str(folder / "tokenizer.json"))
    source = "{% for m in messages %}{{ '<q>' if m.role == 'user' else '<a>' }}{{ m.content }}"
    source += "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    (folder / "chat_template.jinja").write_text(source)
    encoder = Encoder(ModelLocation("model", folder, "local"), "tokenizer")
    row = encode_row(encoder.template.render(talk("user:b<a>c<hole>", "assistant:<q>")), encoder.tokenizer)
    ask, answer, hole = (file.token_to_id(token) for token in ("<q>", "<a>", "<hole>"))
    assert [(row.ids.index(token), row.ids.count(token)) for token in (ask, answer)] == [
        (0, 1),
        (row.ids.index(hole) + 1, 1),
    ]
    assert row.ids.count(hole) == 1
    assert encoder.tokenizer.decode(row.ids[1:-1]) == "b<a>c<hole><a><q>"


def test_control_token_that_is_none_beside_a_letter_is_refused(tmp_path: Path) -> None:
    """A token with the rule single_word is no token beside a letter; the template that puts it there is refused."""
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder(FIRST), folder)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.add_special_tokens([AddedToken("<q>", special=True, normalized=False, single_word=True)])
    file.save(str(folder / "tokenizer.json"))
    tokenizer = FileTokenizer(folder)
    source = TemplateSource("own", "{% for m in messages %}<q>{{ m.content + eos_token }}{% endfor %}")
    chat = ChatTemplate(source, tokenizer.control_tokens, bos="", eos=EOS)
    assert file.token_to_id("<q>") in encode_row(chat.render(talk("user:.", "assistant:.")), tokenizer).ids
    with pytest.raises(TemplateError, match="single_word"):
        encode_row(chat.render(talk("user:a", "assistant:b")), tokenizer)


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_row_that_the_template_refuses_is_dropped_and_counted(refused: int) -> None:
    """One row that a template refuses costs that row, counted by the reason; more than half refuse the run."""
    encoder = Encoder(ModelLocation("model", tokenizer_folder(FIRST), "local"), "llama2")
    good, bad = talk("user:a", "assistant:b"), talk("user:a", "user:b", "assistant:c")
    rows = ShapedRows((*[bad] * refused, *[good] * 2), {}, {"empty answer": 1}, ())
    config = TrainingConfig.model_validate({"tokens": {"max_length": 99}, "model": {"path": "x"}})
    plan = Plan(config, {})
    if refused > 2:
        with pytest.raises(TemplateError, match=r"rows\.jsonl:7.*alternate"):
            encoder.encode(rows, plan)
        return
    counts = encoder.encode(rows, plan).counts
    [why] = counts.dropped.keys() - {"empty answer"}
    assert (counts.kept, counts.read, counts.dropped[why]) == (2, 3 + refused, refused)
    assert "alternate" in why
    assert "rows.jsonl" not in why


@given(FULL, st.lists(conversations(max_turns=2), max_size=5), st.sampled_from([*NAMES, "tight"]), st.booleans())
@examples(1 / 2)
def test_rows_encoded_together_are_those_encoded_alone(
    kind: TokenizerKind, found: list[Conversation], name: str, asking: bool
) -> None:
    """Handing many rows to the tokenizer at once changes no id and no mark, and keeps their order."""
    chat = template_of(kind, name)
    rendered = [chat.render_prompt(one.prompt) if asking else chat.render(one) for one in found]
    together = [row.tokenized() for row in mark_rows(rendered, tokenizer_of(kind))]
    assert together == [encode_row(row, tokenizer_of(kind)) for row in rendered]


def test_rows_beyond_one_handful_are_all_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are encoded at once, which are a hundred here, come back each in its place."""
    monkeypatch.setattr(encode, "_TOGETHER", 100)
    rendered = [template_of(FIRST, "alpaca").render(talk(f"user:{number}", "assistant:a")) for number in range(203)]
    found = list(mark_rows(rendered, tokenizer_of(FIRST)))
    assert len(found) == 203
    assert all(str(number) in spelled(FIRST, row.ids) for number, row in enumerate(found))
