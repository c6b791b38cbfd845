"""Knows what a backend's own process takes before a model is loaded, and where each figure was measured."""

from dataclasses import dataclass, replace

from finetune.errors import UsageError

MIB = 1024**2
PACKING = 44 * MIB
"""What bitsandbytes 0.50 takes once it is imported, measured with torch 2.13."""


@dataclass(frozen=True, slots=True)
class Framework:
    """Resident bytes of a process that has loaded a backend's libraries and computed with them once.

    `low` and `expected` are the libraries alone, before and after the first kernels of a real step; `high` is all
    of `ft train` on a shipped model, its report with charts included. `source` says where that was measured.
    """

    backend: str
    low: int
    expected: int
    high: int
    source: str

    @property
    def packing(self) -> "Framework":
        """The same where a base is quantised by a library of its own."""
        return replace(self, low=self.low + PACKING, expected=self.expected + PACKING, high=self.high + PACKING)

    def measured(self, here: int) -> "Framework":
        """The same with the libraries' bytes as they were measured on this machine."""
        return replace(
            self,
            low=here,
            expected=here + self.expected - self.low,
            high=here + self.high - self.low,
            source="measured on this machine",
        )


_WHERE = "measured on Linux x86-64, Python 3.11, {}"
FRAMEWORKS = {
    framework.backend: framework
    for framework in (
        Framework("torch", 366 * MIB, 374 * MIB, 434 * MIB, _WHERE.format("torch 2.13 (CPU build), transformers 5.23")),
        Framework("reference", 37 * MIB, 50 * MIB, 118 * MIB, _WHERE.format("NumPy 2.4")),
    )
}


def framework_of(backend: str) -> Framework:
    """The documented figures of a backend.

    Raises:
        UsageError: there are no figures for this backend.
    """
    if backend not in FRAMEWORKS:
        raise UsageError(
            f"no memory figures were measured for backend {backend!r}", hint=f"choose one of: {', '.join(FRAMEWORKS)}"
        )
    return FRAMEWORKS[backend]
