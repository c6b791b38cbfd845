"""`ft estimate`: what a run will take of memory, before it starts."""

from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.console import data_console, print_json
from finetune.cli.options import AsJson, ConfigFile, ConfigOptions, with_settings

if TYPE_CHECKING:
    from finetune.config import LoadedConfig
    from finetune.memory.load import StepLoad
    from finetune.records import ModelShape

Measure = Annotated[
    bool, typer.Option("--measure-framework", help="Measure here what the libraries take, in a fresh process.")
]


@with_settings
def command(
    config: ConfigFile = None,
    *,
    settings: ConfigOptions,
    measure_framework: Measure = False,
    json_output: AsJson = False,
) -> int:
    """Estimate peak memory, by component: at least, as expected, and at most.

    For LoRA and for full fine-tuning, from the model's shape alone. Without --data every row is taken to be as long
    as tokens.max_length and trained throughout; with it, the largest batch of your rows counts.
    """
    from finetune.config import TrainingConfig
    from finetune.evidence.memory import measure_framework as measured_here
    from finetune.memory.framework import framework_of
    from finetune.memory.outlook import foresee, outlook_notes, outlook_table, outlook_values
    from finetune.models.locate import locate_model
    from finetune.processes import available_memory
    from finetune.training.prepare import adapter_target, planned_shape

    loaded = settings.load(config)
    chosen = loaded.config
    framework = framework_of(chosen.backend)
    if measure_framework:
        framework = framework.measured(measured_here(chosen.backend))
    shape = planned_shape(chosen, locate_model(chosen.model.path, revision=chosen.model.revision))
    # Where the whole model is to be trained, a plain adapter is shown beside it.
    target = adapter_target(chosen, shape) or adapter_target(TrainingConfig(), shape)
    assert target is not None
    load, basis = _load(loaded, shape)
    outlook = foresee(shape, target, chosen.model.dtype, load, framework, available_memory())
    if json_output:
        print_json({"model": chosen.model.path, "basis": basis, **outlook_values(outlook)})
        return 0
    console = data_console()
    trained = f"the adapter trains {outlook.forecasts['LoRA'].trainable_parameters:,} of its own"
    if chosen.adapter.kind == "full":
        trained = "all of them are trained"
    for line in (
        f"{chosen.model.path}: {shape.parameters:,} parameters; {trained}",
        f"{load.rows} x {load.length} tokens at once, {load.targets:,} of them trained: {basis}",
    ):
        console.print(line, markup=False, highlight=False)
    console.print(outlook_table(outlook))
    for line in outlook_notes(outlook):
        console.print(line, markup=False, highlight=False)
    return 0


def _load(loaded: "LoadedConfig", shape: "ModelShape") -> tuple["StepLoad", str]:
    """The largest batch, and what it was taken from."""
    from finetune.config import ModelAndDataFacts, resolve
    from finetune.data.batches import epoch_batches
    from finetune.data.sources import shown_names
    from finetune.memory.load import load_of, planned_load
    from finetune.training.prepare import pack_length, prepare

    training = loaded.config.training
    if loaded.config.data.train is None:
        # Neither template nor rows matter here, so nothing can be wrong with them.
        plan = resolve(loaded, ModelAndDataFacts(shape.context_length, has_chat_template=True, train_rows=1))
        assert plan.config.tokens.max_length is not None
        load = planned_load(training, plan.config.tokens.max_length)
        return load, "every row as long as tokens.max_length allows (--data takes your own)"
    prepared = prepare(loaded)
    batches = epoch_batches(
        prepared.training_rows, training.batch_size, seed=training.seed, epoch=0, pack_length=pack_length(prepared.plan)
    )
    taken_from = f"the largest batch of {shown_names(loaded.config.data.train)}"
    load = load_of(batches, training.gradient_accumulation_steps, recomputed=training.gradient_checkpointing)
    return load, taken_from
