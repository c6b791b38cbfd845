"""Laws of rows that are shown as tokens: nothing is lost or added, and whatever stands in them is safe to print."""

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from finetune.chat.catalog import CATALOG
from finetune.chat.encode import encode_row
from finetune.chat.learned import TrainOn
from finetune.chat.preview import CLOSE, OPEN, laid_out, shown_tokens, visible
from finetune.chat.render import ChatTemplate
from finetune.cli import check
from finetune.cli.app import run
from finetune.records import Conversation, TokenizedRow
from finetune_strategies.conversations import conversations, texts
from finetune_strategies.profiles import examples
from finetune_strategies.tokenizers import SERVED, TokenizerKind
from support.conversations import FIRST, NAMES, spelled, talk, tokenizer_of

HOSTILE = "\x1b[2J\x1b]0;owned\x07 \u202eabc\u2066 ⟦⟧ …·↵ \\x1b \u200b\x00\x9b31m\r\n\t\ue000"
ESCAPE = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
UNSEEN = {"·": " ", "↵": "\n", "⇥": "\t"}


def read_back(shown: str) -> str:
    """The text that was made visible."""
    plain = ""
    end = 0
    for found in [*ESCAPE.finditer(shown), None]:
        between = shown[end : found.start() if found else None]
        plain += "".join(UNSEEN.get(letter, letter) for letter in between)
        plain += chr(int(found.group()[2:], 16)) if found else ""
        end = found.end() if found else end
    return plain


@given(texts() | st.text())
@example(HOSTILE)
def test_text_that_is_made_visible_is_safe_and_can_be_read_back(text: str) -> None:
    """Nothing that moves a cursor or turns text round is left, no bracket of ours is forged, and no letter is lost."""
    shown = visible(text)
    assert shown.isprintable()
    assert not {OPEN, CLOSE, "…", " "} & {*shown}
    assert read_back(shown) == text


@pytest.mark.parametrize("train_on", ["all", "last", "everything"])
@given(st.sampled_from(SERVED), st.sampled_from(NAMES), conversations())
@example(FIRST, "chatml", talk(f"user:{HOSTILE}", f"assistant:{HOSTILE}"))
@example(FIRST, "alpaca", talk("user:🦙é", "assistant:👩‍🔬資"))
@examples(1 / 3)
def test_row_is_shown_token_by_token(
    train_on: TrainOn, kind: TokenizerKind, name: str, conversation: Conversation
) -> None:
    """All its tokens are shown, in order, those that are learned in brackets; together they are its text.

    White space in front of a text is none where the tokenizer takes it for a beginning.
    """
    tokenizer = tokenizer_of(kind)
    chat = ChatTemplate(
        CATALOG[name], tokenizer.control_tokens, bos=tokenizer.bos, eos=tokenizer.eos, train_on=train_on
    )
    row = encode_row(chat.render(conversation), tokenizer)
    tokens = shown_tokens(row, tokenizer, most=len(row.ids))
    assert sum(each.tokens for each in tokens) == len(row.ids)
    assert sum(each.learned for each in tokens) == row.target_count
    together = read_back("".join(each.text for each in tokens))
    assert together.replace(" ", "") == spelled(kind, row.ids).replace(" ", "")
    printed = "".join(said for said, _ in laid_out(tokens, brackets=True))
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    inside = "".join(re.findall(f"{OPEN}(.*?){CLOSE}", printed, re.DOTALL))
    assert "".join(inside.split()) == "".join(each.text for each in tokens if each.learned)
    assert "".join(said for said, _ in laid_out(tokens, brackets=False)).split() == [each.text for each in tokens]


@given(st.integers(0, 60), st.integers(2, 20), st.lists(st.booleans(), min_size=60, max_size=60))
def test_long_row_is_cut_in_the_middle_and_counted(length: int, most: int, marks: list[bool]) -> None:
    """Of a row that is too long the first and the last tokens are shown, and how many are not, learned or not."""
    tokenizer = tokenizer_of(FIRST)
    ids = tuple(tokenizer.encode_content("a b c d e f g " * 20)[:length])
    row = TokenizedRow(ids, tuple(marks[: len(ids)]), "a")
    whole, cut = (shown_tokens(row, tokenizer, most=count) for count in (100, most))
    if len(whole) <= most:
        assert cut == whole
        return
    gone = cut[most // 2]
    assert [*whole[: most // 2], gone, *whole[len(whole) - (most - most // 2) :]] == cut
    assert gone.left_out
    assert f"…{len(ids) - most:,}·more" in gone.text
    assert sum(each.learned for each in cut) == row.target_count
    assert sum(each.tokens for each in cut) == len(ids)


def test_bytes_that_are_no_letter_are_shown_each() -> None:
    """Bytes of a letter that never becomes whole are shown as the vocabulary has them, and do not pile up."""
    tokenizer = tokenizer_of(FIRST)
    half, *rest = tokenizer.encode_content("𝄞")
    assert rest
    ids = (*[half] * 30, *tokenizer.encode_content("a"))
    tokens = shown_tokens(TokenizedRow(ids, (True,) * 31, "a"), tokenizer)
    assert sum(each.tokens for each in tokens) == len(ids) == 31
    assert all(each.tokens <= 9 for each in tokens)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    turns = [{"prompt": HOSTILE.replace("\x00", ""), "completion": f"no {count}"} for count in range(4)]
    file.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return file


def test_check_shows_rows_as_tokens(
    rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ft check` shows the first row, or as many as are wanted: in brackets, on a terminal coloured, in JSON."""
    monkeypatch.setenv("FT_BACKEND", "reference")
    for wanted, count in (([], 1), (["--show", "0"], 0), (["--show", "3"], 3)):
        assert run(["check", "--data", str(rows), *wanted]) == 0
        out = capsys.readouterr().out
        assert out.count("of them learned (in ⟦ ⟧)") == out.count(OPEN) - count == count
        assert all(letter.isprintable() or letter == "\n" for letter in out)
        assert run(["check", "--data", str(rows), "--json", *wanted]) == 0
        [told] = json.loads(capsys.readouterr().out)["runs"]
        assert [each["row"] for each in told["shown"]] == [f"{rows}:{line}" for line in range(1, count + 1)]
        said = ["".join(each["text"].partition(OPEN)[2].split()) for each in told["shown"]]
        assert said == [f"no·{line}<|eot_id|>{CLOSE}" for line in range(count)]
    screen = io.StringIO()
    colours = Console(file=screen, force_terminal=True, color_system="standard", no_color=False)
    monkeypatch.setattr(check, "data_console", lambda: colours)
    assert run(["check", "--data", str(rows)]) == 0
    assert OPEN not in screen.getvalue()
    assert "learned (in green)" in screen.getvalue()
    assert "\x1b[1;32mn" in screen.getvalue()
    assert "\x1b]" not in screen.getvalue()
