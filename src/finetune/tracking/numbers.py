"""Turns the events of a run into what trackers log: numbers by step, and a summary at the end."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from finetune.events import Event, FixedLoss, HeldOutLoss, RunJudged, StepDone, StoppedEarly

Numbers = dict[str, float]


@dataclass
class Digest:
    """Gathers the numbers of a step until it is done; `words` and `numbers` are for the end of the run."""

    words: dict[str, str] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=dict)
    _open: dict[int, Numbers] = field(default_factory=dict)

    def take(self, event: Event) -> Iterator[tuple[int, Numbers]]:
        """Take in one event; gives every step that is complete now, in order, once."""
        if isinstance(event, StepDone):
            self._open.setdefault(event.step, {}).update(
                {
                    "train/loss": event.loss,
                    "train/learning_rate": event.learning_rate,
                    "train/grad_norm": event.grad_norm,
                    "train/epoch": event.epoch,
                    "train/tokens": float(event.tokens),
                    "train/tokens_per_second": event.tokens_per_second,
                    "train/rss_bytes": float(event.rss),
                }
            )
            yield from self.rest()
        elif isinstance(event, HeldOutLoss):
            self._open.setdefault(event.step, {})["held_out/loss"] = event.loss
        elif isinstance(event, FixedLoss) and event.step == 0:
            self._open.setdefault(0, {})["fixed/loss"] = event.loss
        elif isinstance(event, FixedLoss):
            # Of the weights that are kept, which may be those of an earlier step than the last one told.
            self.numbers |= {"final/fixed_loss": event.loss, "final/kept_step": float(event.step)}
        elif isinstance(event, StoppedEarly):
            self.words["ended"] = f"stopped early at step {event.step} of {event.total_steps}"
        elif isinstance(event, RunJudged):
            self.words |= {
                # Plain strings: wandb writes an enumeration's name instead of its value.
                "outcome": str(event.outcome),
                **{f"verdict/{name}": str(outcome) for name, outcome in event.verdicts.items()},
            }

    def rest(self) -> Iterator[tuple[int, Numbers]]:
        """The steps whose numbers have not been given yet, in order."""
        for step in sorted(self._open):
            yield step, self._open.pop(step)
