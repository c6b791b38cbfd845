"""Our ids of real templates on real tokenizers, held to those of transformers and of llama.cpp.

`python -m support.real_chats` prints the table; words after it choose pairs that hold one of them.
"""

import contextlib
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2

from finetune.backends import open_backend
from finetune.chat.encode import encode_row
from finetune.chat.encoder import Encoder
from finetune.chat.tokenizer import FileTokenizer
from finetune.errors import FineTuneError
from finetune.export.by_name import CONTROL_BY_NAME
from finetune.export.corpus import nasty_texts
from finetune.export.gguf import plan_whole
from finetune.export.gguf_source import exportable_model
from finetune.export.llama_cpp import Questions, ask_llama_cpp
from finetune.export.vocabulary import GgufVocabulary, describe_vocabulary
from finetune.export.write import write_gguf
from finetune.records import Conversation, Message, ModelLocation
from finetune_strategies.scratch import empty_folder
from support.conversations import talk
from support.gguf_models import make_model
from support.real_templates import FOLDER
from support.real_tokenizers import HOME, TOKENIZERS, tokenizer_folder

Ids = tuple[int, ...]
BELONGS: dict[str, tuple[str, ...]] = {
    "llama2": ("llama2", "alpaca", "llama-2", "mistral-v0.1", "zephyr"),
    "phi3": ("phi-3", "trl/phi3*", "llama.cpp/microsoft-Phi-3*"),
    "llama3_1": (
        *("tokenizer", "llama3", "alpaca", "llama-3", "llama-3.1", "llama-3.2", "trl/llama3*"),
        *("llama.cpp/meta-llama-*", "llama.cpp/fireworks-*", "llama.cpp/meetkai-*"),
    ),
    "qwen3": (
        *("tokenizer", "chatml", "alpaca", "qwen-2", "qwen-2.5", "qwen-3", "trl/qwen*"),
        *("llama.cpp/Qwen*", "llama.cpp/MiMo-VL*"),
    ),
    "gemma3": (
        *("tokenizer", "alpaca", "gemma-2", "gemma-3", "trl/gemma", "trl/gemma_*", "trl/gemma3*"),
        "llama.cpp/google-gemma-2*",
    ),
    "deepseek_v3": (
        *("tokenizer", "alpaca", "deepseek-v3", "trl/deepseekv3*"),
        *("llama.cpp/deepseek-ai-DeepSeek-V*", "llama.cpp/llama-cpp-deepseek*"),
    ),
    "gptoss": ("trl/gptoss*", "llama.cpp/openai-gpt-oss*", "alpaca"),
    "smollm2": ("tokenizer", "chatml", "alpaca"),
}
"""Which templates belong to a tokenizer: its own, those built in, those of its family, and those that were got."""

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "Where."}},
            "required": ["place"],
        },
    },
}
TOOLS = json.dumps([_WEATHER])


def saying(text: str, **more: object) -> Message:
    """An answer that has more than text."""
    return Message("assistant", text, json.dumps(more, ensure_ascii=False))


def calling(place: str, **more: object) -> Message:
    """An answer that is a call."""
    function = {"name": "weather", "arguments": {"place": place}}
    return saying("", tool_calls=[{"id": "000000001", "type": "function", "function": function}], **more)


_RESULT = Message("tool", '{"sky": "grey"}', '{"name": "weather", "tool_call_id": "000000001"}')
_ASKED = Message("user", "What is it like in Zürich?")
RICH = {
    "thought beside": Conversation((_ASKED, saying("Grey.", reasoning_content="It is winter.")), "row"),
    "thought beside, earlier": Conversation(
        (
            _ASKED,
            saying("Grey.", reasoning_content="It is winter."),
            Message("user", "Why?"),
            Message("assistant", "Fog."),
        ),
        "row",
    ),
    "thinking beside": Conversation((_ASKED, saying("Grey.", thinking="It is winter.")), "row"),
    "tools, unused": Conversation((_ASKED, Message("assistant", "Grey.")), "row", TOOLS),
    "call": Conversation((_ASKED, calling("Zürich")), "row", TOOLS),
    "call without a text": Conversation((_ASKED, calling("Zürich", content=None)), "row", TOOLS),
    "call, result, answer": Conversation(
        (Message("system", "Be brief."), _ASKED, calling("Zürich"), _RESULT, Message("assistant", "Grey.")),
        "row",
        TOOLS,
    ),
    "call with a text": Conversation((_ASKED, replace(calling("Zürich"), content="Let me see.")), "row", TOOLS),
    "greeting": talk("assistant:Hello!", "user:Who are you?", "assistant:A model."),
    "variable": Conversation((_ASKED, Message("assistant", "Grey.")), "row", "", '{"enable_thinking": false}'),
    "documents": Conversation(
        (_ASKED, Message("assistant", "Grey.")), "row", "", '{"documents": [{"title": "Fog", "text": "It is grey."}]}'
    ),
}
CONVERSATIONS = {
    **RICH,
    "plain": talk("user:Hi", "assistant:Yes"),
    "system": talk("system:Be brief.", "user:What is 2 + 2?", "assistant:4"),
    "turns": talk("user:Hi", "assistant:Hello!", "user:Who are you?", "assistant:A model."),
    "system, turns": talk("system:Be kind.", "user:a", "assistant:b", "user:c", "assistant:d", "user:e", "assistant:f"),
    "indent last": talk("user:Write code", "assistant:    return 1"),
    "indent first": talk("user:Write code", "assistant:    return 1", "user:more", "assistant:    return 2"),
    "newline first": talk("user:q", "assistant:\nYes"),
    "newlines first, earlier": talk("user:q", "assistant:\n\n  Yes", "user:r", "assistant:No"),
    "newline last": talk("user:q", "assistant:Yes\n"),
    "newlines around": talk("user:\nq\n", "assistant:\nYes\n", "user:\n\nr\n\n", "assistant:\n\nNo\n\n"),
    "space first": talk("user: q", "assistant: Yes", "user: r", "assistant: No"),
    "space last": talk("user:q ", "assistant:Yes ", "user:r ", "assistant:No "),
    "spaces": talk("user:  q  ", "assistant:   Yes   "),
    "tabs": talk("user:\tq\t", "assistant:\t\tif x:\n\t\t\treturn"),
    "system with edges": talk("system:\n  Be brief. \n", "user:q", "assistant:a"),
    "code": talk("user:```python\ndef f(x):\n    return x\n```", "assistant:```\n\tfor i in a:\n\n        pass\n```\n"),
    "crlf": talk("user:a\r\nb\r\n", "assistant:\r\nc\r\n"),
    "composed": talk("user:caf\u00e9 \u00c5", "assistant:na\u00efve"),
    "decomposed": talk(
        "user:cafe\u0301 A\u030a", "assistant:nai\u0308ve \u1100\u1161", "user:e\u0301", "assistant:e\u0301"
    ),
    "emoji": talk("user:👨\u200d👩\u200d👧 👍🏽", "assistant:🦙🦙 ☺\ufe0f"),
    "han": talk("user:資料庫管理。日本語", "assistant:한국어 조선말、と。"),
    "scripts": talk("user:שלום Москва हिन्दी", "assistant:ไทยภาษา مرحبا"),
    "digits": talk("user:1 12 123 1234 3.14159", "assistant:12345678901234567890"),
    "digits at edges": talk("user:1", "assistant:2", "user:34", "assistant:5678"),
    "marks": talk("user:▁▁x Ġy Ċ", "assistant:!!!...--- “q” €50"),
    "odd spaces": talk("user:a\u00a0b\u3000c\u2028d\u200be", "assistant:\u3000x\u00a0"),
    "json": talk("user:Give JSON", 'assistant:{"a": [1, null], "b": "\\n"}'),
    "markup": talk("user:<b>[INST] x [/INST]</b>", "assistant:<<SYS>> y <</SYS>>\n### Response:"),
    "empty system": talk("system:", "user:q", "assistant:a"),
    "empty question": talk("user:", "assistant:a"),
    "middle of a file, asked": talk("user:What is <|fim_prefix|>a<|fim_suffix|>?", "assistant:A mark."),
    "middle of a file, said": talk("user:Show it", "assistant:<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"),
    "end of text, asked": talk("user:What is </s> for?", "assistant:It ends."),
    "end of text, said": talk("user:Show it", "assistant:It is </s> or <eos>."),
    "thought": talk("user:q", "assistant:<think>\nhm\n</think>\n\nYes"),
    "thought, earlier": talk("user:q", "assistant:<think>\nhm\n</think>\n\nYes", "user:r", "assistant:No"),
    "thought, asked": talk("user:What is <think>?", "assistant:A mark."),
    "call, said": talk("user:q", 'assistant:<tool_call>\n{"name": "f"}\n</tool_call>'),
}


@dataclass(frozen=True)
class Pair:
    """A tokenizer, and a template that belongs to it, as `Encoder` takes it."""

    tokenizer: str
    name: str
    template: str


@dataclass(frozen=True)
class Difference:
    """One conversation whose ids are others; `kind`: prompt, row, or the same in llama.cpp."""

    kind: str
    conversation: str
    text: str
    ours: Ids
    theirs: Ids


@dataclass
class Outcome:
    """What became of a pair: how many prompts and rows are equal, by kind, and all that are not."""

    pair: Pair
    equal: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    named: int = 0
    """In so many conversations somebody's words name a control token: it stays text with us, and with nobody else."""
    asked: list[tuple[str, str, str, Ids]] = field(default_factory=list)
    """What llama.cpp is to cut: kind, conversation, text, our ids."""


def pairs() -> list[Pair]:
    """All pairs of what is here."""
    here = [name for name in TOKENIZERS if tokenizer_folder(name).exists()]
    return [Pair(name, *found) for name in here for wanted in BELONGS[name] for found in _templates(wanted)]


def _templates(wanted: str) -> list[tuple[str, str]]:
    """The templates of a name, or of a pattern over those that were got, as `Encoder` takes them."""
    if "/" in wanted:
        found = sorted((HOME / "templates").glob(f"{wanted}.jinja"))
        return [(f"{path.parent.name}/{path.stem}", str(path)) for path in found]
    path = FOLDER / f"{wanted}.jinja"
    return [(wanted, str(path) if path.exists() else wanted)]


@cache
def our_tokenizer(name: str) -> FileTokenizer:
    """The product's tokenizer of a folder."""
    return FileTokenizer(tokenizer_folder(name))


@cache
def added_tokens(name: str) -> list[tuple[str, bool]]:
    """The tokens that stand apart from the vocabulary, and whether each is flagged special."""
    return [(token["content"], token["special"]) for token in our_tokenizer(name).description()["added_tokens"]]


@cache
def transformers_tokenizer(name: str) -> Any:
    """What transformers makes of the folder's own `tokenizer.json`.

    Not by `AutoTokenizer`: for Llama's class it puts another normalizer in place of the file's, so that space at the
    begin of a text becomes other ids than it was pretrained with, and than llama.cpp makes of it.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder(name)))


@contextlib.contextmanager
def one_day() -> Iterator[None]:
    """Has transformers tell the templates the day that ours are told."""
    from transformers.utils import chat_template_utils as library

    day = type("Day", (datetime,), {"now": classmethod(lambda cls: cls(2024, 7, 26))})
    with mock.patch.object(library, "datetime", day):
        yield


def text_of(pair: Pair, jinja: str, told: Conversation, *, asking: bool) -> str:
    """The text that transformers renders; a thought has the name under which the template shows it, if it has one."""
    given = {"tools": json.loads(told.tools or "null"), **json.loads(told.variables or "{}")}
    found = []
    for called in ("", "reasoning_content", "thinking"):
        turns = [
            {"role": each.role, "content": each.content, **json.loads(each.more or "{}")} for each in told.messages
        ]
        thoughts = [turn[name] for turn in turns for name in ("reasoning_content", "thinking") if name in turn]
        if called:
            turns = [
                {called if name in ("reasoning_content", "thinking") else name: value for name, value in turn.items()}
                for turn in turns
            ]
        said = transformers_tokenizer(pair.tokenizer).apply_chat_template(
            turns, chat_template=jinja, tokenize=False, add_generation_prompt=asking, **given
        )
        found.append(str(said))
        if all(thought in said for thought in thoughts):
            return str(said)
    return found[0]


def ids_of(pair: Pair, text: str, tokenizer: FileTokenizer) -> Ids:
    """The ids that a server computes with: those of transformers, and BOS in front where the tokenizer puts it."""
    ids = tuple(transformers_tokenizer(pair.tokenizer)(text, add_special_tokens=False).input_ids)
    lacks = tokenizer.adds_bos and ids[:1] != (tokenizer.bos_id,)
    return (tokenizer.bos_id, *ids) if lacks and tokenizer.bos_id is not None else ids


def expected_row(pair: Pair, prompt: str, whole: str, tokenizer: FileTokenizer) -> Ids:
    """The prompt's ids, which a server has when it is asked, and those of what follows.

    They are those of the whole text, except where a token of it reaches across the end of the prompt.
    """
    before, together = ids_of(pair, prompt, tokenizer), ids_of(pair, whole, tokenizer)
    if together[: len(before)] == before or not whole.startswith(prompt):
        return together
    # What follows stands behind a newline, so that it is not taken for the begin of a text: that gets a space.
    encode = transformers_tokenizer(pair.tokenizer)
    newline, rest = (encode(text, add_special_tokens=False).input_ids for text in ("\n", "\n" + whole[len(prompt) :]))
    if rest[: len(newline)] != newline:
        newline, rest = [], encode(whole[len(prompt) :], add_special_tokens=False).input_ids
    return (*before, *rest[len(newline) :])


def names_control(pair: Pair, conversation: Conversation, jinja: str) -> bool:
    """Whether somebody's words name a control token, or a question names an added token that the template writes."""
    for text, special in added_tokens(pair.tokenizer):
        roles = {message.role for message in conversation.messages if text in message.content}
        if special and roles:
            return True
        if roles - {"assistant"}:
            without = tuple(Message(message.role, "x") for message in conversation.messages)
            if text in text_of(pair, jinja, Conversation(without, ""), asking=False):
                return True
    return False


def compare(pair: Pair, conversations: Mapping[str, Conversation] = CONVERSATIONS) -> Outcome:
    """Every conversation as prompt and as row, held to transformers."""
    outcome = Outcome(pair)
    folder = tokenizer_folder(pair.tokenizer)
    tokenizer = our_tokenizer(pair.tokenizer)
    try:
        encoder = Encoder(ModelLocation(pair.tokenizer, folder, "local"), pair.template, tokenizer)
    except FineTuneError as error:
        outcome.refused = dict.fromkeys(conversations, _reason(pair, error))
        return outcome
    jinja = encoder.source.jinja
    for name, conversation in conversations.items():
        try:
            ours = {
                "prompt": encoder.prompt_ids(conversation.prompt),
                "row": encode_row(encoder.template.render(conversation), tokenizer).ids,
            }
        except FineTuneError as error:
            outcome.refused[name] = _reason(pair, error)
            continue
        with one_day():
            try:
                prompt = text_of(pair, jinja, conversation.prompt, asking=True)
                whole = text_of(pair, jinja, conversation, asking=False)
            except jinja2.TemplateError as error:
                outcome.refused[name] = f"transformers refuses: {error}"
                continue
            if names_control(pair, conversation, jinja):
                outcome.named += 1
                continue
        texts = {"prompt": prompt, "row": whole}
        theirs = {"prompt": ids_of(pair, prompt, tokenizer), "row": expected_row(pair, prompt, whole, tokenizer)}
        for kind, own in ours.items():
            if tuple(own) == theirs[kind]:
                outcome.equal[kind] += 1
            else:
                outcome.differences.append(Difference(kind, name, texts[kind], tuple(own), theirs[kind]))
            if kind == "prompt" or theirs[kind] == ids_of(pair, whole, tokenizer):
                outcome.asked.append((kind, name, texts[kind], tuple(own)))
    return outcome


def _reason(pair: Pair, error: FineTuneError) -> str:
    """Why something was refused, without where and by which template."""
    return error.message.replace(f"template {pair.template!r} ", "").split(": ", 1)[-1].split(": at serve time")[0]


def small_llama(tokenizer: str, folder: Path, **changes: Any) -> Path:
    """A random Llama with this tokenizer."""
    from shutil import copy

    own = our_tokenizer(tokenizer)
    rows = 1 + max(len(own) - 1, *(token["id"] for token in own.description()["added_tokens"]))
    ids = {"bos_token_id": own.bos_id, "eos_token_id": own.eos_id, "pad_token_id": own.pad_id}
    ids |= {"vocab_size": rows, "tie_word_embeddings": True, "max_position_embeddings": 512}
    make_model("llama", folder, **(ids | changes))
    for path in tokenizer_folder(tokenizer).iterdir():
        copy(path, folder)
    return folder


def compare_llama_cpp(tokenizer: str, outcomes: Sequence[Outcome]) -> str:
    """The same texts cut by llama.cpp, from the file that we export; returns why there is none, or "".

    The texts on which the proof of an export tries a vocabulary are cut, too: what differs goes to the first outcome.
    """
    own = our_tokenizer(tokenizer)
    asked = [(outcome, one) for outcome in outcomes for one in outcome.asked]
    with empty_folder() as folder:
        try:
            made = exportable_model(str(small_llama(tokenizer, folder / "model")), partial(open_backend, "torch"))
            write_gguf(plan_whole(made, "f16"), folder / "model.gguf")
            written = describe_vocabulary(own.description(), made.special, made.rows)
        except FineTuneError as error:
            return error.message
        asked = [(outcome, one) for outcome, one in asked if _is_of_form(one[2], written)]
        added = sorted((text for text, _ in added_tokens(tokenizer)), key=lambda text: text not in CONTROL_BY_NAME)
        nasty = [text for text in nasty_texts(added, written.form) if _is_of_form(text, written)]
        bos = (own.bos_id,) if own.adds_bos and own.bos_id is not None else ()
        proof = [("proof", text, text, (*bos, *own.encode_markup(_served(text, own)))) for text in nasty]
        asked += [(outcomes[0], one) for one in proof]
        texts = list(dict.fromkeys(one[2] for _, one in asked))
        cut = ask_llama_cpp(folder / "model.gguf", Questions([_served(text, own) for text in texts], [], [], 1, 64, 0))
    told = {text: (*bos, *ids) for text, ids in zip(texts, cut.markup, strict=True)}
    for outcome, (kind, name, text, ours) in asked:
        kind = f"{kind} in llama.cpp"
        if ours == told[text]:
            outcome.equal[kind] += 1
        else:
            outcome.differences.append(Difference(kind, name, text, ours, told[text]))
    return ""


def _is_of_form(text: str, written: GgufVocabulary) -> bool:
    """Whether a text is of those that llama.cpp is sure to cut alike."""
    if written.needs_strip and any(letter.isspace() and not letter.isascii() for letter in text):
        return False  # it takes only ASCII's white space away behind a control token
    if written.form == "ASCII":
        return text.isascii()
    return not written.form or unicodedata.is_normalized(written.form, text)  # type: ignore[arg-type]


def _served(text: str, tokenizer: FileTokenizer) -> str:
    """The text as llama.cpp's server cuts it: without the template's BOS where it puts one in front by itself."""
    return text.removeprefix(tokenizer.bos) if tokenizer.adds_bos and tokenizer.bos else text


SHOWN = 2
KINDS = ("prompt", "row", "prompt in llama.cpp", "row in llama.cpp", "proof in llama.cpp")


def line(outcome: Outcome) -> str:
    """A row of the table."""
    wrong = Counter(each.kind for each in outcome.differences)
    shown = [f"{outcome.equal[kind]} / {wrong[kind]}" if outcome.equal[kind] + wrong[kind] else "" for kind in KINDS]
    reasons = Counter(outcome.refused.values())
    words = "; ".join(f"{count}: {reason[:110]}" for reason, count in reasons.most_common())
    cells = [f"{outcome.pair.tokenizer} x {outcome.pair.name}", *shown, outcome.named, len(outcome.refused), words]
    return f"| {' | '.join(str(cell).replace('|', '¦') for cell in cells)} |"


def main(words: Sequence[str]) -> None:
    """Print the table, equal / different, and after it the smallest difference of each tokenizer, kind and text."""
    chosen = [pair for pair in pairs() if not words or any(word in f"{pair.tokenizer} x {pair.name}" for word in words)]
    print(f"{len(chosen)} pairs, {len(CONVERSATIONS)} conversations; equal / different\n")
    print(f"| pair | {' | '.join(KINDS)} | name a control token | refused | why |\n|{'---|' * (len(KINDS) + 4)}")
    outcomes: list[Outcome] = []
    without: dict[str, str] = {}
    for tokenizer in dict.fromkeys(pair.tokenizer for pair in chosen):
        some = [compare(pair) for pair in chosen if pair.tokenizer == tokenizer]
        without[tokenizer] = compare_llama_cpp(tokenizer, some)
        outcomes += some
        print("\n".join(map(line, some)), flush=True)
    print("\nNot written as GGUF:", *(f"- {name}: {why}" for name, why in without.items() if why), sep="\n")
    print("\nThe smallest differences of each tokenizer and kind, one a conversation:\n")
    smallest: dict[tuple[str, ...], tuple[Pair, Difference]] = {}
    for outcome in outcomes:
        for each in outcome.differences:
            key = outcome.pair.tokenizer, each.kind, each.conversation
            if key not in smallest or len(each.text) < len(smallest[key][1].text):
                smallest[key] = outcome.pair, each
    counts: Counter[tuple[str, ...]] = Counter()
    for key, found in sorted(smallest.items(), key=lambda item: len(item[1][1].text)):
        counts[key[:2]] += 1
        if counts[key[:2]] <= SHOWN:
            print(describe(*found))


def describe(pair: Pair, found: Difference) -> str:
    """A difference with the tokens around the place where it begins."""
    tokenizer = our_tokenizer(pair.tokenizer)
    both = list(zip(found.ours, found.theirs, strict=False))
    place = next((at for at, (own, their) in enumerate(both) if own != their), len(both))
    ours, theirs = (ids[max(0, place - 2) : place + 5] for ids in (found.ours, found.theirs))
    return (
        f"- {pair.tokenizer} x {pair.name}, {found.kind}, {found.conversation!r}: token {place} of "
        f"{found.text[-80:]!r}\n"
        f"  ours {list(ours)} {[tokenizer.word(one) for one in ours]}\n"
        f"  theirs {list(theirs)} {[tokenizer.word(one) for one in theirs]}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
