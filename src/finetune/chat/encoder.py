"""Joins a template and a tokenizer: conversations in, token ids out, the same way for training and for asking."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from finetune.chat.cache import cache_key, dump_marked, load_marked
from finetune.chat.catalog import Variable, find_template, with_variables
from finetune.chat.encode import Marked, encode_row, mark_rows
from finetune.chat.fit import Encoded, fit_rows
from finetune.chat.learned import TrainOn, marked
from finetune.chat.render import ChatTemplate
from finetune.chat.templated import with_turn_ends
from finetune.chat.tokenizer import FileTokenizer
from finetune.config import Plan
from finetune.config.schema import DAY, TemplateSpec
from finetune.data.shape import Example, ShapedRows
from finetune.data.stored import in_parts
from finetune.errors import TemplateError, counted
from finetune.files import make_folder, write_bytes
from finetune.records import Conversation, ModelLocation, Question, Rendered


def sides_of(example: Example) -> tuple[Example, ...]:
    """A conversation with each of its answers, the chosen one first; any other example alone."""
    if not isinstance(example, Conversation) or example.rejected is None:
        return (example,)
    chosen = replace(example, rejected=None)
    return chosen, replace(chosen, messages=(*chosen.messages[:-1], example.rejected))


def _texts(talk: Conversation) -> Iterator[str]:
    return (message.content for message in talk.messages)


@dataclass
class _Told:
    """What is told of rows as they are rendered; see `DataCounts`."""

    reasons: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    templated: Counter[str] = field(default_factory=Counter)
    lookalikes: int = 0
    unlearned: int = 0
    refused: tuple[str, str] | None = None
    """What the template says of the first row that it refuses, and the hint."""

    def add(self, later: "_Told") -> None:
        """What is told of later rows."""
        self.reasons += later.reasons
        self.places = later.places | self.places
        self.templated += later.templated
        self.lookalikes += later.lookalikes
        self.unlearned += later.unlearned
        self.refused = self.refused or later.refused


class Encoder:
    """One model's template and tokenizer together: conversations in, ids out, the same way for training and asking."""

    def __init__(
        self,
        location: ModelLocation,
        template: str,
        tokenizer: FileTokenizer | None = None,
        *,
        today: date = DAY,
        variables: Mapping[str, Variable] | None = None,
        train_on: TrainOn = "all",
    ) -> None:
        plain = tokenizer or FileTokenizer(location.folder)
        source = with_variables(find_template(template, plain.chat_template), variables or {})
        self.tokenizer = tokenizer = plain.for_template(source.jinja)
        stops = [tokenizer.word(number) for number in tokenizer.stop_ids]
        ends = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        self.source = with_turn_ends(replace(source, said=plain.learned), tokenizer.control_tokens, stops, **ends)
        made = partial(
            ChatTemplate, self.source, tokenizer.control_tokens, bos=tokenizer.bos, eos=tokenizer.eos, today=today
        )
        self.template = made(train_on=train_on)
        self._answers_alone = made(train_on="all") if train_on == "everything" else self.template
        taught = (tokenizer.control_id(token) for token in self.template.terminators())
        self.stop_ids = tuple(dict.fromkeys([*(token for token in taught if token is not None), *tokenizer.stop_ids]))

    @classmethod
    def planned(cls, location: ModelLocation, asked: TemplateSpec, tokenizer: FileTokenizer | None = None) -> "Encoder":
        """As the settings of a run have it."""
        day = date.fromisoformat(asked.date)
        return cls(location, asked.name, tokenizer, today=day, variables=asked.variables, train_on=asked.train_on)

    def encode(self, shaped: ShapedRows, plan: Plan) -> Encoded:
        """Ids and trained marks of all examples, within the plan's length; rows that the template refuses are dropped.

        Raises:
            TemplateError: it refuses more than half of them.
        """
        told, tokens = _Told(), plan.config.tokens
        assert tokens.max_length is not None
        rows: Iterable[Marked]
        if tokens.cache is None:
            rows = self._marked(shaped.examples, told)
        else:
            rows = self._kept(self._rendered(shaped.examples, told), tokens.cache)
        encoded = fit_rows(
            rows,
            max_length=tokens.max_length,
            truncation=tokens.truncation,
            dropped=Counter(shaped.dropped),
            sides=2 if plan.config.training.objective == "dpo" else 1,
        )
        later = Counter(encoded.counts.dropped) - Counter(shaped.dropped)
        counts = replace(
            encoded.counts,
            read=encoded.counts.read + told.reasons.total(),
            dropped=dict(Counter(shaped.dropped) + told.reasons + later),
            shapes=shaped.shapes,
            dropped_at=shaped.dropped_at | told.places | encoded.counts.dropped_at,
            unlearned=told.unlearned,
            templated=dict(told.templated),
            lookalikes=told.lookalikes,
        )
        return replace(encoded, counts=counts)

    def _marked(self, examples: Sequence[Example], told: "_Told") -> Iterator[Marked]:
        """The examples as ids with marks; what is to be told of them is counted on the way."""

        def encoded(some: Sequence[Example], start: int) -> tuple[_Told, list[Marked]]:
            said = _Told()
            return said, [*mark_rows(self._rendered_some(some, said), self.tokenizer)]

        for said, rows in in_parts(examples, encoded):
            told.add(said)
            yield from rows
        self._refuse(told, len(examples))

    def _rendered(self, examples: Sequence[Example], told: "_Told") -> list[Rendered]:
        """The examples as training texts; what is to be told of them is counted."""
        rendered = self._rendered_some(examples, told)
        self._refuse(told, len(examples))
        return rendered

    def _refuse(self, told: "_Told", examples: int) -> None:
        """Refuse rows of which the template refuses more than half."""
        count = told.reasons.total()
        if told.refused and 2 * count > examples:
            what, hint = told.refused
            more = f"; refused: {count} of {examples} rows, for {counted(len(told.reasons), 'reason')}"
            raise TemplateError(what + more * (count > 1), hint=hint)

    def _rendered_some(self, some: Sequence[Example], told: "_Told") -> list[Rendered]:
        turns = self.template.turn_marks[0].tokens
        sides = [side for example in some for side in sides_of(example)]
        rendered, refused = self.render(sides)
        if refused and len(sides) > len(some):  # a pair is refused once, with both sides
            refused = [*dict(reversed(refused)).items()]
            unfit = {where for where, _ in refused}
            rendered = [each for each in rendered if each.where not in unfit]
        for where, error in refused:
            told.refused = told.refused or (error.message, error.hint)
            reason = error.message.removeprefix(f"{where}: ")
            told.reasons[reason] += 1
            told.places.setdefault(reason, where)
        for example in some:
            held = self.template.held(example)
            told.templated.update([held.name] if held else [])
            if isinstance(example, Conversation):
                told.lookalikes += not held and any(map(turns.search, _texts(example)))
                told.unlearned += len(marked(example, answers=True, trained=False))
        return rendered

    def render(
        self, examples: Sequence[Example], *, answers_alone: bool = False
    ) -> tuple[list[Rendered], list[tuple[str, TemplateError]]]:
        """The examples as training texts, and where the template refuses one and why.

        With `answers_alone`, answers are marked and nothing else of a conversation, whatever else is learned.
        """
        template = self._answers_alone if answers_alone else self.template
        rendered: list[Rendered] = []
        refused: list[tuple[str, TemplateError]] = []
        for example in examples:
            try:
                if isinstance(example, Conversation):
                    rendered.append(template.render(example))
                else:
                    rendered.append(template.render_document(example))
            except TemplateError as error:
                refused.append((example.where, error.with_traceback(None)))
        return rendered, refused

    def asked(self, examples: Sequence[Example]) -> tuple[list[Conversation], list[tuple[str, TemplateError]]]:
        """The conversations that the template can take, as they are asked, and where it refuses one and why."""
        _, refused = self.render(examples)
        unfit = {where for where, _ in refused}
        return [*self.as_asked(each for each in examples if each.where not in unfit)], refused

    def as_asked(self, examples: Iterable[Example]) -> Iterator[Conversation]:
        """The conversations among them, each up to the last answer that is learned; those where none is, left out."""
        for example in examples:
            if isinstance(example, Conversation) and (places := self.template.learned(example)):
                whole = places[-1] + 1 == len(example.messages)
                yield example if whole else replace(example, messages=example.messages[: places[-1] + 1])

    def _kept(self, rendered: Sequence[Rendered], cache: str) -> list[Marked]:
        """The rows' ids from the cache; where it lacks them or is damaged, they are encoded and kept there."""
        path = Path(cache) / f"{cache_key(rendered, self.tokenizer)}.tokens"
        found = load_marked(path.read_bytes(), rendered) if path.is_file() else None
        if found is None:
            found = list(mark_rows(rendered, self.tokenizer))
            make_folder(path.parent)
            write_bytes(path, dump_marked(found))
        return found

    def generation_settings(self) -> dict[str, Any]:
        """What `generation_config.json` must say so that any program stops where the model was taught to."""
        settings: dict[str, Any] = {"eos_token_id": list(self.stop_ids), "pad_token_id": self.tokenizer.pad_id}
        return settings if self.tokenizer.bos_id is None else settings | {"bos_token_id": self.tokenizer.bos_id}

    def prompt_ids(self, conversation: Conversation) -> tuple[int, ...]:
        """The ids of a prompt, up to where the answer begins."""
        return encode_row(self.template.render_prompt(conversation), self.tokenizer).ids

    def question(self, conversation: Conversation) -> Question:
        """The conversation's last answer as a question with one right answer: what the model is taught to say there."""
        prompt = conversation.prompt
        shown = "\n".join(message.content for message in prompt.messages if message.role in ("user", "input"))
        asked, row = self.prompt_ids(prompt), encode_row(self.template.render(conversation), self.tokenizer)
        rest = zip(row.ids[len(asked) :], row.trained[len(asked) :], strict=True)
        answer = self._before_stop(token for token, trained in rest if trained)
        return Question(asked, shown, self.said(answer), answer)

    def said(self, ids: Iterable[int]) -> str:
        """What a model said, up to where it stopped; control tokens within, as before a call, stand by name."""
        return self.tokenizer.decode(self._before_stop(ids), control=True).strip()

    def _before_stop(self, ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(takewhile(lambda token: token not in self.stop_ids, ids))
