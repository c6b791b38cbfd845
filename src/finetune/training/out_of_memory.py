"""Says of a run whose memory ran out what it was expected to take, and what to lower to which value."""

from finetune.data.batches import epoch_batches
from finetune.errors import OutOfMemoryError
from finetune.memory.advise import say_size, ways_to_fit
from finetune.memory.forecast import Forecast, forecast_memory
from finetune.memory.framework import FRAMEWORKS
from finetune.memory.load import StepLoad, load_of
from finetune.processes import available_memory, resident_memory
from finetune.training.prepare import Prepared, pack_length

_HINT = "lower training.batch_size (and raise training.gradient_accumulation_steps), or lower tokens.max_length"


def with_estimate(error: OutOfMemoryError | MemoryError, prepared: Prepared, kept: str) -> OutOfMemoryError:
    """The error with what a step was expected to take, and which settings were expected to fit.

    Where nobody has measured the backend's own process there is no estimate, and none is told.

    Args:
        kept: what is left of the run.
    """
    known = error if isinstance(error, OutOfMemoryError) else OutOfMemoryError(f"out of memory: {error}", hint=_HINT)
    config = prepared.plan.config
    if config.backend not in FRAMEWORKS:
        return OutOfMemoryError(f"{known.message}; {kept}", hint=known.hint)
    training = config.training
    batches = epoch_batches(
        prepared.training_rows, training.batch_size, seed=training.seed, epoch=0, pack_length=pack_length(prepared.plan)
    )

    def forecast(load: StepLoad) -> Forecast:
        framework = FRAMEWORKS[config.backend]
        return forecast_memory(prepared.shape, prepared.target, config.model.dtype, load, framework)

    load = load_of(batches, training.gradient_accumulation_steps, recomputed=training.gradient_checkpointing)
    found, have = forecast(load), _within_reach()
    estimate = (
        f"the estimate for {load.rows} x {load.length} tokens at once was {say_size(found.expected.total)}, at most "
        f"{say_size(found.high.total)}; the machine has {say_size(have)} for this process, if nothing limits it further"
    )
    ways = [
        f"{way.flags} ({say_size(way.total)} expected)"
        for way in ways_to_fit(lambda load: forecast(load).expected.total, load, have)
    ]
    hint = f"{known.hint}: {', or '.join(ways)}" if ways else f"{known.hint}; `ft estimate` says what would fit"
    return OutOfMemoryError(f"{known.message}; {kept}; {estimate}", hint=hint)


def _within_reach() -> int:
    """Bytes that the machine could give this process: what it holds, and what is free."""
    return available_memory() + resident_memory()
