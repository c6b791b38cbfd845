"""Laws of the configuration: what is written is what runs, and whatever is wrong is said at once and in place."""

import datetime
import itertools
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from finetune.config import (
    KEYS,
    Plan,
    TrainingConfig,
    commented_config,
    dump_plan,
    load_config,
    load_plan,
    parse_assignments,
    unflatten,
)
from finetune.config.keys import choices_of
from finetune.errors import ConfigError
from finetune_strategies.config_files import SOURCES, load_from, load_text, refusal, value_of, variable, word, yaml_file
from finetune_strategies.configs import (
    NULLABLE,
    NUMBERS,
    SETTINGS,
    nested,
    planted_problems,
    refused_configs,
    settings_given,
)
from finetune_strategies.profiles import examples

OLD_NAMES = {
    "training.accumulation": "gradient_accumulation_steps",
    "training.stop_after": "early_stopping_patience",
    "training.stop_margin": "early_stopping_min_delta",
    "training.keep": "load_best_model",
    "training.lora_plus_ratio": "loraplus_lr_ratio",
    "tokens.overlong": "truncation",
    "adapter.targets": "target_modules",
    "judge.sham": "control",
}
"""Settings by the names they had in the first format, and what they are called now."""


@pytest.mark.parametrize("old", OLD_NAMES)
def test_config_old_name_is_refused_with_the_new_one(old: str) -> None:
    """From a file, in its section or above, the environment or `--set`, an old name is told its new one."""
    section, _, name = old.partition(".")
    new = OLD_NAMES[old]
    found = {
        f"did you mean {new}?": refusal(f"{section}: {{{name}: 1}}"),
        f"did you mean {new} in `{section}`?": refusal(f"{name}: 1"),
        f"did you mean {variable(f'{section}.{new}')}?": refusal(environ={variable(old): "1"}),
        f"did you mean {section}.{new}?": refusal(overrides={old: 1}),
    }
    for hint, error in found.items():
        assert [(problem.hint, name in problem.what.lower()) for problem in error.problems] == [(hint, True)]


def test_settings_every_one_is_known_to_the_strategies() -> None:
    """The table of settings in the strategies and the schema name the same settings."""
    assert sorted(SETTINGS) == sorted(KEYS)
    assert len(KEYS) >= 55


FLOAT_SPELLINGS = (repr, str.upper, "{:.17e}".format, "{:.17E}".format, "{:.25g}".format, "'{!r}'".format)


@given(settings_given(), st.data())
def test_config_is_what_the_file_says(values: dict[str, Any], data: st.DataObject) -> None:
    """Whatever order and float spelling a file uses, loading it gives exactly its values and defaults elsewhere."""
    lines: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        spelled = word(value)
        if isinstance(value, float):
            spell = data.draw(st.sampled_from(FLOAT_SPELLINGS))
            spelled = spell(repr(value) if spell is str.upper else value)  # type: ignore[operator]
        lines.setdefault(section, []).append(f"{name}: {spelled}")
    blocks = [
        "\n".join(found) if not section else "\n  ".join([f"{section}:", *found]) for section, found in lines.items()
    ]
    loaded = load_text("\n".join(data.draw(st.permutations(blocks))) + "\n")
    assert loaded.config == unflatten(values)


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
@example(2e-5)
@example(1e-05)
@example(5e-324)
@example(1e16)
def test_floats_any_spelling_reads_as_the_same_number(value: float) -> None:
    """`2e-5`, which YAML 1.1 takes for text, is the number, from the file, the environment and --set."""
    short = repr(value).replace("e-0", "e-").replace(".0e", "e")
    for loaded in (
        load_text(f"training: {{learning_rate: {short}}}"),
        load_text("", environ={"FT_TRAINING__LEARNING_RATE": short}),
        load_text("", overrides=parse_assignments([f"training.learning-rate={short}"])),
    ):
        assert loaded.config.training.learning_rate == value


@pytest.mark.parametrize(("weaker", "stronger"), list(itertools.combinations(SOURCES, 2)))
@given(data=st.data())
@examples(1 / 4)
def test_precedence_stronger_source_wins(weaker: str, stronger: str, data: st.DataObject) -> None:
    """For every pair of sources and every setting the stronger source decides value and origin."""
    key = data.draw(st.sampled_from(KEYS))
    low, high = (data.draw(SETTINGS[key].accepted) for _ in range(2))
    loaded = load_from({weaker: {key: low}, stronger: {key: high}})
    assert value_of(loaded, key) == high
    assert loaded.origins[key] == stronger
    if weaker != "default":
        alone = load_from({weaker: {key: low}})
        assert (value_of(alone, key), alone.origins[key]) == (low, weaker)


@given(st.lists(settings_given(), min_size=4, max_size=4))
@examples(1 / 2)
def test_origins_name_the_strongest_source_of_every_key(given_values: list[dict[str, Any]]) -> None:
    """Every setting has an origin, and it is the strongest source that names the setting."""
    sources = dict(zip(SOURCES[1:], given_values, strict=True))
    loaded = load_from(sources)
    assert list(loaded.origins) == list(KEYS)
    for key in KEYS:
        expected = next((source for source in reversed(SOURCES[1:]) if key in sources[source]), "default")
        assert loaded.origins[key] == expected


@given(st.sampled_from(KEYS), st.data())
def test_unknown_key_is_refused_with_the_nearest_name(key: str, data: st.DataObject) -> None:
    """One letter too many, too few, wrong or swapped: refused in every source, naming the setting that was meant."""
    section, _, name = key.rpartition(".")
    assume(len(name) >= 5)
    at = data.draw(st.integers(1, len(name) - 2))
    letter = data.draw(st.sampled_from(string.ascii_lowercase))
    kinds = [name[:at] + letter + name[at:], name[:at] + name[at + 1 :], name[:at] + letter + name[at + 1 :]]
    wrong = data.draw(st.sampled_from([*kinds, name[:at] + name[at + 1] + name[at] + name[at + 2 :]]))
    names = {known.rpartition(".")[2] for known in KEYS} | {known.partition(".")[0] for known in KEYS}
    assume(wrong not in names)
    wrong_key = f"{section}.{wrong}" if section else wrong
    [problem] = refusal(yaml.safe_dump(nested({wrong_key: 1}))).problems
    assert wrong_key in problem.where
    assert f"did you mean {name}?" in problem.hint
    [problem] = refusal(overrides={wrong_key: 1}).problems
    assert problem.where == f"--set {wrong_key}"
    assert f"did you mean {key}?" in problem.hint
    [problem] = refusal(environ={variable(wrong_key): "1"}).problems
    assert problem.where == variable(wrong_key)
    assert variable(key) in problem.hint


@given(st.sampled_from([key for key in KEYS if "." in key]), st.data())
def test_misplaced_key_is_sent_to_its_section(key: str, data: st.DataObject) -> None:
    """A setting written in another section, or in none, is refused and its home is named."""
    home, name = key.split(".")
    others = sorted({known.partition(".")[0] for known in KEYS if "." in known})
    other = data.draw(st.sampled_from(["", *others]))
    misplaced = f"{other}.{name}".removeprefix(".")
    assume(misplaced not in KEYS and misplaced not in others)
    [problem] = refusal(yaml.safe_dump(nested({misplaced: 1}))).problems
    assert problem.hint == f"`{name}` belongs in `{home}`"


@given(planted_problems(), planted_problems(), planted_problems())
def test_problems_are_all_reported_at_once(
    file: dict[str, Any], environment: dict[str, Any], flags: dict[str, Any]
) -> None:
    """As many problems as were planted in file, environment and flags are reported, each with its place."""
    text = yaml.safe_dump(nested(file), sort_keys=False)
    typed_names = {key for key, value in environment.items() if isinstance(value, str) and _takes_names(key)}
    variables = {variable(key): word(value) for key, value in environment.items() if value != ""}
    # There a,b for a list of names is that list.
    variables = {name: typed for name, typed in variables.items() if name not in set(map(variable, typed_names))}
    # In a shell, 7 and [] typed for a text setting are that text, so only what is refused there is planted there.
    variables = {name: typed for name, typed in variables.items() if not _is_text(name) or typed in ("null", '"None"')}
    variables = {name: typed for name, typed in variables.items() if not (_is_text(name) and _may_be_null(name, typed))}
    overrides = {**flags, "training.sede": 1}
    problems = refusal(text, environ=variables, overrides=overrides).problems
    assert len(problems) == len(file) + len(variables) + len(overrides)
    lines = text.splitlines()
    for problem, key in zip(problems, _in_file_order(file), strict=False):
        place, _, named = problem.where.rpartition(" ")
        assert named == key
        assert lines[int(place.rpartition(":")[2]) - 1].strip().startswith(key.rpartition(".")[2])
    places = [problem.where for problem in problems[len(file) :]]
    assert places == [*sorted(variables), *(f"--set {key}" for key in overrides)]


def _in_file_order(values: dict[str, Any]) -> list[str]:
    return [
        f"{section}.{name}" if isinstance(inner, dict) and section != "backend" else section
        for section, inner in nested(values).items()
        for name in (inner if isinstance(inner, dict) and section != "backend" else [section])
    ]


def _is_text(name: str) -> bool:
    key = name.removeprefix("FT_").lower().replace("__", ".")
    texts = (
        "model.path",
        "model.rev",
        "model.ad",
        "data.",
        "template.",
        "tokens.cache",
        "tracking.project",
        "tracking.name",
    )
    return key.startswith(texts) and key not in NUMBERS


def _takes_names(key: str) -> bool:
    return any(choice.get("items", {}).get("type") == "string" for choice in choices_of(key))


def _may_be_null(name: str, typed: str) -> bool:
    return typed == "null" and name.removeprefix("FT_").lower().replace("__", ".") in NULLABLE


@given(refused_configs())
def test_refused_value_is_named_by_its_key(refused: tuple[dict[str, Any], str]) -> None:
    """One refused value among good ones: exactly one problem, at its key."""
    raw, key = refused
    # Escaped: as it stands, PyYAML would fold a line break such as U+0085 into an innocent space.
    [problem] = refusal(yaml.safe_dump(raw)).problems
    assert problem.where.endswith(f" {key}")
    assert key.rpartition(".")[2] in problem.what


@pytest.mark.parametrize("source", SOURCES[1:])
@pytest.mark.parametrize("key", ["training.seed", "adapter.dropout", "evaluation.questions", "data.valid_fraction"])
def test_zero_survives_every_source(source: str, key: str) -> None:
    """A zero is a value, not an absence: a stronger 0 replaces a weaker 7, wherever it comes from (mlx-lm #1661)."""
    loaded = load_from({source: {key: 0}})
    assert value_of(loaded, key) == 0
    assert loaded.origins[key] == source
    if source == "flag" and key == "training.seed":
        assert load_from({"file": {key: 7}, "flag": {key: 0}}).config.training.seed == 0


@pytest.mark.parametrize("value", [True, False, float("nan"), float("inf"), "abc", "nan", "true"])
def test_numbers_refuse_what_is_no_number(value: object) -> None:
    """Booleans, NaN, infinity and words are refused for each of the numbers, in every source."""
    assert len(NUMBERS) >= 26
    wrong = dict.fromkeys(NUMBERS, value)
    for error, names in (
        (refusal(yaml.safe_dump(nested(wrong))), NUMBERS),
        (refusal(environ={variable(key): word(value) for key in NUMBERS}), map(variable, NUMBERS)),
        (refusal(overrides=wrong), NUMBERS),
    ):
        assert sorted(problem.where.rpartition(" ")[2] for problem in error.problems) == sorted(names)


def test_numbers_whole_ones_take_3_0_and_refuse_3_5() -> None:
    """A whole number may be written 3.0, never 3.5; a float may be written 3."""
    assert load_text("training: {seed: 3.0, epochs: 3}").config.training.seed == 3
    assert "3.5" in refusal("training: {seed: 3.5}").problems[0].what


def test_none_is_not_the_word_none() -> None:
    """Null is None after every round trip, and the text "None" is never taken for it (axolotl #3859)."""
    assert len(NULLABLE) >= 19
    texts, nulls, words = (dict.fromkeys(NULLABLE, value) for value in ("x", None, "None"))
    loaded = [load_from({"profile": texts, source: nulls}) for source in SOURCES[2:]]
    with yaml_file(dump_plan(Plan(TrainingConfig(), dict.fromkeys(KEYS, "default")))) as path:
        plan = load_plan(path)
    assert all(value_of(each, key) is None for each in (*loaded, plan) for key in NULLABLE)
    for wrong in (refusal(yaml.safe_dump(nested(words))), refusal(environ={variable(key): "None" for key in NULLABLE})):
        assert [problem.hint for problem in wrong.problems] == ["write null for no value"] * len(NULLABLE)


def merged(levels: int, times: int) -> str:
    """A few lines that merge to `times ** levels` values: each mapping brings in the one before it so many times."""
    lines = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * times)}]}}" for n in range(1, levels)]
    return "\n".join(["a0: &a0 {x: 1}", *lines])


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("a: [", ":1:5", "not valid YAML"),
        ("training:\n\tseed: 1", ":2:1", "tab"),
        ("training:\n  seed: 1\n  seed: 2", ":3 training.seed", "twice"),
        ("backend: torch\nbackend: mlx", ":2 backend", "twice"),
        ("backend: !!python/object/apply:os.getcwd []", ":1:10", "!!python/object/apply:os.getcwd"),
        ("- a\n- b", "config.yaml", "list"),
        ("training: 7", ":1 training", "group of settings"),
        ("template: chatm", ":1 template.name", "chatm"),
        ("training.seed: 1", ":1 training.seed", "at the top"),
        (b"backend: \xff", "config.yaml", "UTF-8"),
        ("training: {seed: !!int abc}", "config.yaml", "cannot be read"),
        ("training: {seed: " + "9" * 5000 + "}", ":1:18", "5,000 characters is no number"),
        ("training: {seed: 1" + ":59" * 50_000 + "}", ":1:18", "is no number"),
        ("a: &a {" + ", ".join(f"k{n}: 1" for n in range(99)) + "}\nb: {<<: [" + "*a, " * 200 + "]}", ":2:5", "merges"),
        (merged(levels=9, times=10), ":5:10", "merges (<<) bring in more than 10,000 values"),
        (merged(levels=60, times=2), "", "merges (<<) bring in more than 10,000 values"),
        ("[" * 1000, "config.yaml", "cannot be read"),
        ("a: 1\n---\nb: 2", ":2:1", "another document"),
    ],
)
def test_broken_file_is_refused_in_its_place(text: str | bytes, place: str, says: str) -> None:
    """Whatever is wrong with a file is one problem that names line, column or key, never a traceback."""
    [problem] = refusal(text).problems
    assert problem.where.endswith(place)
    assert says in str(problem)
    assert problem.hint
    assert len(str(problem)) < 600


def test_broken_file_does_not_hide_other_problems() -> None:
    """A file that is no YAML and a wrong flag are reported together."""
    assert len(refusal("a: [", overrides={"training.seed": -1}, profile="nope").problems) == 3


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    """A path that is no readable file is refused with its name and a remedy."""
    for path in (tmp_path / "nope.yaml", tmp_path, Path("a\0b"), tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError) as caught:
            load_config(path, environ={}, overrides={}, profile=None)
        [problem] = caught.value.problems
        assert problem.where == str(path)
        assert problem.hint


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null", "training:\n", "\ufeffbackend: torch", "{}"])
def test_empty_file_is_the_defaults(text: str) -> None:
    """A file without settings, or with empty sections, is the defaults."""
    assert load_text(text).config == TrainingConfig()


def test_merge_keys_are_not_duplicates() -> None:
    """YAML's `<<` may bring in a key that is written again."""
    text = "judge: &j {memory_length: 9}\ntokens:\n  <<: {max_length: 9}\n  max_length: 10\n"
    assert load_text(text).config.tokens.max_length == 10


def test_environment_leaves_other_programs_alone() -> None:
    """Reserved, foreign and empty variables are ignored; a missing underscore of ours is refused."""
    reserved = {"FT_REAL_MODEL_ENABLE": "1", "FT_TEST_MODEL": "x", "FT_E2E_MODEL_ID": "y", "FT_VERBOSE": "1"}
    foreign = {"FT_PASSWORD": "x", "FTP_PROXY": "y", "HOME": "/", "FT_BACKEND": "", "FT_TRAINING__SEED": ""}
    assert load_text("", environ={**reserved, **foreign}).config == TrainingConfig()
    [problem] = refusal(environ={"FT_TRAINING_SEED": "1"}).problems
    assert problem.hint == "did you mean FT_TRAINING__SEED?"


@pytest.mark.parametrize("typed", ["0123", "2024-01-01", "yes", "a: b", "a #b", "[x", "1e5", "C:\\x", "*a"])
def test_typed_text_stays_text(typed: str) -> None:
    """A branch or path typed in a shell is taken as it stands, even if YAML would read a number into it."""
    assert load_text("", environ={"FT_MODEL__REVISION": typed}).config.model.revision == typed
    overrides = parse_assignments([f"data.train={typed}"])
    assert load_text("", overrides=overrides).config.data.train == typed


def test_assignments_without_a_value_are_all_refused() -> None:
    """`--set` words without `=` or without a key are reported together; hyphens mean underscores; the last wins."""
    with pytest.raises(ConfigError) as caught:
        parse_assignments(["training.seed", "=3", "training.seed=1"])
    assert len(caught.value.problems) == 2
    parsed = parse_assignments(["training.batch-size=2", "training.batch_size=[a, b]", "data.train=null"])
    assert parsed == {"training.batch_size": ["a", "b"], "data.train": None}


@given(st.text(max_size=300) | st.lists(st.text()) | st.binary(max_size=200) | st.integers())
def test_shown_values_are_short(value: object) -> None:
    """A refused value is shown, but never longer than 80 characters."""
    [problem] = refusal(overrides={"training.schedule": value}).problems
    assert len(problem.what.partition("; it is ")[2]) <= 80


def test_yaml_of_everybody_else_is_left_alone() -> None:
    """No table of PyYAML's own classes holds anything of ours, and dates are still dates to everybody else."""
    assert parse_assignments(["training.seed=2024-01-01"]) == {"training.seed": "2024-01-01"}
    assert yaml.safe_load("2024-01-01") == datetime.date(2024, 1, 1)
    tables = ("yaml_constructors", "yaml_multi_constructors", "yaml_representers", "yaml_multi_representers")
    for kind in (yaml.Loader, yaml.FullLoader, yaml.SafeLoader, yaml.Dumper, yaml.SafeDumper):
        assert "yaml_implicit_resolvers" not in vars(kind)
        found = [each for table in tables for each in getattr(kind, table, {}).values()]
        assert found
        assert [each for each in found if each.__module__.startswith("finetune")] == []


def test_template_by_its_short_name_is_text_as_it_is_typed() -> None:
    """`--set template=a: b.jinja` names a file, as template.name does, and is no YAML mapping."""
    for key in ("template", "template.name"):
        given = parse_assignments([f"{key}=a: b.jinja"])
        assert given == {key: "a: b.jinja"}
        loaded = load_config(None, environ={}, overrides=given, profile=None)
        assert loaded.config.template.name == "a: b.jinja"


def test_comments_of_the_written_file_break_at_spaces_only() -> None:
    """A word with a hyphen, such as a path or a name, stays whole in the commented file."""
    words = {word for line in commented_config().splitlines() for word in line.lstrip("# ").split()}
    assert not [word for word in words if word.endswith("-") and len(word) > 1]
    assert "held-out" in commented_config()
