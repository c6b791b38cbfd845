"""What happens to files and processes that write them: values that say so in words, and the damage done for real."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

from hypothesis import strategies as st

from finetune.errors import UsageError
from finetune_strategies.picks import between, pick


class _InWords:
    """Says of itself what it is; `words` has places for its fields."""

    words: ClassVar[str]

    def describe(self) -> str:
        """The fault in words."""
        return self.words.format(**vars(self))


@dataclass(frozen=True)
class Killed(_InWords):
    """The process is killed, at a training step, before or after one of the writes it makes there."""

    step: int
    moment: Literal["before", "after"]
    write: int
    words = "killed at step {step}, {moment} its write number {write}"


@dataclass(frozen=True)
class DiskFull(_InWords):
    """No file can grow beyond so many bytes."""

    size: int
    words = "disk full after {size} bytes"


@dataclass(frozen=True)
class Torn(_InWords):
    """A file has its full length, but only its first bytes had reached the disk when the power went; the rest is 0."""

    file: str
    written: int
    words = "{file} torn after {written} bytes"


@dataclass(frozen=True)
class Truncated(_InWords):
    """A file ends too early."""

    file: str
    size: int
    words = "{file} cut to {size} bytes"


@dataclass(frozen=True)
class Flipped(_InWords):
    """One byte of a file has changed; `mask` says which bits, and is never 0."""

    file: str
    offset: int
    mask: int
    words = "{file} changed at byte {offset} by {mask:#04x}"


@dataclass(frozen=True)
class Missing(_InWords):
    """A file is gone."""

    file: str
    words = "{file} gone"


FileFault = Torn | Truncated | Flipped | Missing


def kills(*, most_steps: int = 12, most_writes: int = 4) -> st.SearchStrategy[Killed]:
    """A kill at any step, before or after any write; the first step and the first write come first."""
    moments: Sequence[Literal["before", "after"]] = ("before", "after")
    return st.builds(Killed, st.integers(1, most_steps), st.sampled_from(moments), st.integers(1, most_writes))


def full_disks(sizes: Mapping[str, int]) -> st.SearchStrategy[DiskFull]:
    """A disk too small for the largest of these files: from no room at all to one byte too few."""
    most = max(sizes.values())
    if most == 0:
        raise UsageError(f"files without a byte fit on every disk: {', '.join(sizes)}", hint="give one that has bytes")
    return st.builds(DiskFull, st.sampled_from([0, most - 1]) | st.integers(0, most - 1))


@cache
def _places(size: int) -> st.SearchStrategy[int]:
    return st.sampled_from([0, size - 1]) | st.integers(0, size - 1)


@st.composite
def file_faults(draw: st.DrawFn, sizes: Mapping[str, int]) -> FileFault:
    """Damage to one of these files, given with their sizes in bytes; an empty one can only go missing."""
    file = draw(pick(*sorted(sizes)))
    size = sizes[file]
    kinds: tuple[type[FileFault], ...] = (Missing, Truncated, Flipped, Torn) if size else (Missing,)
    kind = draw(pick(*kinds))
    if kind is Missing:
        return Missing(file)
    place = draw(_places(size))
    if kind is Flipped:
        return Flipped(file, place, draw(between(1, 255)))
    return Truncated(file, place) if kind is Truncated else Torn(file, place)


def sizes_below(folder: Path) -> dict[str, int]:
    """The size of every file below a folder, by its path from there."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def damage(folder: Path, fault: FileFault) -> bool:
    """Do this to a file below the folder; returns whether its content is another now (a torn file may end in zeros).

    Raises:
        UsageError: the folder holds no such file, or the file is too short for this fault.
    """
    path = folder / fault.file
    if not path.is_file():
        raise UsageError(f"{fault.describe()}: {folder} holds no such file", hint="draw the fault from `sizes_below`")
    old = path.read_bytes()
    if isinstance(fault, Missing):
        path.unlink()
        return True
    place = (
        fault.offset if isinstance(fault, Flipped) else fault.size if isinstance(fault, Truncated) else fault.written
    )
    if place >= len(old):
        raise UsageError(f"{fault.describe()}: it has only {len(old)}", hint="draw the fault from `sizes_below`")
    new = old[:place]
    if isinstance(fault, Flipped):
        new += bytes([old[place] ^ fault.mask]) + old[place + 1 :]
    elif isinstance(fault, Torn):
        new += bytes(len(old) - place)
    path.write_bytes(new)
    return new != old
