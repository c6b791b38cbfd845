"""What a story's model, rows and settings are, by sizes and words: all of it can be made anywhere, from no file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.backends import open_backend
from finetune.chat.catalog import CATALOG, CHATML
from finetune.config import KEYS, unflatten
from finetune.errors import ConfigError
from finetune.files import write_json, write_text
from finetune.verify.subjects import Task

_PAD, _EOS, _BOS = "<|pad|>", "</s>", "<s>"
CONTROL_TOKENS = (_EOS, _PAD, *CHATML.control_tokens)
FEWEST_WORDS = 256 + len(CONTROL_TOKENS)
"""A token for each byte and each control token."""
OUTSIDE = (
    "model.path",
    "model.revision",
    "data.train",
    "data.valid",
    "data.rehearsal",
    "data.retention",
    "tokens.cache",
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
    "training.accumulation": 16,
    "adapter.rank": 64,
    "tokens.max_length": 1_024,
    "evaluation.max_new_tokens": 64,
    "evaluation.questions": 100,
    "evaluation.retention_questions": 100,
}
_EXTRA_RUNS = ("judge.sham", "judge.memory")
Size = Annotated[int, Field(ge=1)]


class Recipe(BaseModel):
    """A frozen part of a story; unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelRecipe(Recipe):
    """A Llama of random weights with a tokenizer of one token a byte.

    Attributes:
        bos: whether there is a begin-of-text token, and who puts it in front: nobody (`known`), the tokenizer's
            post-processor (`added`), a setting of the tokenizer's (`configured`), or the post-processor and the chat
            template, both (`written`).
        turned: whether the tokens of bytes have their numbers the other way round.
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

    @property
    def begins(self) -> bool:
        """Whether every text begins with the begin-of-text token."""
        return self.bos not in ("none", "known")

    @model_validator(mode="after")
    def _every_token_has_a_row(self) -> Self:
        if self.vocabulary < FEWEST_WORDS + (self.bos != "none"):
            raise ValueError(f"{self.vocabulary} rows are too few for the tokens of a tokenizer with {_BOS}")
        return self

    @model_validator(mode="after")
    def _heads_share_evenly(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key and value heads evenly")
        return self

    def build(self, folder: Path) -> None:
        """Write the model's files into a new folder."""
        folder.mkdir(parents=True)
        _write_tokenizer(folder, self)
        config = {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 1_024,
            "initializer_range": 0.3,
            # Defaults, but not everybody's: what a trainer has to guess says nothing about how it trains.
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "pad_token_id": CONTROL_TOKENS.index(_PAD),
            "eos_token_id": CONTROL_TOKENS.index(_EOS),
        }
        open_backend("reference").create(config, folder, seed=self.seed)


def _write_tokenizer(folder: Path, recipe: ModelRecipe) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=recipe.turned)
    control = [*CONTROL_TOKENS, *([_BOS] if recipe.bos != "none" else [])]
    words = {word: number for number, word in enumerate([*CONTROL_TOKENS, *letters, *control[len(CONTROL_TOKENS) :]])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    if recipe.bos in ("added", "written"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, words[_BOS])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": _EOS, "pad_token": _PAD}
    if recipe.bos != "none":
        settings["bos_token"] = _BOS
    if recipe.bos in ("known", "configured"):
        settings["add_bos_token"] = recipe.bos == "configured"
    write_json(folder / "tokenizer_config.json", settings)
    first = "{{- bos_token -}}\n" if recipe.bos == "written" else ""
    write_text(folder / "chat_template.jinja", first + CHATML.jinja)


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

    def build(self, folder: Path) -> Task:
        """Write the model and the rows below a new folder; what a subject is to train with them."""
        self.model.build(folder / "model")
        rows = folder / "rows.jsonl"
        write_text(rows, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        # What a run measures of the machine is no part of a story, and another one each time.
        return Task(folder / "model", rows, {**dict.fromkeys(_EXTRA_RUNS, "never"), **self.settings})


def setting_problems(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with a story's settings: each unknown, refused, too large, or leading out of the story."""
    problems = [f"setting {key}: leads out of the story; leave it out" for key in settings if key in OUTSIDE]
    if str(settings.get("template.name", "chatml")) not in (*CATALOG, "tokenizer"):
        problems.append("setting template.name: a file is no part of a story; name a template")
    for key in _EXTRA_RUNS:
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
