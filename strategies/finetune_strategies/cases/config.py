"""Settings to take, to refuse and to change."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from hypothesis import strategies as st
from pydantic import AfterValidator, Field, model_validator

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.config import KEYS
from finetune.records import DEFAULT_KIND
from finetune_strategies.cases.rows import Word, one_of
from finetune_strategies.recipes import OUTSIDE, Recipe

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _no_setting(key: str) -> str:
    if key in KEYS:
        raise ValueError("it is a setting, and the law is about names of none")
    return key


def _stays(key: str) -> str:
    """A setting that leads to no file, no network and no other model."""
    if key not in KEYS or key in OUTSIDE:
        raise ValueError("it is no setting that the law changes")
    return key


Key = Annotated[Word, AfterValidator(_stays)]
Plain = Annotated[Word, Field(pattern=r"^[a-z0-9_]+$")]


class Named(Recipe):
    """A setting by a name that it does not have."""

    key: Annotated[Word, AfterValidator(_no_setting)]
    value: float | Word


MISSPELT = (
    ("training.learing_rate", 0.1),
    ("training.seeds", 3.0),
    ("adapter.ranks", 2.0),
    ("tokens.maxlength", 64.0),
    ("data.trian_limit", 3.0),
    ("template.names", "chatml"),
    ("training.batchsize", 2.0),
    ("warmup", 0.5),
)

CONFIG_UNKNOWN = st.sampled_from([Named(key=key, value=value) for key, value in MISSPELT])
Value = bool | int | float | Plain | None

_VALUES: Mapping[str, Sequence[Value]] = {
    "training.seed": (0, 7),
    "training.warmup_fraction": (0.0, 0.25),
    "training.weight_decay": (0.0, 0.5),
    "training.packing": (False, True),
    "training.max_steps": (None, 3),
    "training.gradient_accumulation_steps": (1, 3),
    "training.early_stopping_patience": (None,),
    "adapter.dropout": (0.0, 0.125),
    "data.valid_fraction": (0.0, 0.25),
    "data.limit": (None, 2),
    "evaluation.questions": (0, 3),
    "tokens.cache": (None,),
    "tracking.name": (None, "a"),
}


class Set(Recipe):
    """Settings, by name."""

    settings: dict[Annotated[str, Field(pattern=one_of(_VALUES))], Value]

    @model_validator(mode="after")
    def _known_values(self) -> Self:
        for key, value in self.settings.items():
            if value not in _VALUES[key]:
                raise ValueError(f"{key} is none of {_VALUES[key]}")
        return self


CONFIG_TAKEN = st.builds(
    Set, settings=st.fixed_dictionaries({}, optional={key: st.sampled_from(few) for key, few in _VALUES.items()})
)


class Change(Recipe):
    """Another value for a setting, and what else must be set so that it can matter."""

    key: Key
    value: bool | int | float | Plain | dict[Word, float] | Annotated[tuple[Word, ...], Field(strict=False)]
    given: dict[Key, bool | int | float | Plain]


def _changes(*changes: tuple[str, Any] | tuple[str, Any, dict[str, Any]]) -> list[Change]:
    return [Change(key=each[0], value=each[1], given=each[2] if len(each) > 2 else {}) for each in changes]


CONFIG_ROWS = _changes(
    ("template.name", "alpaca"),
    ("tokens.max_length", 40),
    ("data.limit", 2),
    ("tokens.truncation", "truncate_prompt", {"tokens.max_length": 40}),
)
CONFIG_BATCHES = _changes(
    ("training.batch_size", 3),
    ("training.gradient_accumulation_steps", 2, {"training.batch_size": 2}),
    ("training.packing", True),
    ("training.packing", True, {"training.gradient_accumulation_steps": 2}),
    ("data.limit", 2),
)
CONFIG_ADAPTER = _changes(
    ("adapter.rank", 3),
    ("adapter.alpha", 5.0),
    ("adapter.scaling", "rank_stabilized"),
    ("adapter.dropout", 0.5),
    ("adapter.target_modules", ("q_proj",)),
    *(
        ("adapter.kind", name)
        for name, kind in ADAPTER_KINDS.items()
        if name != DEFAULT_KIND and kind.takes("adapter.rank")
    ),
    ("adapter.rank_pattern", {"q_proj": 1}),
    ("adapter.alpha_pattern", {"q_proj": 3.0}),
    ("training.seed", 1),
)
CONFIG_TRAINING = _changes(
    ("training.learning_rate", 0.02),
    ("training.schedule", "linear", {"training.schedule": "constant"}),
    ("training.warmup_fraction", 0.5),
    ("training.loraplus_lr_ratio", 4.0),
    ("training.weight_decay", 9.0),
    ("training.max_grad_norm", 0.01),
    ("training.max_steps", 1),
    ("training.epochs", 1.0),
    ("training.save_every", 1),
    ("training.seed", 1),
)


class Targets(Recipe):
    """Layers to adapt, by their short names."""

    layers: Annotated[tuple[Word, ...], Field(min_length=1, strict=False)]


CONFIG_TARGETS = st.builds(
    Targets, layers=st.lists(st.sampled_from((*LINEAR, "other_proj")), min_size=1, max_size=3, unique=True).map(tuple)
)


class Pattern(Recipe):
    """A pattern for layers, and the rank that they are to have."""

    pattern: Word
    rank: Annotated[int, Field(ge=1)]


CONFIG_PATTERNS = st.builds(
    Pattern,
    pattern=st.sampled_from(("q_proj", "up_proj", "mlp.down_proj", "other_proj", "q_pro")),
    rank=st.sampled_from((1, 3)),
)


class Dropped(Recipe):
    """A seed, and the layers to adapt: all of them, or those that are named."""

    seed: Annotated[int, Field(ge=0)]
    layers: Annotated[tuple[Word, ...], Field(min_length=1, strict=False)] | None


CONFIG_DROPOUT = st.builds(
    Dropped, seed=st.integers(0, 9), layers=st.none() | st.sampled_from([LINEAR[:2], LINEAR[3:5], LINEAR[6:]])
)
