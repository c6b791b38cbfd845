"""Configurations, valid and refused, drawn from a table that says what each setting accepts."""

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from finetune.config import TrainingConfig, unflatten
from finetune_strategies.adapters import KINDS
from finetune_strategies.datasets import seeds

Tree = dict[str, Any]

_LOOKS_LIKE_SOMETHING_ELSE = (
    *("null", "~", "true", "no", "on", "1e-5", "2e-5", "0123", "1:30", "12", ".nan", "2024-01-01", "-", "- a"),
    *("a: b", "a #b", "#a", "'", '"', "'a", "[a]", "{a}", "*a", "&a", "!a", "%a", "@a", "a:", "=", "<<", " a "),
    *("none", "NONE", "data/Москва.jsonl", "资料/数据.json", "naïve café.csv", "🦙.parquet", "e\u0301", "\ufeffa"),
    *("C:\\data", "a" * 300),
)
_PRINTABLE = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])


def texts() -> st.SearchStrategy[str]:
    """Names and paths: any printable text, often text that YAML would take for something else."""
    free = st.text(_PRINTABLE, min_size=1, max_size=30).filter(lambda text: text != "None")
    return st.sampled_from(_LOOKS_LIKE_SOMETHING_ELSE) | free


@dataclass(frozen=True)
class Setting:
    """What a setting accepts and what it refuses."""

    accepted: st.SearchStrategy[Any]
    refused: st.SearchStrategy[Any]
    number: bool = False
    nullable: bool = False


_NEVER = st.sampled_from([True, False, [], {}, {"a": 1}, [1]])
_NOT_NUMBERS = _NEVER | st.sampled_from(["abc", "", "None", "nan", ".inf", float("nan"), float("inf"), -float("inf")])


def _whole(least: int, most: int = 10**6) -> Setting:
    outside = st.integers(max_value=least - 1) | st.sampled_from([3.5, "3.5"])
    return Setting(st.integers(least, most), _NOT_NUMBERS | st.none() | outside, number=True)


def _number(outside: st.SearchStrategy[float], **bounds: Any) -> Setting:
    return Setting(
        st.floats(allow_nan=False, allow_infinity=False, **bounds), _NOT_NUMBERS | st.none() | outside, number=True
    )


def _words(*words: str) -> Setting:
    wrong = st.sampled_from([words[0].upper(), words[0][:-1], "", "None", 0, 1.5])
    return Setting(st.sampled_from(words), _NEVER | st.none() | wrong)


def _optional(setting: Setting) -> Setting:
    refused = setting.refused.filter(lambda value: value is not None)
    return replace(setting, accepted=st.none() | setting.accepted, refused=refused, nullable=True)


_POSITIVE = _number(st.sampled_from([0, -0.0, -1e-300, "-1"]), min_value=0, exclude_min=True)
_SHARE = _number(st.sampled_from([1, -1e-9, 2.0, "1.0"]), min_value=0, max_value=1, exclude_max=True)
_TEXT = Setting(texts(), _NEVER | st.none() | st.sampled_from([0, 7, 1.5, "", "None", "a\nb", "a\0", "\x85"]))
_YES_OR_NO = Setting(st.booleans(), st.sampled_from([0, 1, 2, "", "maybe", [], {}, None, 1.0]))
_EXTRA_RUNS = _words("auto", "always", "never")
_TEMPLATES = _words("auto", "tokenizer", "alpaca", "chatml", "llama2", "llama3")
_NAME_LISTS = st.lists(texts(), min_size=1, max_size=4)
_SOURCES = _optional(Setting(texts() | _NAME_LISTS, _TEXT.refused | st.sampled_from([[""], ["a", 1], ["a\nb"]])))


def _new_tokens(*tokens: str) -> Setting:
    wrong: st.SearchStrategy[Any] = st.sampled_from(
        ["<a>", "", [""], [1], [True], ["a\nb"], ["x" * 129], {}, 3, True, None]
    )
    return Setting(st.lists(st.sampled_from(tokens), max_size=3, unique=True), wrong)


_NO_MAPPINGS = st.sampled_from(
    [{}, [], "q_proj", 3, True, {"": 1}, {"q_proj": "x"}, {"q_proj": None}, {1: 2}, ["q_proj"]]
)


def _mapping(value: Setting) -> Setting:
    mappings = st.dictionaries(texts(), value.accepted, min_size=1, max_size=3)
    wrong = value.refused.filter(lambda each: each != "x").map(lambda each: {"q_proj": each})
    return _optional(Setting(mappings, _NO_MAPPINGS | wrong))


SETTINGS: dict[str, Setting] = {
    "model.path": _TEXT,
    "model.revision": _optional(_TEXT),
    "model.dtype": _words("float32", "bfloat16"),
    "model.device": _words("auto", "cpu", "gpu"),
    "model.quantize": _optional(_words("4bit", "8bit", "fp4")),
    "model.quantize_group_size": Setting(
        st.sampled_from([32, 64, 128]), st.sampled_from([0, 16, 48, 96, 256, -32, "many", "", True, None, [], {}, 32.5])
    ),
    "model.adapter": _optional(_TEXT),
    "data.train": _SOURCES,
    "data.mix": _optional(
        Setting(
            st.lists(_POSITIVE.accepted, min_size=1, max_size=3), st.sampled_from([1, "1", [], [0], [-1.0], ["a"], {}])
        )
    ),
    "data.valid": _SOURCES,
    "data.valid_fraction": _optional(_SHARE),
    "data.rehearsal": _SOURCES,
    "data.retention": _SOURCES,
    "data.limit": _optional(_whole(1)),
    "data.columns": _optional(
        Setting(
            st.sampled_from(_LOOKS_LIKE_SOMETHING_ELSE).map(lambda text: {"prompt": text, "train": text[::-1]}),
            st.sampled_from([{}, [], "question", 3, True, {"question": "prompt"}, {"prompt": 1}, {"prompt": None}]),
        )
    ),
    "data.ignore_columns": _optional(
        Setting(
            st.sampled_from(_LOOKS_LIKE_SOMETHING_ELSE).map(lambda text: [text, "label"]),
            st.sampled_from(["label", "", [], [""], [1], {}, 3, True]),
        )
    ),
    "template.name": Setting(
        _TEMPLATES.accepted | texts().map(lambda text: f"{text}.jinja"), _TEMPLATES.refused | st.just(".jinja")
    ),
    "template.date": Setting(
        st.dates().map(str),
        st.sampled_from(["", "today", "2024-13-01", "20240726", "2024-W30-5", "26 Jul 2024", 2024, True, None, [], {}]),
    ),
    "template.train_on": _words("all", "last", "everything"),
    "template.variables": _optional(
        Setting(
            st.dictionaries(
                st.from_regex(r"[a-z_][a-zA-Z0-9_]{0,8}", fullmatch=True),
                st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | _TEXT.accepted,
                min_size=1,
                max_size=3,
            ),
            _NO_MAPPINGS | st.sampled_from([{"a": None}, {"a": []}, {"a": {}}, {"a b": 1}, {"": 1}, {"1a": 1}]),
        )
    ),
    "tokens.max_length": _optional(_whole(8)),
    "tokens.truncation": _words("drop", "truncate_prompt", "split", "refuse"),
    "tokens.cache": _optional(_TEXT),
    "tokens.add_special_tokens": _new_tokens("[CALL]", "<|end of it|>", "\N{LATIN SMALL LETTER E WITH ACUTE}|"),
    "tokens.add_tokens": _new_tokens("<tool>", "</tool>", "@@"),
    "adapter.kind": _words(*KINDS, "full"),
    "adapter.rank": _whole(1),
    "adapter.alpha": _POSITIVE,
    "adapter.scaling": _words("standard", "rank_stabilized"),
    "adapter.dropout": _SHARE,
    "adapter.target_modules": Setting(
        _NAME_LISTS | st.just("all-linear") | _NAME_LISTS,
        st.sampled_from(["q_proj", "", [], [""], [1], [True], {}, 3, True, None]),
    ),
    "adapter.rank_pattern": _mapping(_whole(1)),
    "adapter.alpha_pattern": _mapping(_POSITIVE),
    "adapter.modules_to_save": _optional(
        Setting(_NAME_LISTS, st.sampled_from(["norm", "", [], [""], [1], [True], {}, 3, True, "all-linear"]))
    ),
    "training.objective": _words("sft", "dpo"),
    "training.dpo_beta": _POSITIVE,
    "training.epochs": _optional(_POSITIVE),
    "training.max_steps": _optional(_whole(1)),
    "training.batch_size": _whole(1),
    "training.processes": _optional(_whole(1)),
    "training.gradient_accumulation_steps": _whole(1),
    "training.gradient_checkpointing": _YES_OR_NO,
    "training.packing": _YES_OR_NO,
    "training.learning_rate": _optional(_POSITIVE),
    "training.schedule": _words("cosine", "linear", "constant"),
    "training.warmup_fraction": _SHARE,
    "training.loraplus_lr_ratio": _POSITIVE,
    "training.weight_decay": _number(st.sampled_from([-1.0, "-1e-9"]), min_value=0),
    "training.label_smoothing": _SHARE,
    "training.max_grad_norm": _POSITIVE,
    "training.seed": Setting(seeds(), _whole(0).refused | st.integers(min_value=2**32), number=True),
    "training.save_every": _optional(_whole(1)),
    "training.evaluate_every": _optional(_whole(1)),
    "training.early_stopping_patience": _optional(_whole(1)),
    "training.early_stopping_min_delta": _number(st.sampled_from([-1.0, "-1e-9"]), min_value=0),
    "training.load_best_model": Setting(st.booleans(), st.sampled_from(["best", "last", 0, 1, "", [], {}, None, 1.0])),
    "evaluation.questions": _whole(0),
    "evaluation.retention_questions": _whole(0),
    "evaluation.max_new_tokens": _whole(1),
    "judge.answers": _words("auto", "exact", "open"),
    "judge.goal": _words("auto", "rows", "style", "generalise"),
    "judge.budget": _POSITIVE,
    "judge.control": _EXTRA_RUNS,
    "judge.memory": _EXTRA_RUNS,
    "judge.memory_batch_size": _whole(1),
    "judge.memory_length": _whole(8),
    "judge.allow_inconclusive": _YES_OR_NO,
    "tracking.to": Setting(
        st.lists(st.sampled_from(["tensorboard", "trackio", "wandb", "mlflow"]), unique=True, max_size=4),
        st.sampled_from(["wandb", "", ["wandb", "wandb"], ["wandbb"], [1], [""], {}, 3, True, None]),
    ),
    "tracking.project": _TEXT,
    "tracking.name": _optional(_TEXT),
    "backend": _words("torch", "mlx", "reference"),
}
"""Every setting by dotted key, written down independently of the product's schema."""

NUMBERS = tuple(key for key, setting in SETTINGS.items() if setting.number)
NULLABLE = tuple(key for key, setting in SETTINGS.items() if setting.nullable)
"""The settings that hold one number, and those that may be left empty."""


def nested(values: dict[str, Any]) -> Tree:
    """The mapping that a YAML file with these dotted keys holds."""
    tree: Tree = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def settings_given() -> st.SearchStrategy[dict[str, Any]]:
    """Accepted values for some of the settings, by dotted key, in any order."""
    everything = st.fixed_dictionaries({}, optional={key: setting.accepted for key, setting in SETTINGS.items()})
    return everything.flatmap(lambda values: st.permutations(list(values.items()))).map(dict)


def specs(section: str) -> st.SearchStrategy[Any]:
    """One group of settings, `training` for example, some of them given and the others at their defaults."""
    own = {key: setting.accepted for key, setting in SETTINGS.items() if key.startswith(f"{section}.")}
    return st.fixed_dictionaries({}, optional=own).map(lambda given: getattr(unflatten(given), section))


def configs() -> st.SearchStrategy[TrainingConfig]:
    """Valid configurations."""
    return settings_given().map(unflatten)


def planted_problems(most: int = 8) -> st.SearchStrategy[dict[str, Any]]:
    """A refused value for each of some settings, by dotted key: as many problems as keys."""
    keys = st.lists(st.sampled_from(list(SETTINGS)), min_size=1, max_size=most, unique=True)
    return keys.flatmap(lambda chosen: st.fixed_dictionaries({key: SETTINGS[key].refused for key in chosen}))


@st.composite
def refused_configs(draw: st.DrawFn) -> tuple[Tree, str]:
    """A raw configuration with exactly one refused value, and the dotted key that must be named."""
    [(key, value)] = draw(planted_problems(most=1)).items()
    good = draw(settings_given())
    return nested({**good, key: value}), key
