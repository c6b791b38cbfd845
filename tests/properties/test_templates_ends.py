"""Laws of templates whose answers end with the token of the next turn, as GLM-4's: that token is learned, and stops."""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from finetune.chat.encode import encode_row
from finetune.chat.encoder import Encoder
from finetune.errors import TemplateError
from finetune.export.by_name import end_ids
from finetune.records import Conversation, Message, ModelLocation
from finetune_strategies.conversations import conversations
from finetune_strategies.scratch import lasting_folder
from finetune_strategies.tokenizers import EOS, KINDS, tokenizer_folder

TURNS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|observation|>"}


@dataclass(frozen=True)
class Turns:
    """A template that opens each turn with its role's token and ends none.

    Args:
        head: what stands before all turns.
        space: what follows each token, and `before` what stands in front of it.
        trims: whether answers are stripped.
    """

    head: str
    space: str
    before: str
    trims: bool

    @property
    def jinja(self) -> str:
        """The template."""
        text = "m.content | trim" if self.trims else "m.content"
        before, space = json.dumps(self.before), json.dumps(self.space)
        pieces = [
            f"{{{{ {json.dumps(self.head)} }}}}{{% set names = {json.dumps(TURNS)} %}}{{% for m in messages %}}",
            f"{{{{ ({before} if not loop.first else '') + names[m.role] + {space} }}}}",
            "{% if m.tool_calls %}{{ '[CALL]' + m.tool_calls[0].function | tojson }}{% else %}",
            f"{{{{ {text} }}}}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}",
            f"{{{{ {before} + names.assistant + {space} }}}}{{% endif %}}\n",
        ]
        return "".join(pieces)

    def written_out(self, talk: Conversation, end: str) -> str:
        """What it makes of a conversation, the last answer ended."""
        shown = [m.content.strip() if self.trims else m.content for m in talk.messages]
        turns = [TURNS[m.role] + self.space + text for m, text in zip(talk.messages, shown, strict=True)]
        return self.head + self.before.join(turns) + self.before + end


TEMPLATES = st.builds(
    Turns,
    head=st.sampled_from(["", "[gMASK]", "</s>"]),
    space=st.sampled_from(["", "\n"]),
    before=st.sampled_from(["", "\n"]),
    trims=st.booleans(),
)


@cache
def model(*, listed: bool = True) -> ModelLocation:
    """A tokenizer with these tokens; its settings list the turns of those who ask as ends, or do not."""
    folder = lasting_folder("turns")
    shutil.copytree(tokenizer_folder(KINDS[0]), folder, dirs_exist_ok=True)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.add_special_tokens([AddedToken(each, special=True) for each in ("[gMASK]", "[CALL]", *TURNS.values())])
    file.save(str(folder / "tokenizer.json"))
    asking = [file.token_to_id(TURNS[role]) for role in ("user", "tool")] if listed else []
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [file.token_to_id(EOS), *asking]}), encoding="utf-8"
    )
    return ModelLocation("turns", folder, "local")


def encoder_of(template: Turns, place: Path, *, listed: bool = True) -> Encoder:
    """The template, with that tokenizer."""
    path = place / "turns.jinja"
    path.write_text(template.jinja, encoding="utf-8")
    return Encoder(model(listed=listed), str(path))


@given(template=TEMPLATES, talk=conversations(inputs=False))
def test_an_answer_ends_with_the_token_of_the_next_turn(template: Turns, talk: Conversation) -> None:
    """Every answer is learned with the token that ends it, the last one too, and the model stops there."""
    encoder = encoder_of(template, lasting_folder("templates"))
    tokenizer, user = encoder.tokenizer, TURNS["user"]
    rendered = encoder.template.render(talk)
    assert rendered.text == template.written_out(talk, user)
    row = encode_row(rendered, tokenizer)
    number = tokenizer.control_id(user)
    assert encoder.stop_ids[0] == number
    learned = [token for token, trained in zip(row.ids, row.trained, strict=True) if trained]
    answers = sum(message.role == "assistant" for message in talk.messages)
    assert learned.count(number) == answers
    assert learned[-1] == number
    # Of the turns' tokens none else is learned, and nothing after an end but an answer.
    assert not {tokenizer.control_id(token) for token in TURNS.values()} & {*learned} - {number}
    for (token, trained), (_, following) in pairwise(zip(row.ids, row.trained, strict=True)):
        assert not (token == number and trained and following)
    asked = encoder.prompt_ids(talk.prompt)
    assert row.ids[: len(asked)] == asked
    assert (*encoder.question(talk).answer, number) == tuple(row.ids[len(asked) :])


def test_a_call_ends_with_the_token_of_its_result(tmp_path: Path) -> None:
    """After a call the next turn is the tool's: that token ends it, in the history and at the end."""
    encoder = encoder_of(Turns("[gMASK]", "\n", "", trims=True), tmp_path)
    function = {"name": "add", "arguments": {"x": 1}}
    more = json.dumps({"content": None, "tool_calls": [{"id": "000000000", "type": "function", "function": function}]})
    turns = (Message("user", "q"), Message("assistant", "", more), Message("tool", "3"), Message("assistant", "a"))
    for count, ends in ((2, ["<|observation|>"]), (4, ["<|observation|>", "<|user|>"])):
        row = encode_row(encoder.template.render(Conversation(turns[:count], "a:1")), encoder.tokenizer)
        learned = [token for token, trained in zip(row.ids, row.trained, strict=True) if trained]
        numbers = [encoder.tokenizer.control_id(end) for end in ends]
        assert [token for token in learned if token in encoder.stop_ids] == numbers
        assert learned[-1] == numbers[-1]


def test_a_turns_token_that_ends_no_answer_is_no_end(tmp_path: Path) -> None:
    """Where the model's settings do not list it, no server stops there: the template is refused, with the remedy."""
    with pytest.raises(TemplateError, match="no control token") as refused:
        encoder_of(Turns("", "\n", "", trims=False), tmp_path, listed=False)
    assert "generation_config.json" in refused.value.hint
    assert not end_ids(list(TURNS.values()))
