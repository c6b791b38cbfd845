"""Says whether a run fits into memory and, where it does not, what to lower and to which value."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from finetune.memory.load import StepLoad

TotalOf = Callable[[StepLoad], int]
"""The bytes that a step with this load is expected to take."""
SHORTEST = 8
"""Tokens: no configuration allows shorter rows."""


@dataclass(frozen=True, slots=True)
class MemoryAdvice:
    """One way to make it fit: these settings, and the bytes that the run is then expected to take."""

    settings: dict[str, int | bool]
    total: int

    @property
    def flags(self) -> str:
        """The settings as they are given to `ft`."""
        return " ".join(f"--set {key}={str(value).lower()}" for key, value in self.settings.items())


def ways_to_fit(total_of: TotalOf, load: StepLoad, available: int) -> list[MemoryAdvice]:
    """The smallest changes that make a run fit into `available` bytes; empty when it fits, or when nothing helps.

    Blocks that are computed again for their gradients train the same, and so do fewer rows at once, with as many more
    batches added up; shorter rows do not. Fewer and shorter rows together are told only where nothing else is enough.
    """
    if total_of(load) <= available:
        return []
    ways = [
        *_recomputed(total_of, load, available),
        *_fewer_rows(total_of, load, available),
        *_shorter_rows(total_of, load, available),
    ]
    if ways or load.rows == 1:
        return ways
    single = _with_rows(load, 1)
    settings: dict[str, int | bool] = {
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": single.accumulation,
    }
    return [
        MemoryAdvice(settings | choice.settings, choice.total) for choice in _shorter_rows(total_of, single, available)
    ]


def scaled(load: StepLoad, *, rows: int | None = None, length: int | None = None) -> StepLoad:
    """The load with other numbers of rows or tokens a row, as large a share of them trained."""
    changed = replace(load, rows=rows or load.rows, length=length or load.length)
    targets = -(-load.targets * changed.tokens // load.tokens)
    return replace(changed, targets=min(targets, changed.rows * (changed.length - 1)))


def _with_rows(load: StepLoad, rows: int) -> StepLoad:
    """As many rows for each movement of the weights, or a few more, but only so many of them at once."""
    accumulation = -(-load.rows * load.accumulation // rows)
    return replace(scaled(load, rows=rows), accumulation=accumulation, masked=load.masked and rows > 1)


def _recomputed(total_of: TotalOf, load: StepLoad, available: int) -> Iterator[MemoryAdvice]:
    total = total_of(replace(load, recomputed=True))
    if total <= available:
        yield MemoryAdvice({"training.gradient_checkpointing": True}, total)


def _fewer_rows(total_of: TotalOf, load: StepLoad, available: int) -> Iterator[MemoryAdvice]:
    rows = _largest(lambda rows: total_of(_with_rows(load, rows)) <= available, load.rows)
    if rows:
        fewer = _with_rows(load, rows)
        yield MemoryAdvice(
            {"training.batch_size": rows, "training.gradient_accumulation_steps": fewer.accumulation}, total_of(fewer)
        )


def _shorter_rows(total_of: TotalOf, load: StepLoad, available: int) -> Iterator[MemoryAdvice]:
    def fits(length: int) -> bool:
        return total_of(scaled(load, length=length)) <= available

    length = _largest(fits, load.length)
    if length >= SHORTEST:
        yield MemoryAdvice({"tokens.max_length": length}, total_of(scaled(load, length=length)))


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits; 0 when not even 1 does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def say_size(size: int) -> str:
    """Bytes in KiB, MiB or GiB, whichever leaves a number below 1024 with three digits to read."""
    value, unit = size / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1024, larger
    digits = max(0, 3 - len(str(int(abs(value)))))
    return f"{value:,.{digits}f} {unit}" if size else "0"
