"""A tracker that keeps what it is told in memory, as a tool of its own would keep it: it outlives the run."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class SilentTracker:
    """Every step with its numbers, in the order told, and how the run ended."""

    place: str = "memory"
    last_step: int = -1
    steps: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    ended: list[tuple[dict[str, str], dict[str, float], bool]] = field(default_factory=list)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keep one step."""
        self.steps.append((step, dict(numbers)))

    def finish(self, words: Mapping[str, str], numbers: Mapping[str, float], *, complete: bool) -> None:
        """Keep how the run ended."""
        self.ended.append((dict(words), dict(numbers), complete))
