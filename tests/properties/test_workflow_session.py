"""Laws of what a whole run asks of a session: what is set is what is done, whatever else is set."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from hypothesis import example, given
from hypothesis import strategies as st

from finetune.backends.reference.session import ReferenceSession
from finetune.records import AdapterTarget, Batch, Optimization, TokenizedRow
from finetune.train import fine_tune
from finetune.training.schedule import learning_rate_at
from finetune_strategies.profiles import examples
from support.workplace import make_data, settings, without_reload_check

ROWS = 11
VERBS = ("attach", "prepare_updates", "accumulate", "update", "loss", "generate")


@dataclass
class Heard:
    """What the sessions of a run were asked to do, in order, and what they were when they had been asked to attach."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    fresh: list[dict[str, str]] = field(default_factory=list)

    def given(self, verb: str) -> list[Any]:
        """What each call of a verb was given."""
        return [what for name, what in self.calls if name == verb]

    def steps(self) -> list[list[Batch]]:
        """The batches that each update was made of."""
        found: list[list[Batch]] = [[]]
        for name, what in self.calls:
            if name == "accumulate":
                found[-1].append(what[0])
            elif name == "update":
                found.append([])
        assert found.pop() == []
        return found

    def lines(self) -> list[int]:
        """The line of each row that was trained on, in the order in which it was."""
        return [line_of(row) for step in self.steps() for batch in step for row in batch.rows]


def line_of(row: TokenizedRow) -> int:
    """The line of the data file that a row stood on."""
    return int(row.where.rpartition(":")[2])


@contextmanager
def listening() -> Iterator[Heard]:
    """Within this context every session of the reference backend tells what it is asked; it does it all the same."""
    heard = Heard()

    def telling(verb: str) -> Any:
        plain = getattr(ReferenceSession, verb)

        def told(session: ReferenceSession, *what: Any) -> Any:
            heard.calls.append((verb, what))
            answer = plain(session, *what)
            heard.fresh += [session.fingerprints()] if verb == "attach" else []
            return answer

        return patch.object(ReferenceSession, verb, told)

    with ExitStack() as stack:
        for verb in VERBS:
            stack.enter_context(telling(verb))
        yield heard


def run(model: Path, chosen: dict[str, Any]) -> Heard:
    """A fine-tune of eleven rows with these settings: what its sessions were asked to do."""
    with TemporaryDirectory() as name, without_reload_check(), listening() as heard:
        data = make_data(Path(name) / "rows.jsonl", ROWS)
        changes = {key.replace(".", "__"): value for key, value in chosen.items()}
        fine_tune(settings(model, data, **changes), output=Path(name) / "run")
    return heard


CHOICES: dict[str, list[Any]] = {
    "adapter.rank": [3, 1],
    "adapter.alpha": [7.0, 0.5],
    "adapter.dropout": [0.3, 0.0],
    "adapter.target_modules": [["v_proj", "down_proj"], ["q_proj"]],
    "data.valid_fraction": [0.3, 0.0],
    "training.epochs": [2.0, 3.0, 1.5],
    "training.batch_size": [2, 3, 4],
    "training.gradient_accumulation_steps": [1, 2, 3],
    "training.packing": [True, False],
    "training.learning_rate": [0.02, 1e-4],
    "training.max_grad_norm": [0.3, 2.0],
    "training.schedule": ["linear", "cosine", "constant"],
    "training.warmup_fraction": [0.4, 0.0],
    "training.weight_decay": [0.1, 0.0],
    "training.seed": [0, 1, 2**32 - 1],
    "training.evaluate_every": [1, 3],
    "evaluation.questions": [0, 2],
}


def choices() -> st.SearchStrategy[dict[str, Any]]:
    """Settings that mean something together, in every combination; packing is on in half of them."""
    return st.fixed_dictionaries({key: st.sampled_from(values) for key, values in CHOICES.items()})


@given(choices())
@example({key: values[0] for key, values in CHOICES.items()} | {"training.gradient_accumulation_steps": 2})
@example({key: values[-1] for key, values in CHOICES.items()})
@examples(1 / 5)
def test_workflow_asks_of_the_session_what_is_set_whatever_else_is(model: Path, chosen: dict[str, Any]) -> None:
    """Adapter, seed, optimizer, rates, batch sizes, accumulation and packing are those set, in any company."""
    heard = run(model, chosen)
    adapter = {key.split(".")[1]: value for key, value in chosen.items() if key.startswith("adapter.")}
    training = {key.split(".")[1]: value for key, value in chosen.items() if key.startswith("training.")}
    target = AdapterTarget(adapter["rank"], adapter["alpha"], adapter["dropout"], tuple(adapter["target_modules"]))
    assert heard.given("attach") == [(target, training["seed"])]
    [(optimization,)] = heard.given("prepare_updates")
    assert optimization == Optimization(training["weight_decay"], training["max_grad_norm"])
    steps = heard.steps()
    assert max(len(batch.sequences) for step in steps for batch in step) <= training["batch_size"]
    assert max(map(len, steps)) <= training["gradient_accumulation_steps"]
    assert any(batch.packed for step in steps for batch in step) == training["packing"]
    rates = [rate for (rate,) in heard.given("update")]
    warmup = round(training["warmup_fraction"] * len(steps))
    assert rates == [
        learning_rate_at(
            number,
            len(steps),
            learning_rate=training["learning_rate"],
            warmup_steps=warmup,
            schedule=training["schedule"],
        )
        for number in range(1, len(steps) + 1)
    ]
    if not training["packing"]:
        rows = len(set(heard.lines()))
        per_epoch = math.ceil(math.ceil(rows / training["batch_size"]) / training["gradient_accumulation_steps"])
        assert len(steps) == round(training["epochs"] * per_epoch)


def test_workflow_seed_reaches_everything_that_is_drawn(model: Path) -> None:
    """The fresh adapter, the order of rows, what is held out and what is asked: each is the seed's, 0 too."""

    def drawn(seed: int) -> dict[str, Any]:
        heard = run(model, {"training.seed": seed, "evaluation.questions": 3})
        split = run(model, {"training.seed": seed, "data.valid_fraction": 0.4})
        return {
            "adapter": {name: mark for name, mark in heard.fresh[0].items() if "lora_A" in name},
            "order": heard.lines(),
            "held out": set(split.lines()),
            "asked": heard.given("generate")[0][0],
        }

    first, again, other = (drawn(seed) for seed in (0, 0, 1))
    assert first == again
    assert len(first["asked"]) == 3
    assert len(first["adapter"]) == 7
    assert [name for name, what in other.items() if what == first[name]] == []
