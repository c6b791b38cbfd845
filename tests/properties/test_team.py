"""Laws of several processes that train one model: together they do what one does with all their rows, and nothing else.

The processes are played by threads that meet at a barrier; `tests/scenarios/test_launch.py` starts real ones.
"""

import dataclasses
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.backends.reference.backend import ReferenceBackend
from finetune.config import LoadedConfig, flatten, load_plan, resolve_processes
from finetune.data.batches import epoch_batches
from finetune.distributed.data_parallel import SingleProcess, check_same, data_parallel
from finetune.errors import ConfigError, LostProcessError, NonFiniteError, RefusedError
from finetune.events import Event, StepDone
from finetune.records import AdapterTarget, Batch, Optimization
from finetune.train import fine_tune
from finetune.training.loop import LoopPlan, steps_per_epoch, train
from finetune_strategies.datasets import token_rows
from finetune_strategies.profiles import examples
from support.thread_group import ThreadGroup, ThreadRank, good
from support.tiny_llamas import DROPPING, TARGET, make_rows, tiny
from support.workplace import ADAPTER, Death, settings, without_reload_check

pytestmark = pytest.mark.tools


@given(token_rows(), st.integers(1, 5), st.integers(1, 6), st.sampled_from([None, 16, 40]), st.integers(0, 3))
@example([*make_rows(1)], 2, 4, None, 0)
def test_deal_loses_no_row_and_gives_none_twice(
    rows: Any, batch_size: int, shares: int, pack_length: int | None, seed: int
) -> None:
    """The shares of a batch hold its sequences once each, whole, and none holds more than one process's batch size."""
    rows = [row for row in rows if pack_length is None or len(row.ids) <= pack_length]
    for batch in epoch_batches(rows, batch_size * shares, seed=seed, epoch=0, pack_length=pack_length):
        dealt = batch.shard(shares)
        assert len(dealt) == shares
        held = [sequence for share in dealt if share.rows for sequence in share.sequences]
        assert Counter(held) == Counter(batch.sequences)
        sizes = [len(share.sequences) if share.rows else 0 for share in dealt]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        assert sum(share.target_count for share in dealt) == batch.target_count


@dataclass(frozen=True)
class Job:
    """A short training: rows, who shares the work, and how."""

    rows: int
    batch_size: int
    shares: int
    accumulation: int = 1
    target: AdapterTarget = TARGET
    pack_length: int | None = None

    def events(self, session: Any, *, group: Any, shares: int, steps: int = 3) -> Iterator[Event]:
        """Train with batches of all shares together; the limit on gradients is one that bites."""
        session.attach(self.target, 0)
        session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=0.05))
        rows, size = make_rows(self.rows), self.batch_size * self.shares
        team = data_parallel(session, group, shares=shares, seed=7)
        plan = LoopPlan(steps, self.accumulation, 0.05, 1, "linear", 2)

        def batches(epoch: int) -> list[Batch]:
            return epoch_batches(rows, size, seed=7, epoch=epoch, pack_length=self.pack_length)

        return train(team, batches, [Batch(rows[:2])], plan)

    def alone(self) -> tuple[Any, list[Event]]:
        """One process with all the rows of a batch at once."""
        session = tiny()
        return session, timeless(self.events(session, group=SingleProcess(), shares=1))

    def shared(self, processes: int) -> list[tuple[Any, list[Event]]]:
        """So many processes that share the work."""

        def work(member: ThreadRank) -> tuple[Any, list[Event]]:
            session = tiny()
            return session, timeless(self.events(session, group=member, shares=self.shares))

        return good(ThreadGroup(processes).run(work))


def timeless(events: Iterator[Event]) -> list[Event]:
    """The events without what a clock says."""
    return [
        dataclasses.replace(event, seconds=0.0, rss=0) if isinstance(event, StepDone) else event for event in events
    ]


def assert_alike(session: Any, other: Any, *, tolerance: float) -> None:
    """Both have the same trained tensors, up to rounding."""
    for name, tensor in session.trainable.items():
        np.testing.assert_allclose(other.trainable[name], tensor, rtol=tolerance, atol=tolerance, err_msg=name)


def jobs() -> st.SearchStrategy[Job]:
    """Jobs whose rows seldom come out even; some have fewer rows than processes."""
    return st.builds(
        Job,
        st.integers(1, 9),
        st.integers(1, 3),
        st.integers(2, 4),
        st.integers(1, 2),
        pack_length=st.sampled_from([None, 20]),
    )


@given(jobs())
@example(Job(1, 1, 4))
@example(Job(7, 2, 2, 2))
@examples(1 / 3)
def test_team_trains_what_one_process_does_with_all_its_rows(job: Job) -> None:
    """N processes end in the adapter of one whose batches are N times as large; loss, norm and counts are its, too."""
    session, events = job.alone()
    everybody = job.shared(job.shares)
    for other, told in everybody:
        assert told == everybody[0][1]
        assert_alike(session, other, tolerance=1e-9)
        for event, theirs in zip(events, told, strict=True):
            for key, value in dataclasses.asdict(event).items():
                assert getattr(theirs, key) == pytest.approx(value, rel=1e-9, abs=1e-12), key


@given(jobs(), st.integers(1, 5))
@example(Job(7, 1, 4), 3)
@examples(1 / 3)
def test_team_of_any_size_does_the_same_work(job: Job, processes: int) -> None:
    """The shares of a batch, with all that they draw at random, come out the same whichever processes compute them."""
    job = dataclasses.replace(job, target=DROPPING)
    expected, events = job.shared(job.shares)[0]
    for session, told in job.shared(processes):
        assert_alike(expected, session, tolerance=1e-9)
        assert [event.loss for event in told if isinstance(event, StepDone)] == pytest.approx(
            [event.loss for event in events if isinstance(event, StepDone)], rel=1e-9
        )


@given(jobs(), st.integers(1, 4))
@example(Job(5, 1, 2, 2), 2)
@examples(1 / 3)
def test_team_deals_every_row_to_one_process_and_every_share_its_own_dice(job: Job, processes: int) -> None:
    """Each row of each step is computed once in all, with the whole step's weight, and no two shares draw alike."""
    lists: list[list[Any]] = [[] for _ in range(processes)]

    def work(member: ThreadRank) -> None:
        session, heard = tiny(), lists[member.rank]
        plain, reseed = session.accumulate, session.reseed
        session.accumulate = lambda batch, weight, *how: (heard.append((batch, weight)), plain(batch, weight, *how))[1]
        session.reseed = lambda seed: (heard.append(seed), reseed(seed))[1]
        list(job.events(session, group=member, shares=job.shares))

    good(ThreadGroup(processes).run(work))
    heard = [each for said in lists for each in said]
    seeds = [each for each in heard if isinstance(each, int)]
    calls = [each for each in heard if not isinstance(each, int)]
    assert len(seeds) == len(set(seeds)) == len(calls)
    size, found = job.batch_size * job.shares, Counter[tuple[Any, float]]()
    for batch, weight in calls:
        found.update((row.where, weight) for row in batch.rows)
    windows, epoch = [], 0
    while len(windows) < 3:
        batches = epoch_batches(make_rows(job.rows), size, seed=7, epoch=epoch, pack_length=job.pack_length)
        windows += [batches[start : start + job.accumulation] for start in range(0, len(batches), job.accumulation)]
        epoch += 1
    expected = Counter[tuple[Any, float]]()
    for window in windows[:3]:
        weight = 1 / sum(batch.target_count for batch in window)
        expected.update((row.where, weight) for batch in window for row in batch.rows)
    assert found == expected


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_team_stops_in_every_process_where_one_loss_is_not_finite(rank: int) -> None:
    """A loss that is NaN in one process ends all at that step, in the same words, weights untouched."""
    job = Job(9, 1, 3)

    def work(member: ThreadRank) -> Any:
        session = tiny()
        events, plain = job.events(session, group=member, shares=3), session.accumulate
        next(step for step in events if isinstance(step, StepDone))
        kept = session.fingerprints()
        if member.rank == rank:
            session.accumulate = lambda batch, weight, *how: plain(batch, weight, *how) * math.nan
        with pytest.raises(NonFiniteError, match="at step 2") as caught:
            list(events)
        assert session.fingerprints() == kept
        return str(caught.value)

    assert len(set(good(ThreadGroup(3).run(work)))) == 1


def test_team_of_one_is_the_session_itself() -> None:
    """Without others, nothing stands between the loop and the session: a run alone is what it always was."""
    session = tiny()
    assert data_parallel(session, SingleProcess(), shares=1, seed=0) is session
    assert data_parallel(session, SingleProcess(), shares=2, seed=0) is not session


@given(st.integers(2, 5), st.data())
@examples(1 / 3)
def test_processes_that_do_not_see_the_same_are_refused(size: int, data: st.DataObject) -> None:
    """Where one process has other settings, files or checkpoints, no process trains, and it is told what differs."""
    odd = data.draw(st.integers(0, size - 1))

    def work(member: ThreadRank) -> None:
        check_same(member, {"seed": 0, "weights": "ab" if member.rank != odd else "ac", "step": 4})

    def same(member: ThreadRank) -> None:
        check_same(member, {"seed": 0, "weights": "ab", "step": 4})

    results = ThreadGroup(size).run(work)
    assert all(isinstance(result, RefusedError | LostProcessError) for result in results)
    refused = [result for result in results if isinstance(result, RefusedError)]
    assert refused
    assert all("weights" in str(error) and "seed" not in str(error).split("\n")[0] for error in refused)
    assert ThreadGroup(size).run(same) == [None] * size


def job_of(model: Path, data: Path, **changes: Any) -> LoadedConfig:
    """A run with everything in it that a team could forget."""
    demanding = {
        "training__gradient_accumulation_steps": 2,
        "training__packing": True,
        "training__save_every": 2,
        "adapter__dropout": 0.3,
        "data__valid_fraction": 0.2,
        "tokens__max_length": 64,
        "training__evaluate_every": 2,
        "training__epochs": 3.0,
        "training__max_grad_norm": 0.05,
        "training__batch_size": 1,
        "evaluation__questions": 1,
    }
    return settings(model, data, **{**demanding, **changes})


def fine_tune_together(loaded: LoadedConfig, processes: int, output: Path, **how: Any) -> list[Any]:
    """A whole run by so many processes in one run folder."""
    deaths = how.pop("deaths", {})

    def work(member: ThreadRank) -> Any:
        joined.member, heard = member, []

        def listen(event: Event) -> None:
            heard.append(event)
            if len(heard) > deaths.get(member.rank, 10**9):
                raise Death

        folder, record = fine_tune(loaded, output=output, listener=listen, **how)
        return folder, record, heard

    joined = threading.local()
    # One patch serves all threads: each finds its own member where it looks.
    with without_reload_check(), patch.object(ReferenceBackend, "join", lambda backend: joined.member):
        return ThreadGroup(processes).run(work)


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], int]:
    """A run by two processes that nobody stopped, and how many events it told."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    _, record, heard = good(fine_tune_together(job_of(model, data, training__packing=False), 2, folder))[0]
    return folder, record, len(heard)


def test_only_the_first_process_writes_judges_and_tells(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run folder, each step in its log once, one manifest; the other processes tell no event and leave no file."""
    monkeypatch.chdir(tmp_path)
    loaded = job_of(model, data, judge__control="always", training__packing=False)
    first, second, third = good(fine_tune_together(loaded, 3, tmp_path / "run"))
    assert first[1]["status"] == "complete"
    assert first[1]["scores"]["learning"]["control"] is not None
    assert {entry["key"]: entry["value"] for entry in first[1]["plan"]}["training.processes"] == 3
    for other in (second, third):
        assert other[1] == {}
        assert other[2] == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "StepDone"]
    kept = first[1]["data"]["train"]["kept"]
    assert steps == list(range(1, 3 * steps_per_epoch(kept, 3, 2) + 1))
    assert list((tmp_path / "run").rglob("*.part")) == []


def test_run_of_two_processes_is_the_run_of_one_with_twice_the_batch(model: Path, data: Path, tmp_path: Path) -> None:
    """Steps, rates, losses, held-out losses, counts and answers of a whole run are those of one process alone."""
    two = good(fine_tune_together(job_of(model, data, adapter__dropout=0.0), 2, tmp_path / "two"))[0][1]
    loaded = job_of(model, data, adapter__dropout=0.0, training__batch_size=2)
    with without_reload_check():
        one = fine_tune(loaded, output=tmp_path / "one")[1]
    for part in ("train", "fixed", "held_out"):
        assert len(one["losses"][part]) == len(two["losses"][part]) > 0
        for mine, theirs in zip(one["losses"][part], two["losses"][part], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)
    assert one["data"] == two["data"]
    assert one["scores"] == two["scores"]


def test_team_derives_what_one_process_derives(model: Path, data: Path, tmp_path: Path) -> None:
    """Learning rate and epochs that nobody set are those of one process with the batch of all, in each process."""
    open_ = {"training__learning_rate": None, "training__epochs": None, "training__packing": False}
    (folder, *_), _ = good(fine_tune_together(job_of(model, data, **open_), 2, tmp_path / "team"))
    with without_reload_check():
        alone, _ = fine_tune(job_of(model, data, **open_, training__batch_size=2), output=tmp_path / "alone")
    team, one = (load_plan(each / "plan.yaml") for each in (folder, alone))
    for key in ("training.learning_rate", "training.epochs"):
        assert team.origins[key] == one.origins[key] == "derived"
        assert flatten(team.config)[key] == flatten(one.config)[key] is not None


def test_first_process_says_when_all_stop_and_what_is_kept(model: Path, data: Path, tmp_path: Path) -> None:
    """Where the held-out loss rises, two processes stop at the step, keep the one and train the control as one does."""
    rising = {
        "adapter__dropout": 0.0,
        "training__learning_rate": 1.5,
        "training__schedule": "constant",
        "training__load_best_model": True,
        "training__early_stopping_patience": 2,
        "training__evaluate_every": 1,
        "training__epochs": 9.0,
        "training__max_grad_norm": 1.0,
        "judge__control": "always",
    }
    both = good(fine_tune_together(job_of(model, data, **rising), 2, tmp_path / "two"))
    with without_reload_check():
        one = fine_tune(job_of(model, data, **rising, training__batch_size=2), output=tmp_path / "one")[1]
    two = both[0][1]
    best, same = two["training"].pop("best"), one["training"].pop("best")
    assert best == pytest.approx(same, rel=1e-9)
    assert two["training"] == one["training"]
    assert 0 < two["training"]["kept_step"] < two["training"]["steps"] < two["training"]["planned_steps"]
    assert two["scores"] == one["scores"]
    assert two["scores"]["learning"]["control"] is not None
    assert both[1][1] == {}


@given(st.floats(0, 0.99), st.sampled_from([2, 3, 1]))
@example(0.5, 2)
@example(0.7, 3)
@examples(1 / 4)
def test_team_stopped_anywhere_goes_on_in_any_number_of_processes(
    model: Path, data: Path, whole: tuple[Path, dict[str, Any], int], death: float, processes: int
) -> None:
    """When the first process dies the others end, too; any number goes on, as many to the same bytes."""
    folder, record, events = whole
    with TemporaryDirectory() as name:
        output = Path(name) / "run"
        loaded = job_of(model, data, training__packing=False)
        results = fine_tune_together(loaded, 2, output, deaths={0: int(death * events)})
        assert isinstance(results[0], Death)
        assert isinstance(results[1], LostProcessError) or results[1][1] == {}
        begun = (output / "plan.yaml").exists()
        if begun:
            plan = load_plan(output / "plan.yaml")
            loaded = LoadedConfig(plan.config, plan.origins)
            assert loaded.config.training.processes == 2
        found = good(fine_tune_together(loaded, processes if begun else 2, output, resume=begun))[0][1]
        assert found["data"] == record["data"]
        assert found["scores"] == record["scores"]
        if processes > 1:
            assert (output / ADAPTER).read_bytes() == (folder / ADAPTER).read_bytes()
            assert found["losses"] == record["losses"]
        for mine, theirs in zip(found["losses"]["train"], record["losses"]["train"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9)


def test_number_of_processes_must_be_the_one_that_was_started(model: Path, data: Path) -> None:
    """A setting that asks for other processes than there are is refused, but for a run that is resumed."""
    asked = settings(model, data, training__processes=2)
    with pytest.raises(ConfigError, match="processes is 2, but 1 process was started"):
        resolve_processes(asked, 1, resume=False)
    assert resolve_processes(asked, 1, resume=True) is resolve_processes(asked, 2, resume=False) is asked
    found = resolve_processes(settings(model, data), 3, resume=False)
    assert found.config.training.processes == 3
    assert found.origins["training.processes"] == "derived"
