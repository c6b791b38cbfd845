"""Judges a fine-tune that anybody's trainer made: an adapter or a model folder, on the rows it was trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from finetune.adapters.kinds import kind_of, layer_tensor
from finetune.adapters.peft_files import SETTINGS, WEIGHTS, base_of, in_peft_format, read_settings
from finetune.config import LoadedConfig, load_config
from finetune.criteria.evidence import Evidence
from finetune.criteria.judge import judge, overall
from finetune.data.stored import join
from finetune.errors import ModelError, UsageError
from finetune.evidence.observe import (
    learning_evidence,
    loss_evidence,
    losses_at_start,
    observe,
    open_evidence,
    preference_evidence,
)
from finetune.evidence.saved import open_model
from finetune.export.cached import with_model_folder
from finetune.memory.estimate import sides
from finetune.models.shape import read_shape
from finetune.models.travel import public_name
from finetune.objectives import choose_objective, measured_in
from finetune.reading import check_regular
from finetune.records import ModelLocation, Outcome, Verdict
from finetune.training.prepare import Prepared, prepare

_ELSEWHERE = "trained elsewhere: this can be seen only while it is trained"
"""Why training, memory and the shuffled-label control of a foreign result cannot be judged."""


def judge_tuned(loaded: LoadedConfig, tuned: Path) -> dict[str, Any]:
    """The verdict on a fine-tune, from looks at its base and at itself.

    Args:
        loaded: `model.path` is the base, `data.train` the rows it was trained on, `data.valid` rows that it never saw.
        tuned: a folder that PEFT or mlx-lm wrote an adapter into, or a whole model's.

    Returns:
        outcome, base, tuned, answers, goal, notes and what could not be measured, and each `Verdict`.

    Raises:
        FineTuneError: base, rows or result cannot be read, or do not belong together.
    """
    kind = _kind_of(tuned)
    prepared = prepare(with_model_folder(loaded, tell=lambda words: None))
    if kind == "model":
        _check_alike(prepared, tuned)
    else:
        _check_adapter(prepared, tuned)
    config = prepared.plan.config
    session = open_model(config, prepared.location, prepared.encoder)
    rows = join(prepared.train.rows, prepared.held_out.rows if prepared.held_out else ())
    objective = choose_objective(config.training, session, rows)
    before = losses_at_start(session, observe(session, prepared), objective)
    if kind == "model":
        del session  # two models need not fit into memory
        session = open_model(config, ModelLocation(str(tuned), tuned.resolve(), "local"), prepared.encoder)
    else:
        with in_peft_format(tuned, prepared.location.name) as adapter:
            session.load_adapter(adapter)
    after = observe(session, prepared, before, measured_in(objective))
    why = dict.fromkeys(("steps", "control", "memory", "parameters", "artifacts"), _ELSEWHERE)
    evidence = Evidence(
        loss_evidence(prepared, (), before, after),
        learning=learning_evidence(before, after, None, prepared, why),
        open=open_evidence(prepared, before.open, after.open),
        preference=preference_evidence(session, before.asked, objective),
        why=why,
        unable=frozenset({"steps", "control", "memory"}),
    )
    verdicts = judge(evidence)
    return {
        "outcome": overall(verdicts),
        "base": prepared.location.name,
        "tuned": str(tuned),
        "answers": prepared.answers,
        "goal": "preference" if evidence.preference else prepared.goal if evidence.open else "rows",
        "verdicts": verdicts,
        "notes": [*prepared.notes, *_other_base(tuned, prepared)],
        "not_measured": why,
    }


def assert_learned(
    base: str, tuned: str | Path, train: str | Path, heldout: str | Path | None = None, **settings: object
) -> dict[str, Any]:
    """Fail unless the verdict on a fine-tune is that it learned; for the tests of a trainer.

    Args:
        settings: others, their dots as double underscores: `judge__goal="rows"`.

    Returns:
        What `judge_tuned` returns.
    """
    given: dict[str, object] = {"model.path": base, "data.train": str(train), "data.valid": heldout and str(heldout)}
    given |= {key.replace("__", "."): value for key, value in settings.items()}
    overrides = {key: value for key, value in given.items() if value is not None}
    found = judge_tuned(load_config(None, environ={}, overrides=overrides, profile=None), Path(tuned))
    if found["outcome"] != Outcome.PASSED:
        raise AssertionError(
            "\n".join([f"the fine-tune {tuned} is {found['outcome']}:", *headlines(found["verdicts"])])
        )
    return found


def headlines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each verdict that counts and did not pass."""
    return [
        f"{each.outcome}: {each.title}: {each.measured} (allowed: {each.allowed}) {each.reason}".rstrip()
        for each in verdicts
        if each.counts and each.outcome not in (Outcome.PASSED, Outcome.NOT_APPLICABLE)
    ]


def _other_base(tuned: Path, prepared: Prepared) -> list[str]:
    """That an adapter names another base than it is judged on; shapes alone do not tell relatives apart."""
    named, base = base_of(tuned), prepared.location.name
    if named is None or Path(named).name == Path(base).name or named == public_name(prepared.location):
        return []
    return [f"the adapter says that it was trained on {named!r}, and it was judged on {base!r}"]


def _kind_of(tuned: Path) -> Literal["adapter", "model"]:
    if not tuned.is_dir():
        raise UsageError(f"{tuned} is no folder", hint="name the folder of an adapter or of a whole model")
    if (tuned / SETTINGS).is_file():
        return "adapter"
    if (tuned / "config.json").is_file():
        return "model"
    raise UsageError(
        f"{tuned} holds neither an adapter ({SETTINGS}) nor a model (config.json)",
        hint="name the folder that the trainer saved its last adapter or model in",
    )


def _check_adapter(prepared: Prepared, folder: Path) -> None:
    """Refuse an adapter of another base, before anything is loaded, where its kind and its file can be read."""
    shape = prepared.shape
    try:
        target = read_settings(folder, transposed=shape.transposed)
        check_regular(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, "np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (ModelError, OSError, SafetensorError):
        return  # whoever loads it reads more kinds, and says what is wrong with its files
    for name, size in found.items():
        part = layer_tensor(name)
        # Some models' files name a layer otherwise than it is named in memory: what is not found is not judged here.
        layer = next((each for each in shape.linear_layers if part and f".{part.path}".endswith(f".{each.name}")), None)
        if part is None or layer is None:
            continue
        wanted = kind_of(target).shapes(target, part.path, *sides(shape, layer)).get(part.tensor.key)
        if size != wanted:
            raise ModelError(
                f"the adapter in {folder} is not one of {prepared.location.name!r}: its {name} is {size}, and here it "
                f"would be {wanted}",
                hint=f"name the base that it was trained on with --base (it says {base_of(folder)!r})",
            )


def _check_alike(prepared: Prepared, tuned: Path) -> None:
    """Refuse a model of another shape than its base, before anything is loaded."""
    shape = read_shape(tuned)
    both = [(each.architecture, each.vocab_size, each.parameters) for each in (prepared.shape, shape)]
    if both[0] != both[1]:
        words = [f"{name}, {words} words, {count:,} parameters" for name, words, count in both]
        raise ModelError(
            f"the model in {tuned} ({words[1]}) is not a fine-tune of {prepared.location.name!r} ({words[0]})",
            hint="name the base that it was trained from with --base",
        )
