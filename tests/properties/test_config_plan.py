"""Laws of what is made from a configuration: profiles, the commented file, the JSON Schema and the plan."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.abilities import ABILITIES
from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.config import (
    KEYS,
    PROFILES,
    LoadedConfig,
    ModelAndDataFacts,
    Plan,
    TrainingConfig,
    commented_config,
    description_of,
    dump_plan,
    flatten,
    json_schema,
    load_plan,
    plan_as_list,
    resolve,
    resolve_steps,
    resolve_training,
    unflatten,
)
from finetune.config.derive import derived_epochs, derived_learning_rate
from finetune.errors import ConfigError
from finetune_strategies.config_files import SOURCES, load_text, refusal, yaml_file
from finetune_strategies.configs import configs, nested, settings_given
from finetune_strategies.profiles import examples

FACTS = st.builds(ModelAndDataFacts, st.integers(8, 10**6), st.booleans(), st.integers(0, 10**6))


@pytest.mark.parametrize("name", list(PROFILES))
def test_profile_sets_exactly_its_values(name: str) -> None:
    """Each of the four profiles changes its own keys, wherever it is named, and nothing else."""
    assert set(PROFILES) == {"chat", "instruction", "code", "demo"}
    assert set(PROFILES[name].values) <= set(KEYS)
    assert PROFILES[name].sentence.endswith(".")
    expected = unflatten(PROFILES[name].values)
    by_flag, by_file = load_text("", profile=name), load_text(f"profile: {name}")
    by_variable = load_text("profile: chat" if name != "chat" else "", environ={"FT_PROFILE": name})
    assert by_flag == by_file == by_variable
    assert by_flag.config == expected
    assert {key for key, origin in by_flag.origins.items() if origin == "profile"} == set(PROFILES[name].values)
    [problem] = refusal(f"profile: {name}x").problems
    assert problem.hint == f"did you mean {name}?"


def test_profile_null_from_a_flag_cancels_the_files() -> None:
    """A stronger `profile: null` means none."""
    assert load_text("profile: code", overrides={"profile": None}).config == TrainingConfig()


def test_commented_config_loads_to_the_defaults() -> None:
    """The file of `ft init` changes nothing, and still changes nothing with all 45 settings switched on."""
    text = commented_config()
    loaded = load_text(text)
    assert loaded.config == TrainingConfig()
    assert set(loaded.origins.values()) == {"default"}
    switched = [line.replace("#", "", 1) if line.lstrip()[:2].strip("# ") else line for line in text.splitlines()]
    assert sum(new != old for new, old in zip(switched, text.splitlines(), strict=True)) == len(KEYS) + 1
    loaded = load_text("\n".join(switched))
    assert loaded.config == TrainingConfig()
    assert set(loaded.origins.values()) == {"file"}
    assert all(description_of(key).split()[0] in text for key in KEYS)


def test_json_schema_describes_every_setting_and_nothing_else() -> None:
    """The JSON Schema names the 51 settings and `profile`, explains each and closes every object."""
    schema = json_schema()
    json.dumps(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert schema["title"]
    assert "required" not in schema
    found = []
    for name, part in schema["properties"].items():
        assert part["description"]
        reference = next((choice["$ref"] for choice in part.get("anyOf", []) if "$ref" in choice), None)
        if reference is None:
            found.append(name)
            continue
        group = schema["$defs"][reference.rpartition("/")[2]]
        assert group["additionalProperties"] is False
        assert "required" not in group
        assert all(inner["description"] for inner in group["properties"].values())
        found += [f"{name}.{inner}" for inner in group["properties"]]
    assert sorted(found) == sorted([*KEYS, "profile"])


def schema_errors(values: Any) -> list[Any]:
    """What a validator of the library has against a configuration, by our JSON Schema."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install 'finetune-suite[dev]'")
    return list(jsonschema.Draft202012Validator(json_schema()).iter_errors(values))


@given(settings_given())
@examples(0.4)
def test_json_schema_accepts_what_the_loader_accepts(values: dict[str, Any]) -> None:
    """No accepted configuration breaks the JSON Schema."""
    assert schema_errors(nested(values)) == []


def test_json_schema_accepts_the_commented_file_and_refuses_another_type() -> None:
    """The file of `ft init` satisfies the JSON Schema; a seed in words does not."""
    assert schema_errors(yaml.safe_load(commented_config())) == []
    assert len(schema_errors({"training": {"seed": "three"}})) == 1


def facts_hold_out(config: TrainingConfig, facts: ModelAndDataFacts) -> bool:
    """Whether rows are split off the training rows: as many as asked for, or some where there are many."""
    fraction = config.data.valid_fraction
    return facts.train_rows >= 200 if fraction is None else fraction > 0


@given(configs(), FACTS, st.integers(1, 10**6), st.data())
@examples(4 / 3)
def test_plan_leaves_nothing_open(
    config: TrainingConfig, facts: ModelAndDataFacts, steps: int, data: st.DataObject
) -> None:
    """Resolving fills every derivable value, marks it derived, and keeps every given one; a conflict is refused."""
    origins = {key: data.draw(st.sampled_from(["file", "flag"]), label=key) for key in ("tokens.max_length",)}
    loaded = LoadedConfig(config, {**dict.fromkeys(KEYS, "file"), **origins})
    lengths = (config.tokens.max_length or 0, config.judge.memory_length)
    too_long = sum(length > facts.context_length for length in lengths)
    two_splits = config.data.valid is not None and bool(config.data.valid_fraction)
    no_template = config.template.name == "tokenizer" and not facts.has_chat_template
    plain = flatten(TrainingConfig())
    of_adapters = [key for key in KEYS if key.startswith("adapter.") or key == "training.loraplus_lr_ratio"]
    said = [key for key in of_adapters if flatten(config)[key] != plain[key]]
    kind = config.adapter.kind
    of_layers = ["adapter.target_modules", "adapter.modules_to_save"]
    taken = {"lora": of_adapters, "dora": of_adapters, "ia3": of_layers, "full": []}[kind]
    idle = sum(key not in ("adapter.kind", *taken) for key in said)
    held_out = config.data.valid is not None or facts_hold_out(config, facts)
    unwatched = (
        0 if held_out else (config.training.early_stopping_patience is not None) + config.training.load_best_model
    )
    margin = bool(config.training.early_stopping_min_delta) and config.training.early_stopping_patience is None
    quantize, size = config.model.quantize, config.model.quantize_group_size
    unable = quantize not in ABILITIES[config.backend].schemes
    kept = config.training.gradient_checkpointing and not ABILITIES[config.backend].checkpointing
    packed = unable + (kind == "full") if quantize else size != 64
    rows = bool(config.tokens.add_special_tokens) + bool(config.tokens.add_tokens) if kind == "ia3" else 0
    training, judged = config.training, config.judge
    dpo = training.objective == "dpo"
    aims: tuple[bool, ...] = (training.dpo_beta != 0.1,)
    if dpo:
        aims = (config.data.rehearsal is not None, config.template.train_on != "last", training.label_smoothing >= 0.5)
        aims += (judged.answers == "exact", judged.goal != "auto")
    if conflicts := too_long + two_splits + no_template + idle + unwatched + margin + packed + rows + kept + sum(aims):
        with pytest.raises(ConfigError) as caught:
            resolve(loaded, facts)
        assert len(caught.value.problems) == conflicts
        return
    sizes = {"parameters": facts.context_length, "rows": max(1, facts.train_rows), "steps_per_epoch": steps}
    plan = resolve_steps(resolve_training(resolve(loaded, facts), **sizes), steps)
    before, after = flatten(config), flatten(plan.config)
    for key in KEYS:
        open_before = before[key] == "auto" if key == "template.name" else before[key] is None
        derived = open_before and (key == "template.name" or after[key] is not None)
        derived |= key == "template.train_on" and dpo
        derived |= key == "template.name" and before[key].endswith(".jinja") and not Path(before[key]).is_absolute()
        assert plan.origins[key] == ("derived" if derived else loaded.origins[key])
        assert derived or after[key] == before[key]
    own = "tokenizer" if facts.has_chat_template else "alpaca"
    named = before["template.name"]
    named = str(Path(named).absolute()) if named.endswith(".jinja") else named
    assert after["template.name"] == (own if named == "auto" else named)
    assert 8 <= after["tokens.max_length"] <= facts.context_length
    assert (before["tokens.max_length"] is not None) or after["tokens.max_length"] == min(2048, facts.context_length)
    split = facts.train_rows >= 200 and config.data.valid is None
    assert before["data.valid_fraction"] is not None or after["data.valid_fraction"] == (0.05 if split else 0.0)
    assert before["training.save_every"] is not None or 1 <= after["training.save_every"] <= steps
    assert before["training.evaluate_every"] is not None or 1 <= after["training.evaluate_every"] <= steps
    assert resolve_steps(resolve_training(plan, **{key: size + 1 for key, size in sizes.items()}), steps + 1) == plan


PUBLISHED = {135e6: 1e-3, 7e9: 2e-4, 13e9: 2e-4, 33e9: 1e-4, 65e9: 1e-4}
"""LoRA's learning rates by parameters: what taught SmolLM2 here, and those of QLoRA's authors."""


def test_learning_rate_is_near_the_published_ones() -> None:
    """Within a third of what was published for a size; a tenth of it for a full model; the same for any rank."""
    for parameters, rate in PUBLISHED.items():
        assert 3 / 4 < derived_learning_rate(int(parameters), "lora") / rate < 4 / 3
        assert derived_learning_rate(int(parameters), "dora") == derived_learning_rate(int(parameters), "lora")


@given(st.integers(1, 10**13), st.integers(1, 10**13), st.sampled_from([*ADAPTER_KINDS, "full"]))
def test_learning_rate_never_rises_with_the_model(one: int, other: int, kind: str) -> None:
    """A larger model gets at most the rate of a smaller one, of two digits, and a full model a tenth of LoRA's."""
    slow, fast = (derived_learning_rate(size, kind) for size in (max(one, other), min(one, other)))
    assert 0 < slow <= fast
    assert float(f"{slow:.1e}") == slow
    assert derived_learning_rate(one, "full") == pytest.approx(derived_learning_rate(one, "lora") / 10, rel=0.01)


@given(st.integers(1, 10**7), st.integers(1, 64))
def test_epochs_make_enough_steps_and_no_more_than_needed(rows: int, batch: int) -> None:
    """Three; up to ten where the steps would be fewer than 30, and one or two where over 25,000 rows would be seen."""
    per_epoch = math.ceil(rows / batch)
    epochs = derived_epochs(rows, per_epoch)
    assert epochs == int(epochs)
    assert 1 <= epochs <= 10
    assert epochs == 1 or epochs * rows <= 25_000
    if epochs > 3:
        assert (epochs - 1) * per_epoch < 30
    if epochs < 3:
        assert (epochs + 1) * rows > 25_000
    if epochs * per_epoch < 30:
        assert epochs == 10 or (epochs + 1) * rows > 25_000


def test_users_rate_and_epochs_win_over_the_derived_ones() -> None:
    """What a file, a flag or a profile names stays with its origin; what is left open is derived and said so."""
    facts = ModelAndDataFacts(context_length=512, has_chat_template=True, train_rows=64)

    def settled(text: str, profile: str | None = None) -> dict[str, tuple[Any, str]]:
        plan = resolve_training(
            resolve(load_text(text, profile=profile), facts), parameters=135_000_000, rows=64, steps_per_epoch=8
        )
        return {entry["key"]: (entry["value"], entry["origin"]) for entry in plan_as_list(plan)}

    rate, epochs = "training.learning_rate", "training.epochs"
    assert [settled("")[key] for key in (rate, epochs)] == [(1e-3, "derived"), (4.0, "derived")]
    assert settled("training: {learning_rate: 0.5}")[rate] == (0.5, "file")
    assert settled("adapter: {kind: full}")[rate] == (1e-4, "derived")
    assert settled("", profile="chat")[epochs] == (2.0, "profile")
    assert settled("training: {epochs: 1}", profile="chat")[epochs] == (1.0, "file")


def test_plan_lowers_a_profiles_length_to_what_the_model_reads() -> None:
    """A profile does not know the model, so its wish yields; a user's is refused."""
    facts = ModelAndDataFacts(context_length=512, has_chat_template=True, train_rows=10)
    plan = resolve(load_text("", profile="code"), facts)
    assert (plan.config.tokens.max_length, plan.origins["tokens.max_length"]) == (512, "derived")
    with pytest.raises(ConfigError, match="512"):
        resolve(load_text("tokens: {max_length: 4096}"), facts)


def test_plan_lowers_the_default_length_of_the_memory_measurement_and_says_so() -> None:
    """A model that reads less than the default measures at what it reads, marked derived; a user's wish is refused."""
    facts = ModelAndDataFacts(context_length=40, has_chat_template=True, train_rows=10)
    plan = resolve(load_text(""), facts)
    assert (plan.config.judge.memory_length, plan.origins["judge.memory_length"]) == (40, "derived")
    with pytest.raises(ConfigError, match="memory_length is 41"):
        resolve(load_text("judge: {memory_length: 41}"), facts)


def test_plan_of_another_format_is_refused() -> None:
    """A plan whose head has another number was made by another version, and is not read with this one's words."""
    text = dump_plan(Plan(TrainingConfig(), dict.fromkeys(KEYS, "default")))
    with (
        yaml_file(text.replace("format 2", "format 3", 1)) as path,
        pytest.raises(ConfigError, match=r"(?s)of format 3.*train anew"),
    ):
        load_plan(path)


def origins() -> st.SearchStrategy[dict[str, str]]:
    """An origin for every setting."""
    sources = (*SOURCES, "derived")
    drawn = st.binary(min_size=len(KEYS), max_size=len(KEYS))  # one choice for all of them
    return drawn.map(lambda found: {key: sources[byte % 6] for key, byte in zip(KEYS, found, strict=True)})


@given(configs(), origins())
def test_plan_written_and_read_is_the_same_plan(config: TrainingConfig, origins: dict[str, str]) -> None:
    """A dumped plan loads as the same plan, origins included, in any YAML tool's hands as the same configuration."""
    plan = Plan(config, origins)
    text = dump_plan(plan)
    with yaml_file(text) as path:
        assert load_plan(path) == plan
    read = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    with yaml_file(yaml.dump(read, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)) as path:
        assert load_plan(path) == Plan(config, dict.fromkeys(KEYS, "file"))
    listed = {entry["key"]: entry["value"] for entry in plan_as_list(plan)}
    assert read == nested(listed)
    assert json.loads(json.dumps(plan_as_list(plan))) == plan_as_list(plan)
