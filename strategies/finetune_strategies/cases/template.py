"""Conversations, plain texts and beginnings, each with its template."""

from hypothesis import strategies as st

from finetune_strategies.cases.dialogues import WORDS, dialogues
from finetune_strategies.cases.rows import PAIRS, TEXTS, TINY, Pair, Rows, Template, rows_of
from finetune_strategies.recipes import FEWEST_WORDS, ModelRecipe, Recipe

_TEMPLATES = ("chatml", "alpaca", "tokenizer")
TEMPLATE_BYTES = dialogues(WORDS, templates=_TEMPLATES)
TEMPLATE_PROMPT = dialogues(TEXTS, templates=_TEMPLATES)
TEMPLATE_WORDS = dialogues(WORDS, templates=_TEMPLATES)
TEMPLATE_TRAINED = dialogues(WORDS, templates=_TEMPLATES)


class Spoken(Recipe):
    """A question and its answer, written like markup."""

    pair: Pair


TEMPLATE_INERT = st.builds(Spoken, pair=st.builds(Pair, prompt=WORDS, completion=WORDS))


class PlainText(Recipe):
    """A text to train on."""

    text: str


TEMPLATE_ENDS = st.builds(PlainText, text=WORDS)
_ROOM = FEWEST_WORDS + 1
BEGINNINGS = tuple(ModelRecipe(bos=bos, vocabulary=_ROOM) for bos in ("known", "added", "configured", "written"))


class Begun(Recipe):
    """A model that may want a begin-of-text token, and a row to train on."""

    model: ModelRecipe
    pair: Pair
    template: Template


BEGUN = st.builds(
    Begun, model=st.sampled_from((TINY, *BEGINNINGS)), pair=PAIRS, template=st.sampled_from(("chatml", "tokenizer"))
)


class Ended(Rows):
    """Rows, and a template."""

    template: Template


TEMPLATE_STOPS = st.builds(Ended, rows=rows_of(1, 2), template=st.sampled_from(_TEMPLATES))
TEMPLATE_TRAVELS = st.builds(Ended, rows=rows_of(1, 1), template=st.sampled_from(("alpaca", "chatml")))
