"""Laws of settings: each is known, taken as it is set, and does something."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Self

from hypothesis import strategies as st
from pydantic import AfterValidator, Field, model_validator

from finetune.config import KEYS, default_of
from finetune.verify.doors.answers import Accepted, Epochs, Gradient, TrainingResult, Weights
from finetune.verify.doors.door import RefusesError, UnsupportedError
from finetune.verify.recipes import OUTSIDE, Recipe
from finetune.verify.suite.cases import PLAIN, TINY, Word, one_of
from finetune.verify.suite.catalogue import law
from finetune.verify.suite.talks import comparable_rows, tokenized
from finetune.verify.suite.trainer import Trainer
from finetune.verify.suite.verdicts import check

ROWS = [{"prompt": "ab" * size, "completion": "xyz"[: 1 + size % 3] * size} for size in (1, 9, 4, 13, 6)]
"""Five rows, no two of the same length."""
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


_MISSPELT = (
    ("training.learing_rate", 0.1),
    ("training.seeds", 3.0),
    ("adapter.ranks", 2.0),
    ("tokens.maxlength", 64.0),
    ("data.trian_limit", 3.0),
    ("template.names", "chatml"),
    ("training.batchsize", 2.0),
    ("warmup", 0.5),
)


@law(
    "config.unknown",
    "A setting that does not exist is refused.",
    needs=["configure"],
    oracle="no trainer has a setting of such a name",
    cases=st.sampled_from([Named(key=key, value=value) for key, value in _MISSPELT]),
    examples=len(_MISSPELT),
)
def unknown_setting_is_refused(trainer: Trainer, case: Named) -> None:
    """To take it in silence leaves the default in force."""
    try:
        taken = trainer.ask("configure", Accepted, model=trainer.model(TINY), settings={**PLAIN, case.key: case.value})
    except RefusesError:
        return
    check(False, expected=f"{case.key} is refused", got=f"it is taken: {taken.told or 'nothing is said'}")  # noqa: FBT003


Value = bool | int | float | Plain | None
_VALUES: Mapping[str, Sequence[Value]] = {
    "training.seed": (0, 7),
    "training.warmup_fraction": (0.0, 0.25),
    "training.weight_decay": (0.0, 0.5),
    "training.packing": (False, True),
    "training.max_steps": (None, 3),
    "training.accumulation": (1, 3),
    "training.stop_after": (None,),
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


@law(
    "config.taken",
    "A setting is taken as it is set, 0, null and no among them, whatever else is set.",
    needs=["configure"],
    oracle="the settings that were given",
    cases=st.builds(
        Set, settings=st.fixed_dictionaries({}, optional={key: st.sampled_from(few) for key, few in _VALUES.items()})
    ),
)
def settings_are_taken(trainer: Trainer, case: Set) -> None:
    """What is in force, where the trainer tells, is what was given."""
    given = {**PLAIN, **case.settings}
    taken = trainer.ask("configure", Accepted, model=trainer.model(TINY), settings=given).effective
    if not taken:
        raise UnsupportedError("it does not tell what is in force")
    wrong = {key: taken[key] for key, value in given.items() if key in taken and taken[key] != value}
    check(not wrong, expected={key: given[key] for key in wrong}, got=wrong)


class SettingChange(Recipe):
    """Another value for a setting, and what else must be set so that it can matter."""

    key: Key
    value: bool | int | float | Plain | dict[Word, float] | Annotated[tuple[Word, ...], Field(strict=False)]
    given: dict[Key, bool | int | float | Plain]


def _changes(*changes: tuple[str, Any] | tuple[str, Any, dict[str, Any]]) -> dict[str, Any]:
    cases = [SettingChange(key=each[0], value=each[1], given=each[2] if len(each) > 2 else {}) for each in changes]
    return {"cases": st.sampled_from(cases), "examples": len(cases)}


def _hold_changed(case: SettingChange, outcome: Callable[[Mapping[str, Any]], object]) -> None:
    """What is observed differs once the setting does, or the other value is refused."""
    # Trainers have defaults of their own, one of which may be the other value.
    plain = {case.key: default_of(case.key), **PLAIN}[case.key]
    begun = {} if plain is None else {case.key: plain}
    before = outcome({**begun, **case.given})
    try:
        after = outcome({**begun, **case.given, case.key: case.value})
    except RefusesError:
        return
    check(before != after, expected=f"{case.key} = {case.value} changes something", got=f"the same as before: {after}")


@law(
    "config.rows",
    "A setting of rows that is changed changes the rows, or is refused.",
    needs=["tokenize"],
    oracle="the rows with the other value",
    **_changes(
        ("template.name", "alpaca"),
        ("tokens.max_length", 40),
        ("data.limit", 2),
        ("tokens.overlong", "truncate_prompt", {"tokens.max_length": 40}),
    ),
)
def settings_of_rows_do_something(trainer: Trainer, case: SettingChange) -> None:
    """No such setting is dead."""
    _hold_changed(case, lambda settings: comparable_rows(tokenized(trainer, trainer.model(TINY), ROWS, settings)))


@law(
    "config.batches",
    "A setting of batches that is changed changes the batches, or is refused.",
    needs=["batches"],
    oracle="the batches with the other value",
    **_changes(
        ("training.batch_size", 3),
        ("training.accumulation", 2, {"training.batch_size": 2}),
        ("training.packing", True),
        ("training.packing", True, {"training.accumulation": 2}),
        ("data.limit", 2),
    ),
)
def settings_of_batches_do_something(trainer: Trainer, case: SettingChange) -> None:
    """No such setting is dead."""

    def outcome(settings: Mapping[str, Any]) -> object:
        model, given = trainer.model(TINY), {**PLAIN, **settings}
        return trainer.ask("batches", Epochs, model=model, settings=given, rows=ROWS, epochs=1)

    _hold_changed(case, outcome)


_ROW = {"ids": [9, 40, 77, 12, 130, 31, 8], "targets": [False, False, True, True, True, True, True]}


def _gradient(trainer: Trainer, settings: Mapping[str, Any]) -> Gradient:
    model = trainer.model(TINY)
    return trainer.ask("gradient", Gradient, model=model, settings={**PLAIN, **settings}, micro=[[_ROW]])


@law(
    "config.adapter",
    "A setting of the adapter that is changed changes its first gradient, or is refused.",
    needs=["gradient"],
    oracle="the gradient with the other value",
    **_changes(
        ("adapter.rank", 3),
        ("adapter.alpha", 5.0),
        ("adapter.scaling", "rank_stabilized"),
        ("adapter.dropout", 0.5),
        ("adapter.targets", ("q_proj",)),
        ("adapter.kind", "dora"),
        ("adapter.rank_pattern", {"q_proj": 1}),
        ("adapter.alpha_pattern", {"q_proj": 3.0}),
        ("training.seed", 1),
    ),
    cost=2,
)
def settings_of_the_adapter_do_something(trainer: Trainer, case: SettingChange) -> None:
    """No such setting is dead."""
    _hold_changed(case, lambda settings: _gradient(trainer, settings).norms)


@law(
    "config.training",
    "A setting of training that is changed changes its course or what is learned, or is refused.",
    needs=["train", "adapter_weights"],
    oracle="a run with the other value",
    **_changes(
        ("training.learning_rate", 0.02),
        ("training.schedule", "linear", {"training.schedule": "constant"}),
        ("training.warmup_fraction", 0.5),
        ("training.lora_plus_ratio", 4.0),
        ("training.weight_decay", 9.0),
        ("training.max_grad_norm", 0.01),
        ("training.max_steps", 1),
        ("training.epochs", 1.0),
        ("training.save_every", 1),
        ("training.seed", 1),
    ),
    cost=6,
)
def settings_of_training_do_something(trainer: Trainer, case: SettingChange) -> None:
    """No such setting is dead."""

    def outcome(settings: Mapping[str, Any]) -> object:
        model, folder = trainer.model(TINY), trainer.folder()
        given = {**PLAIN, "training.batch_size": 2, "training.epochs": 2.0, **settings}
        course = trainer.ask("train", TrainingResult, model=model, settings=given, rows=ROWS[:3], folder=folder / "run")
        check(course.adapter, expected="an adapter", got="none when training has ended")
        learned = trainer.ask("adapter_weights", Weights, model=model, adapter=course.adapter)
        numbers = {name: tensor.tolist() for name, tensor in trainer.tensors(learned.file).items()}
        return course.steps, sorted(course.checkpoints), numbers

    _hold_changed(case, outcome)


class Targets(Recipe):
    """Layers to adapt, by their short names."""

    layers: Annotated[tuple[Word, ...], Field(min_length=1, strict=False)]


@law(
    "config.targets",
    "An adapter sits on the layers that are named and on no others; a name that fits none is refused.",
    needs=["initial_adapter"],
    oracle="the names: a Llama has these seven linear layers in a block",
    cases=st.builds(
        Targets,
        layers=st.lists(st.sampled_from((*_LINEAR, "other_proj")), min_size=1, max_size=3, unique=True).map(tuple),
    ),
    examples=10,
)
def adapter_sits_where_it_is_to(trainer: Trainer, case: Targets) -> None:
    """The adapter's tensors are those of the named layers."""
    given = {**PLAIN, "adapter.targets": list(case.layers)}
    try:
        adapter = trainer.ask("initial_adapter", Weights, model=trainer.model(TINY), settings=given)
    except RefusesError:
        check("other_proj" in case.layers, expected=f"an adapter on {case.layers}", got="it is refused")
        return
    found = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in trainer.tensors(adapter.file)})
    check(found == sorted(case.layers), expected=f"an adapter on {sorted(case.layers)}, or a refusal", got=found)


class Pattern(Recipe):
    """A pattern for layers, and the rank that they are to have."""

    pattern: Word
    rank: Annotated[int, Field(ge=1)]


@law(
    "config.patterns",
    "A rank of its own is that of the layers that its pattern fits and of no others; one that fits none is refused.",
    needs=["initial_adapter"],
    oracle="the names of the layers",
    cases=st.builds(
        Pattern,
        pattern=st.sampled_from(("q_proj", "up_proj", "mlp.down_proj", "other_proj", "q_pro")),
        rank=st.sampled_from((1, 3)),
    ),
    examples=8,
)
def ranks_follow_their_patterns(trainer: Trainer, case: Pattern) -> None:
    """By the sizes of the adapter's tensors."""
    given = {**PLAIN, "adapter.rank_pattern": {case.pattern: case.rank}}
    fitting = [layer for layer in _LINEAR if case.pattern.endswith(layer)]
    try:
        adapter = trainer.ask("initial_adapter", Weights, model=trainer.model(TINY), settings=given)
    except RefusesError:
        check(not fitting, expected=f"rank {case.rank} on {fitting}", got="it is refused")
        return
    check(fitting, expected=f"a pattern that fits nothing, {case.pattern!r}, is refused", got="it is taken")
    sizes = {name: tensor.shape[0] for name, tensor in trainer.tensors(adapter.file).items() if ".lora_A." in name}
    ranks = {name.split(".lora_")[0].rpartition(".")[2]: size for name, size in sizes.items()}
    expected = {layer: case.rank if layer in fitting else PLAIN["adapter.rank"] for layer in _LINEAR}
    check(ranks == expected, expected=expected, got=ranks)


class DropoutLayersCase(Recipe):
    """A seed, and the layers to adapt: all of them, or those that are named."""

    seed: Annotated[int, Field(ge=0)]
    layers: Annotated[tuple[Word, ...], Field(min_length=1, strict=False)] | None


@law(
    "config.dropout",
    "Dropout acts on every layer that is adapted, whichever these are.",
    needs=["gradient"],
    oracle="the gradient of each tensor without dropout: no half of twelve numbers left out leaves it as it is",
    cases=st.builds(
        DropoutLayersCase,
        seed=st.integers(0, 9),
        layers=st.none() | st.sampled_from([_LINEAR[:2], _LINEAR[3:5], _LINEAR[6:]]),
    ),
    examples=6,
    cost=2,
)
def dropout_acts_everywhere(trainer: Trainer, case: DropoutLayersCase) -> None:
    """Each tensor that has a gradient has another one with dropout."""
    given: dict[str, Any] = {"training.seed": case.seed}
    given |= {"adapter.targets": list(case.layers)} if case.layers else {}
    at_rest = _gradient(trainer, given).norms
    dropped = _gradient(trainer, {**given, "adapter.dropout": 0.5}).norms
    same = [name for name, norm in at_rest.items() if norm > 0 and dropped.get(name) == norm]
    check(not same, expected="another gradient of every tensor", got=f"the same of {', '.join(same)}")
