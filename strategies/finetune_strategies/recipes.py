"""Recipes: models, rows and settings by sizes and words, so that a case can be written down and made anywhere."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.chat.catalog import CATALOG
from finetune.config import KEYS, unflatten
from finetune.errors import ConfigError

PAD, EOS, BOS = "<|pad|>", "</s>", "<s>"
CONTROL_TOKENS = (EOS, PAD, "<|im_start|>", "<|im_end|>")
FEWEST_WORDS = 256 + len(CONTROL_TOKENS)
"""A token for each byte and each control token."""
MERGES = (
    *(("Ċ", "Ċ"), ("Ċ", "Ġ"), ("Ġ", "Ġ"), ("ĊĠ", "Ġ"), ("a", "b"), ("ab", "c"), ("Ġ", "a"), ("Ã", "©")),
    *(("<", "|"), ("e", "r"), ("u", "s"), ("us", "er")),
)
"""What tokenizers that merge make one token of: line ends, spaces and indents (as GPT-2 writes them), some letters."""
OUTSIDE = (
    "model.path",
    "model.revision",
    "model.adapter",
    "data.train",
    "data.valid",
    "data.rehearsal",
    "data.retention",
    "tokens.cache",
    "tokens.add_special_tokens",
    "tokens.add_tokens",
    "tracking.to",
    "tracking.project",
    "tracking.name",
    "backend",
)
"""Settings that lead out of a story: to files, to a network, or to what its subject decides."""
_LARGEST = {
    "training.epochs": 20,
    "training.max_steps": 200,
    "training.batch_size": 64,
    "training.gradient_accumulation_steps": 16,
    "adapter.rank": 64,
    "tokens.max_length": 1_024,
    "evaluation.max_new_tokens": 64,
    "evaluation.questions": 100,
    "evaluation.retention_questions": 100,
}
EXTRA_RUNS = ("judge.control", "judge.memory")
Size = Annotated[int, Field(ge=1)]


class Recipe(BaseModel):
    """A frozen part of a case; unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelRecipe(Recipe):
    """A Llama of random weights with a tokenizer of one token a byte, unless it merges some.

    Attributes:
        bos: whether there is a begin-of-text token, and who puts it in front: nobody (`known`), the tokenizer's
            post-processor (`added`), a setting of the tokenizer's (`configured`), or the post-processor and the chat
            template, both (`written`).
        turned: whether the tokens of bytes have their numbers the other way round.
        template: ChatML, or one in the style of Qwen 3's: it shows tools, thoughts, calls and results, reads a
            variable, and refuses a system message that is not the first.
        words: bytes; some of them merged; or merged, and a space put before each text as in SentencePiece.
        takes: the side on which control tokens take white space with them.
    """

    layers: Annotated[Size, Field(le=8)] = 1
    hidden: Annotated[Size, Field(le=256)] = 12
    heads: Annotated[Size, Field(le=16)] = 2
    kv_heads: Annotated[Size, Field(le=16)] = 1
    head_size: Annotated[int, Field(ge=2, le=64, multiple_of=2)] = 4
    intermediate: Annotated[Size, Field(le=1_024)] = 9
    vocabulary: Annotated[int, Field(ge=FEWEST_WORDS, le=4_096)] = FEWEST_WORDS
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    bos: Literal["none", "known", "added", "configured", "written"] = "none"
    turned: bool = False
    template: Literal["chatml", "tools"] = "chatml"
    words: Literal["bytes", "merged", "spaced"] = "bytes"
    takes: Literal["", "left", "right"] = ""

    @property
    def begins(self) -> bool:
        """Whether every text begins with the begin-of-text token."""
        return self.bos not in ("none", "known")

    @model_validator(mode="after")
    def _every_token_has_a_row(self) -> Self:
        if self.vocabulary < FEWEST_WORDS + (self.bos != "none") + len(MERGES) * (self.words != "bytes"):
            raise ValueError(f"{self.vocabulary} rows are too few for the tokens of a tokenizer with {BOS} or merges")
        return self

    @model_validator(mode="after")
    def _heads_share_evenly(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key and value heads evenly")
        return self


Row = dict[Annotated[str, Field(max_length=40)], Annotated[str, Field(max_length=2_000)]]


class TaskRecipe(Recipe):
    """A model, rows, and the settings away from their defaults."""

    model: ModelRecipe = ModelRecipe()
    rows: Annotated[tuple[Row, ...], Field(min_length=1, max_length=200, strict=False)]
    settings: dict[str, Any]

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        problems = setting_problems(self.settings)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with a story's settings: each unknown, refused, too large, or leading out of the story."""
    problems = [f"setting {key}: leads out of the story; leave it out" for key in settings if key in OUTSIDE]
    if str(settings.get("template.name", "chatml")) not in (*CATALOG, "tokenizer"):
        problems.append("setting template.name: a file is no part of a story; name a template")
    for key in EXTRA_RUNS:
        if settings.get(key, "never") != "never":
            problems.append(f"setting {key}: a story has no extra runs; set it to never")
    for key, most in _LARGEST.items():
        value = settings.get(key)
        if isinstance(value, int | float) and value > most:
            problems.append(f"setting {key}: {value} is too large for a story; at most {most}")
    unknown = [key for key in settings if key not in KEYS]
    problems += [f"setting {key}: there is no such setting; `ft schema` has them" for key in unknown]
    try:
        unflatten({key: value for key, value in settings.items() if key in KEYS})
    except (ConfigError, ValueError) as error:
        problems.append(f"settings: {' '.join(str(error).split())}")
    return problems
