"""Laws of settings: each is known, taken as it is set, and does something."""

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from finetune.config import default_of
from finetune.verify.catalogue import law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.laws.helpers import comparable, tokenized
from finetune.verify.subjects.answers import Accepted, Epochs, Gradient, TrainingResult, Weights
from finetune.verify.subjects.subject import RefusesError, UnsupportedError
from finetune_strategies.cases import config as cases
from finetune_strategies.cases.rows import PLAIN, TINY

ROWS = [{"prompt": "ab" * size, "completion": "xyz"[: 1 + size % 3] * size} for size in (1, 9, 4, 13, 6)]
"""Five rows, no two of the same length."""


@law("config.unknown", ["configure"], cases.CONFIG_UNKNOWN, examples=len(cases.MISSPELT))
@oracle("no trainer has a setting of such a name")
def unknown_setting_is_refused(trainer: SubjectClient, case: cases.Named) -> None:
    """A setting that does not exist is refused."""
    try:
        taken = trainer.ask("configure", Accepted, model=trainer.model(TINY), settings={**PLAIN, case.key: case.value})
    except RefusesError:
        return
    check(False, expected=f"{case.key} is refused", got=f"it is taken: {taken.told or 'nothing is said'}")  # noqa: FBT003


@law("config.taken", ["configure"], cases.CONFIG_TAKEN)
@oracle("the settings that were given")
def settings_are_taken(trainer: SubjectClient, case: cases.Set) -> None:
    """A setting is taken as it is set, 0, null and no among them, whatever else is set."""
    given = {**PLAIN, **case.settings}
    taken = trainer.ask("configure", Accepted, model=trainer.model(TINY), settings=given).effective
    if not taken:
        raise UnsupportedError("it does not tell what is in force")
    wrong = {key: taken[key] for key, value in given.items() if key in taken and taken[key] != value}
    check(not wrong, expected={key: given[key] for key in wrong}, got=wrong)


def _hold_changed(case: cases.Change, outcome: Callable[[Mapping[str, object]], object]) -> None:
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


@law("config.rows", ["tokenize"], st.sampled_from(cases.CONFIG_ROWS), examples=len(cases.CONFIG_ROWS))
@oracle("the rows with the other value")
def settings_of_rows_do_something(trainer: SubjectClient, case: cases.Change) -> None:
    """A setting of rows that is changed changes the rows, or is refused."""
    _hold_changed(case, lambda settings: comparable(tokenized(trainer, trainer.model(TINY), ROWS, settings)))


@law("config.batches", ["batches"], st.sampled_from(cases.CONFIG_BATCHES), examples=len(cases.CONFIG_BATCHES))
@oracle("the batches with the other value")
def settings_of_batches_do_something(trainer: SubjectClient, case: cases.Change) -> None:
    """Every batching option has an effect or is rejected."""

    def outcome(settings: Mapping[str, object]) -> object:
        model, given = trainer.model(TINY), {**PLAIN, **settings}
        return trainer.ask("batches", Epochs, model=model, settings=given, rows=ROWS, epochs=1)

    _hold_changed(case, outcome)


_ROW = {"ids": [9, 40, 77, 12, 130, 31, 8], "targets": [False, False, True, True, True, True, True]}


def _gradient(trainer: SubjectClient, settings: Mapping[str, object]) -> Gradient:
    model = trainer.model(TINY)
    return trainer.ask("gradient", Gradient, model=model, settings={**PLAIN, **settings}, micro=[[_ROW]])


@law("config.adapter", ["gradient"], st.sampled_from(cases.CONFIG_ADAPTER), examples=len(cases.CONFIG_ADAPTER), cost=2)
@oracle("the gradient with the other value")
def settings_of_the_adapter_do_something(trainer: SubjectClient, case: cases.Change) -> None:
    """A setting of the adapter that is changed changes its first gradient, or is refused."""
    _hold_changed(case, lambda settings: _gradient(trainer, settings).norms)


@law(
    "config.training",
    ["train", "adapter_weights"],
    st.sampled_from(cases.CONFIG_TRAINING),
    examples=len(cases.CONFIG_TRAINING),
    cost=6,
)
@oracle("a run with the other value")
def settings_of_training_do_something(trainer: SubjectClient, case: cases.Change) -> None:
    """A setting of training that is changed changes its course or what is learned, or is refused."""

    def outcome(settings: Mapping[str, object]) -> object:
        model, folder = trainer.model(TINY), trainer.folder()
        given = {**PLAIN, "training.batch_size": 2, "training.epochs": 2.0, **settings}
        course = trainer.ask("train", TrainingResult, model=model, settings=given, rows=ROWS[:3], folder=folder / "run")
        check(course.adapter, expected="an adapter", got="none when training has ended")
        learned = trainer.ask("adapter_weights", Weights, model=model, adapter=course.adapter)
        numbers = {name: tensor.tolist() for name, tensor in trainer.tensors(learned.file).items()}
        return course.steps, sorted(course.checkpoints), numbers

    _hold_changed(case, outcome)


@law("config.targets", ["initial_adapter"], cases.CONFIG_TARGETS, examples=10)
@oracle("the names: a Llama has these seven linear layers in a block")
def adapter_sits_where_it_is_to(trainer: SubjectClient, case: cases.Targets) -> None:
    """An adapter sits on the layers that are named and on no others; a name that fits none is refused."""
    given = {**PLAIN, "adapter.target_modules": list(case.layers)}
    try:
        adapter = trainer.ask("initial_adapter", Weights, model=trainer.model(TINY), settings=given)
    except RefusesError:
        check("other_proj" in case.layers, expected=f"an adapter on {case.layers}", got="it is refused")
        return
    found = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in trainer.tensors(adapter.file)})
    check(found == sorted(case.layers), expected=f"an adapter on {sorted(case.layers)}, or a refusal", got=found)


@law("config.patterns", ["initial_adapter"], cases.CONFIG_PATTERNS, examples=8)
@oracle("the names of the layers")
def ranks_follow_their_patterns(trainer: SubjectClient, case: cases.Pattern) -> None:
    """A rank of its own is that of the layers that its pattern fits and of no others; one that fits none is refused."""
    given = {**PLAIN, "adapter.rank_pattern": {case.pattern: case.rank}}
    fitting = [layer for layer in cases.LINEAR if case.pattern.endswith(layer)]
    try:
        adapter = trainer.ask("initial_adapter", Weights, model=trainer.model(TINY), settings=given)
    except RefusesError:
        check(not fitting, expected=f"rank {case.rank} on {fitting}", got="it is refused")
        return
    check(fitting, expected=f"a pattern that fits nothing, {case.pattern!r}, is refused", got="it is taken")
    sizes = {name: tensor.shape[0] for name, tensor in trainer.tensors(adapter.file).items() if ".lora_A." in name}
    ranks = {name.split(".lora_")[0].rpartition(".")[2]: size for name, size in sizes.items()}
    expected = {layer: case.rank if layer in fitting else PLAIN["adapter.rank"] for layer in cases.LINEAR}
    check(ranks == expected, expected=expected, got=ranks)


@law("config.dropout", ["gradient"], cases.CONFIG_DROPOUT, examples=6, cost=2)
@oracle("the gradient of each tensor without dropout: no half of twelve numbers left out leaves it as it is")
def dropout_acts_everywhere(trainer: SubjectClient, case: cases.Dropped) -> None:
    """Dropout acts on every layer that is adapted, whichever these are."""
    given: dict[str, Any] = {"training.seed": case.seed}
    given |= {"adapter.target_modules": list(case.layers)} if case.layers else {}
    at_rest = _gradient(trainer, given).norms
    dropped = _gradient(trainer, {**given, "adapter.dropout": 0.5}).norms
    same = [name for name, norm in at_rest.items() if norm > 0 and dropped.get(name) == norm]
    check(not same, expected="another gradient of every tensor", got=f"the same of {', '.join(same)}")
