"""Renders conversations into segments: markup, somebody's text, and what the model learns to say.

Every template, built in or shipped with a model, is a Jinja template and takes the same path. Each message is
replaced by a marker, the template is rendered, and the result is cut at the markers; so the place of every message
is known and nothing is searched for. The cut text is then compared with what the template makes of the real messages.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import cached_property
from itertools import chain
from typing import Any

from finetune.chat import beside
from finetune.chat.catalog import RESERVED, TemplateSource, Variable, built_in_with, with_variables
from finetune.chat.layout import Layouts, Place, fill, lay_out
from finetune.chat.learned import Learned, Stretch, TrainOn, answers_of, marked
from finetune.chat.markers import MARKER, Kinds, common_ending, is_marked, kinds, marker, texts_between
from finetune.chat.sandbox import TemplateStoppedError, compile_template, variables_read
from finetune.chat.templated import TurnMarks, render_as_it_is, render_document, tokens_said
from finetune.config.schema import DAY
from finetune.errors import TemplateError
from finetune.records import Conversation, Document, Message, Rendered, Segment

_LOOKED_AT = 8
"""So many answers of a conversation are looked at one by one, however much they repeat each other."""


class ChatTemplate:
    """A compiled template for one tokenizer: `render` for training, `render_prompt` for asking; they always agree.

    Args:
        source: the template.
        control_tokens: every control token of the tokenizer, such as `<|im_end|>`.
        bos: the begin-of-text token, or "" for a model without one.
        eos: the end-of-text token.
        today: what a template prints that asks for the date.
        train_on: all answers of a conversation, the last alone, or everything, except what a message says of itself.
    """

    def __init__(
        self,
        source: TemplateSource,
        control_tokens: Sequence[str],
        *,
        bos: str,
        eos: str,
        today: date = DAY,
        train_on: TrainOn = "all",
    ) -> None:
        missing = [token for token in source.control_tokens if token not in control_tokens]
        if missing:
            raise TemplateError(
                f"template {source.name!r} needs control tokens that this tokenizer lacks: {', '.join(missing)}",
                hint="choose template alpaca, or tokenizer for the model's own",
            )
        self.name = source.name
        self._variables = {"bos_token": bos, "eos_token": eos}
        self._today = today
        self._train_on: TrainOn = train_on
        self._source, self._control_tokens = source, control_tokens
        self._jinja: Callable[..., str] = compile_template(source.name, source.jinja)
        ordered = sorted(control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, ordered)) if ordered else "(?!)")
        self._ends = bos, eos
        self._layouts = Layouts(source, self._given)
        self._skeletons: dict[tuple[Kinds, bool] | None, str] = {}
        self._spoken: dict[tuple[Kinds, tuple[int, ...]] | None, tuple[Stretch, ...]] = {}
        self._reads = variables_read(source.jinja) - (RESERVED - {"documents"})
        self._as_parts = self._wants_parts()
        self._said = tokens_said(source, self._markup, self._control, self._ends)
        self._ending = self._every_ending()

    @cached_property
    def turn_marks(self) -> tuple[TurnMarks, ...]:
        """How it begins a text and opens an answer, and how built-in ones do that this tokenizer has the tokens of."""
        has, (bos, eos) = self._control_tokens, self._ends
        built_in = (ChatTemplate(source, has, bos=bos, eos=eos) for source in built_in_with(has))
        return tuple(TurnMarks.of(each.name, each._markup, self._control, self._ends) for each in (self, *built_in))

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as training text: what is learned, such as answers with their ends, is marked trained.

        Raises:
            TemplateError: the template refuses the roles, rewrites the text, loses a message, or would ask at serve
                time with another prompt than the one trained on.
        """
        return self._fitting(conversation, asking=False)

    def render_prompt(self, conversation: Conversation) -> Rendered:
        """The conversation as a question to the model: it ends where the answer would begin.

        Earlier answers keep their own segments, so that they become the same tokens as in training.

        Raises:
            TemplateError: as `render`.
        """
        return self._fitting(conversation, asking=True)

    def _fitting(self, conversation: Conversation, *, asking: bool) -> Rendered:
        """As `_assemble`, of the conversation as it is or else as the template can take it.

        A text that is none may be none to it or empty; an answer that it takes apart, as `<think>` is by some, is
        looked at as a whole.
        """
        if held := self.held(conversation):
            return render_as_it_is(conversation, held, self._ends_of_text()[0], asking=asking, train_on=self._train_on)
        refusals = []
        for way in chain([conversation], beside.other_ways(conversation)):
            try:
                return self._assemble(way, asking=asking)
            except TemplateError as error:
                refusals.append(error)
        raise refusals[-1]

    def _assemble(self, conversation: Conversation, *, asking: bool) -> Rendered:
        messages = self.fit_messages(conversation)
        talk = conversation if messages == conversation.messages else replace(conversation, messages=messages)
        beside.require_harmless(self.name, talk, self._control, self._said, self._reads)
        pieces, texts = self._layouts.find(talk, asking=asking) or self._look_at(talk, asking=asking)
        return fill(pieces, texts, self._said, conversation.where)

    def _look_at(self, talk: Conversation, *, asking: bool) -> tuple[tuple[Segment | Place, ...], Mapping[int, str]]:
        """How a conversation is laid out, read off what the template makes of it."""
        shown, real = self._skeleton(talk, asking=asking), self._call(talk, asking=asking)
        texts = self._texts(talk, shown, real)
        answers = () if asking else self._stretches(talk, shown, real, texts)
        pieces = lay_out(talk, shown, Learned() if asking else self._choose(talk, shown, answers))
        asked = replace(talk, messages=talk.messages[: self.learned(talk)[-1]]) if answers else talk
        begin = answers[-1][0] if answers else 0
        self._layouts.keep(talk, pieces, (shown, texts), None if asking else (asked, shown[:begin]))
        return pieces, texts

    def learned(self, talk: Conversation) -> list[int]:
        """The places of the answers that are learned."""
        return answers_of(talk, self._train_on)

    def _choose(self, talk: Conversation, shown: str, answers: Sequence[Stretch]) -> Learned:
        """What of a skeleton is learned: those answers, and what a message that is none says of itself."""
        everything = self._train_on == "everything"
        stretches = [] if everything else list(answers)
        if everything:
            stretches += self._look_for_answers(talk, shown, marked(talk, answers=True, trained=False))
        for index in marked(talk, answers=False, trained=not everything):
            begin = shown.find(marker(index))
            if begin >= 0:
                end = begin + len(marker(index))
                # What ends an answer ends such a message, too, and is learned with it.
                found = self._control.search(shown, end)
                ends = found and not shown[end : found.start()].strip() and found.group() in self.terminators()
                stretches.append((begin, found.end() if found and ends else end))
        return Learned.of(answers, stretches, but=everything)

    def render_document(self, document: Document) -> Rendered:
        """Plain text as training text: all of it is trained, and the end-of-text token after it."""
        return render_document(document, self.held(document), self._ends[1])

    def held(self, example: Conversation | Document) -> TurnMarks | None:
        """Whose turns an example has that is text and holds them already, so that no template is put around it."""
        if isinstance(example, Conversation) and not example.from_text:
            return None
        text = example.text if isinstance(example, Document) else example.messages[0].content
        known = self.turn_marks if self._control.search(text) else self.turn_marks[:1]
        return next((marks for marks in known if marks.hold(text)), None)

    def _markup(self, roles: Sequence[str], *, asking: bool) -> list[str]:
        """What stands around messages of these roles; nothing where the template takes no such roles."""
        probe = Conversation(tuple(Message(role, "a") for role in roles), "template probe")
        with suppress(TemplateError):
            return MARKER.split(self._skeleton(probe, asking=asking))[::2]
        return []

    def terminators(self) -> tuple[str, ...]:
        """The control tokens that end an answer: what the model is taught to stop with, so where serving must stop."""
        ends = self._ends_of_text()
        with suppress(TemplateError):  # a call may have an end of its own, and many templates show none
            segments = self.render(beside.PROBE_CALL).segments
            said = "".join(segment.text for segment in segments if segment.role == "assistant")
            ends += self._control.findall(said)[-1:]
        return tuple(dict.fromkeys(ends))

    def _ends_of_text(self) -> list[str]:
        probe = Conversation((Message("user", "question"), Message("assistant", "answer")), "template probe")
        segments = self.render(probe).segments
        said = [index for index, segment in enumerate(segments) if segment.role == "assistant"]
        answer = max(index for index in said if not segments[index].control)
        return self._control.findall("".join(segments[index].text for index in said if index > answer))[-1:]

    def _wants_parts(self) -> bool:
        """Whether it shows a text as a part of a list alone, as templates of models that see do."""
        probe = Conversation((Message("user", marker(0)),), "template probe")
        for self._as_parts in (False, True):
            with suppress(TemplateError):
                if marker(0) in self._call(probe, asking=False):
                    return self._as_parts
        return False

    def fit_messages(self, conversation: Conversation) -> tuple[Message, ...]:
        """The messages with an alpaca input joined to its instruction, for templates that know no such role."""
        return conversation.messages if self.name == "alpaca" else beside.join_inputs(conversation.messages)

    def _texts(self, talk: Conversation, shown: str, real: str) -> dict[int, str]:
        """What the template shows of the text of each message that has one.

        Raises:
            TemplateError: it loses a message or what a message has beside its text, changes their order or their text.
        """
        pieces = MARKER.split(shown)
        expected = [index for index, message in enumerate(talk.messages) if is_marked(message)]
        order = [int(number) for number in pieces[1::2]]
        if order != expected:
            lost = sorted(set(expected) - set(order))
            roles = ", ".join(talk.messages[index].role for index in lost) or "none"
            raise TemplateError(
                f"{talk.where}: template {self.name!r} does not show each message once and in order (lost: {roles})",
                hint="choose a template that knows these roles, or leave those messages out of the data",
            )
        texts = texts_between(pieces[0::2], [talk.messages[index] for index in expected], real)
        if texts is None:
            raise TemplateError(
                f"{talk.where}: template {self.name!r} rewrites the text of the messages, so answers cannot be marked",
                hint="choose another template, or one without conditions on the text",
            )
        beside.require_shown(self.name, talk, real, self.learned(talk))
        if (sought := beside.with_marked_results(talk, marker)) != talk:  # the same words may stand in an answer
            beside.require_shown(self.name, sought, self._call(sought, asking=False), ())
        return dict(zip(expected, texts, strict=True))

    def _skeleton(self, talk: Conversation, *, asking: bool) -> str:
        """What stands around the texts, a marker in place of each.

        It depends on the roles alone, so it is kept, except where messages have more than text.
        """
        kept = None if beside.is_rich(talk) else (kinds(talk), asking)
        if kept in self._skeletons:
            return self._skeletons[kept]
        hidden = tuple(
            replace(message, content=marker(index)) if is_marked(message) else message
            for index, message in enumerate(talk.messages)
        )
        shown = self._call(replace(talk, messages=hidden), asking=asking)
        if kept:
            self._skeletons[kept] = shown
        return shown

    def _given(self, talk: Conversation) -> dict[str, Any]:
        return {**self._variables, "today": self._today, **beside.what_is_given(talk, as_parts=self._as_parts)}

    def _call(self, talk: Conversation, *, asking: bool) -> str:
        try:
            return self._jinja(add_generation_prompt=asking, **self._given(talk))
        except TemplateStoppedError as error:
            raise TemplateError(f"{talk.where}: template {self.name!r} {error}", hint=error.hint) from None

    def _terminator(self, markup: str, where: str) -> str:
        """What follows an answer up to and including its control token; the model must learn to say it."""
        if self._ending and markup.startswith(self._ending):
            return self._ending
        found = self._control.search(markup)
        if found is None or markup[: found.start()].strip():
            raise TemplateError(
                f"{where}: template {self.name!r} ends an answer with {markup[:40]!r} and no control token, "
                "so the model could never learn to stop",
                hint="end answers with {{ eos_token }}; or list the token of the next turn in generation_config.json",
            )
        return markup[: found.end()]

    def _every_ending(self) -> str:
        """What ends an answer, be it the last or not, up to its last control token; "" where they end differently."""
        turns = (Message("user", "a"), Message("assistant", "b"))
        after: list[str] = []
        before = ""
        with suppress(TemplateError):
            for times in (1, 2):
                shown = self._skeleton(Conversation(turns * times, "template probe"), asking=False)
                before = shown.partition(marker(0))[0]
                after.append(shown.partition(marker(1))[2].partition("\ue000")[0])
        # Some templates open the next turn, too: the token that opens every turn ends none.
        opening = next((word for word in self._control.findall(before) if word != self._variables["bos_token"]), None)
        return common_ending(after, self._control, last=self._ends[1], beyond=opening) if len(after) == 2 else ""

    def _stretches(self, talk: Conversation, shown: str, real: str, texts: Mapping[int, str]) -> tuple[Stretch, ...]:
        """Where in the skeleton each answer that is learned begins and ends, from its prompt's end to its terminator's.

        The last answer's prompt is rendered as it will be served. How the others were asked for is read off skeletons,
        once for all rows of the same roles.
        """
        learned = self.learned(talk)
        kept = None if beside.is_rich(talk) else (kinds(talk), tuple(learned))
        found = self._spoken.get(kept)
        if found is None:
            found = self._look_for_answers(talk, shown, learned)
            if kept:
                self._spoken[kept] = found
        if found:
            begin = found[-1][0]
            begin += sum(len(texts[at]) - len(marker(at)) for at in map(int, MARKER.findall(shown[:begin])))
            asked = replace(talk, messages=talk.messages[: learned[-1]])
            served = self._call(asked, asking=True)
            if served != real[:begin]:
                raise self._asks_otherwise(served, real[: max(begin, len(served))], talk.where)
            # That a call names a tool does not show it to who is asked.
            beside.require_shown(self.name, asked, served, ())
        # Nor does a tool that has its name show a call: each answer's own text must.
        for index, (begin, end) in zip(learned, found if beside.is_rich(talk) else (), strict=False):
            said = MARKER.sub(lambda place: texts[int(place[1])], shown[begin:end])
            beside.require_shown(self.name, Conversation((talk.messages[index],), talk.where), said, (0,))
        return found

    def _look_for_answers(self, talk: Conversation, shown: str, indexes: Sequence[int]) -> tuple[Stretch, ...]:
        found: list[Stretch] = []
        opening, spoken, begin = "", 0, 0
        for index in indexes:
            message, where = talk.messages[index], talk.where
            at = shown.find(marker(index), begin) if is_marked(message) else len(shown)
            markup = shown[shown.rfind("\ue001", 0, at) + 1 : at]
            # Long conversations repeat themselves: once their openings do, no further prompt is rendered.
            if message.more or len(found) < _LOOKED_AT or markup != opening:
                served = self._served(talk, index, before := shown[:at])
                if not before.startswith(served):
                    raise self._asks_otherwise(served, before, where)
                opening, spoken = markup, at - len(served)
            begin = at - spoken
            found.append((begin, self._end(talk, shown, index, at if is_marked(message) else begin)))
        return tuple(found)

    def _served(self, talk: Conversation, index: int, before: str) -> str:
        """The skeleton of an answer's prompt; a greeting that the template does not ask for begins at its text."""
        asked = any(message.role in ("user", "input", "tool") for message in talk.messages[:index])
        greets = not asked and index + 1 < len(talk.messages) and is_marked(talk.messages[index])
        try:
            served = self._skeleton(replace(talk, messages=talk.messages[:index]), asking=True)
        except TemplateError:
            if greets:
                return before
            raise
        return before if greets and not before.startswith(served) else served

    def _end(self, talk: Conversation, shown: str, index: int, at: int) -> int:
        """Where an answer ends whose text stands at a place: behind what the model must learn to stop with."""
        if not talk.messages[index].more:
            at += len(marker(index))
            after = shown.find("\ue000", at)
            return at + len(self._terminator(shown[at : after if after >= 0 else None], talk.where))
        # What stands behind the text, such as calls, is said, too: up to where the conversation would end here.
        whole = self._skeleton(replace(talk, messages=talk.messages[: index + 1]), asking=False).rstrip()
        if shown.startswith(whole) and any(whole.endswith(token) for token in self._control_tokens):
            return len(whole)
        # Some templates show it otherwise once it is history; it ends where every answer does.
        ends = [found + len(end) for end in self._ends_of_text() if (found := shown.find(end, at)) >= 0]
        if not ends:
            self._terminator(shown[at:], talk.where)
        return min(ends)

    def _asks_otherwise(self, served: str, trained_on: str, where: str) -> TemplateError:
        """The refusal of a template whose prompt is not how its training text begins."""
        return TemplateError(
            f"{where}: template {self.name!r} is not prefix-preserving: at serve time the prompt would end with "
            f"{MARKER.sub('...', served)[-40:]!r}, but in training the answer follows "
            f"{MARKER.sub('...', trained_on)[-40:]!r}",
            hint=self._remedy() or "choose another template: this one asks differently from how it trains",
        )

    def _remedy(self) -> str:
        """Which setting would make the template ask as it trains; "" for none."""
        probe = Conversation(tuple(Message(role, "a") for role in ("user", "assistant") * 2), "template probe")
        names = sorted(variables_read(self._source.jinja) - RESERVED)
        tries: list[tuple[str, dict[str, Variable], TrainOn]] = [
            (f"template.variables to {{{name}: {str(value).lower()}}}", {name: value}, self._train_on)
            for name in names
            for value in (False, True)
        ]
        for said, variables, train_on in [*tries, ("template.train_on to last", {}, "last")]:
            with suppress(TemplateError):
                changed = with_variables(self._source, variables)
                bos, eos = self._ends
                _Trial(changed, self._control_tokens, bos=bos, eos=eos, train_on=train_on).render(probe)
                return f"set {said}: then it asks as it trains"
        return ""


class _Trial(ChatTemplate):
    """A template that is tried as a remedy, and looks for none itself."""

    def _remedy(self) -> str:
        return ""
