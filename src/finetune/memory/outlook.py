"""Answers whether a run fits into memory, by both methods: as a table and sentences, and as values for JSON."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from finetune.memory.advise import MemoryAdvice, say_size, ways_to_fit
from finetune.memory.forecast import PARTS, Forecast, forecast_memory
from finetune.memory.framework import Framework
from finetune.memory.kept import KNOWN
from finetune.memory.load import StepLoad
from finetune.records import AdapterTarget, ModelShape

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("low", "expected", "high")
LORA, FULL = "LoRA", "full fine-tuning"


@dataclass(frozen=True, slots=True)
class Outlook:
    """The memory of one step by each method, the memory available, and ways to make LoRA fit."""

    shape: ModelShape
    load: StepLoad
    framework: Framework
    available: int
    forecasts: dict[str, Forecast]
    ways: tuple[MemoryAdvice, ...]


def foresee(
    shape: ModelShape, target: AdapterTarget, dtype: str, load: StepLoad, framework: Framework, available: int
) -> Outlook:
    """Forecast LoRA with `target` and full fine-tuning, and look for ways to fit LoRA into `available` bytes."""

    def lora(load: StepLoad) -> Forecast:
        return forecast_memory(shape, target, dtype, load, framework)

    full = forecast_memory(shape, None, dtype, load, framework)
    ways = ways_to_fit(lambda load: lora(load).expected.total, load, available)
    return Outlook(shape, load, framework, available, {LORA: lora(load), FULL: full}, tuple(ways))


def outlook_table(outlook: Outlook) -> "Table":
    """One row for each part, three columns for each method; sizes in KiB, MiB or GiB."""
    from rich.table import Table

    table = Table("", box=None)
    for method in outlook.forecasts:
        for column in _COLUMNS:
            table.add_column(f"{method if column == _COLUMNS[0] else ''}\n{column}", justify="right")
    for part in (*PARTS, "overlap", "total"):
        sizes = [
            getattr(getattr(forecast, column), part) for forecast in outlook.forecasts.values() for column in _COLUMNS
        ]
        if part == "overlap":
            table.add_row("overlap (never at once)", *(f"-{say_size(size)}" if size else "0" for size in sizes))
        else:
            table.add_row(part, *map(say_size, sizes), style="bold" if part == "total" else None)
    return table


def outlook_notes(outlook: Outlook) -> list[str]:
    """What the table rests on, and whether each method fits into the memory that is available now."""
    notes = [f"framework: {outlook.framework.source}"]
    if outlook.framework.backend == "torch" and outlook.shape.architecture not in KNOWN:
        known = ", ".join(sorted(KNOWN))
        notes.append(
            f"{outlook.shape.architecture} is not counted tensor by tensor, as {known} are: "
            "its activations are a rough figure with a wide band"
        )
    return notes + [_fits(method, forecast, outlook) for method, forecast in outlook.forecasts.items()]


def _fits(method: str, forecast: Forecast, outlook: Outlook) -> str:
    have = f"{say_size(outlook.available)} are available"
    expected, most = forecast.expected.total, forecast.high.total
    if most <= outlook.available:
        return f"{method} fits: at most {say_size(most)}, and {have}"
    if expected <= outlook.available:
        return f"{method} should fit, but may not: {say_size(expected)} expected, at most {say_size(most)}; {have}"
    sentence = (
        f"{method} does not fit: {say_size(expected)} expected, {say_size(expected - outlook.available)} too much"
    )
    if method == FULL:
        saved = expected - outlook.forecasts[LORA].expected.total
        return f"{sentence}; LoRA takes {say_size(saved)} less" if saved > 0 else sentence
    if not outlook.ways:
        return f"{sentence}; no smaller batch or row helps: choose a smaller model"
    ways = [f"{way.flags} ({say_size(way.total)})" for way in outlook.ways]
    return f"{sentence}; lower it with {', or '.join(ways)}"


def outlook_values(outlook: Outlook) -> dict[str, Any]:
    """Everything in bytes: for each method, the sum of `parts` less `overlap` is `total`.

    `tensors` is the peak of live tensors alone; `ways_to_fit` holds settings with which LoRA would fit.
    """
    return {
        "parameters": outlook.shape.parameters,
        "architecture": outlook.shape.architecture,
        "batch": asdict(outlook.load),
        "framework": {"backend": outlook.framework.backend, "source": outlook.framework.source},
        "available": outlook.available,
        "lora": _forecast_values(outlook.forecasts[LORA], outlook.available),
        "full": _forecast_values(outlook.forecasts[FULL], outlook.available),
        "ways_to_fit": [{"settings": advice.settings, "total": advice.total} for advice in outlook.ways],
    }


def _forecast_values(forecast: Forecast, available: int) -> dict[str, Any]:
    bands = {
        part: {column: getattr(getattr(forecast, column), part) for column in _COLUMNS}
        for part in (*PARTS, "overlap", "tensors", "total")
    }
    return {
        "trainable_parameters": forecast.trainable_parameters,
        "parts": {part: bands[part] for part in PARTS},
        **{part: bands[part] for part in ("overlap", "tensors", "total")},
        "fits": forecast.expected.total <= available,
    }
