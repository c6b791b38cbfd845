"""Laws of the proof: a planted fault is killed in a process of its own, and what changes nothing is said to."""

import dataclasses
import os
import threading
from pathlib import Path

import pytest

from finetune.errors import UsageError
from finetune.report.matrix import render_matrix
from finetune.verify.faults import fault as fault_room
from finetune.verify.faults.fault import Fault, PlantingError, faults, hits, plant
from finetune.verify.prove import campaign
from finetune.verify.prove import job as job_room
from finetune.verify.prove.baseline import baseline_text, lost_kills, read_baseline
from finetune.verify.prove.campaign import Campaign, Proof, Spread, by_stage, chosen_faults, prove, result_of, run_jobs
from finetune.verify.prove.job import FaultRun, Job, RecordingSubject, do_job, run_job
from finetune.verify.prove.kept import KeptRuns
from finetune.verify.subjects.subject import About, InProcessSubject
from support.sessions import need

LAWS = ("batches.cover", "mask.answers")
NOBODY = Fault("A000", "none.none", "", "Nothing goes wrong.", lambda: None)


def run_of(words: dict[str, str], **more: object) -> FaultRun:
    """What came of a process in which a fault was called."""
    return dataclasses.replace(FaultRun("A000", 0, words=words, hits={"a.b": 1}), **more)  # type: ignore[arg-type]


CLEAN = run_of({"a.a": "passed", "b.b": "failed", "c.c": "passed"}, answers={"1": "x", "2": "y"}, hits={})


def test_fault_is_killed_by_broken_laws_alone() -> None:
    """Killed by what is broken and holds in the clean run; else it changed an answer and survived, or nothing."""
    killed = result_of(NOBODY, run_of({"a.a": "failed", "b.b": "failed", "c.c": "error"}), CLEAN)
    assert (killed.status, killed.laws) == ("killed", ("a.a",))
    same = run_of({"a.a": "passed", "b.b": "failed", "c.c": "passed"}, answers={"1": "x", "3": "new"})
    assert result_of(NOBODY, same, CLEAN).status == "equivalent"
    other = dataclasses.replace(same, answers={"1": "changed"})
    assert result_of(NOBODY, other, CLEAN).status == "survived"


@pytest.mark.parametrize("word", ["error", "inconclusive", "not applicable"])
def test_fault_that_no_law_judges_is_an_error(word: str) -> None:
    """A law that ends without evidence kills nothing, and the reason names it."""
    result = result_of(NOBODY, run_of({"a.a": word, "c.c": "passed"}, answers={"1": "changed"}), CLEAN)
    assert (result.status, result.laws) == ("error", ())
    assert f"a.a ({word})" in result.reason


def test_fault_that_is_never_called_is_an_error() -> None:
    """What was never called was not tried; it is equivalent only where it changed nothing and is of a higher tier."""
    higher = dataclasses.replace(NOBODY, tier=2)
    for fault, words, answers, status in (
        (NOBODY, {"a.a": "passed"}, {}, "error"),
        (NOBODY, {"a.a": "failed"}, {}, "error"),
        (higher, {"a.a": "passed"}, {"1": "changed"}, "error"),
        (higher, {"a.a": "passed"}, {"1": "x"}, "equivalent"),
    ):
        result = result_of(fault, run_of(words, answers=answers, hits={}), CLEAN)
        assert (result.status, result.laws) == (status, ())
        assert "calls what was planted" in result.reason or "was never called" in result.reason


def test_fault_whose_process_ends_is_an_error() -> None:
    """A process that hangs or ends says nothing of the laws."""
    result = result_of(NOBODY, run_of({}, error="it hung"), CLEAN)
    assert (result.status, result.reason) == ("error", "it hung")


def test_planting_that_raises_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault whose target is gone is told as what it is, and no law is judged."""

    def gone() -> None:
        plant(dataclasses, "nowhere", lambda right: right())

    monkeypatch.setattr(job_room, "faults", lambda: {"A000": dataclasses.replace(NOBODY, apply=gone)})
    run = do_job(Job(fault="A000", laws=LAWS), tmp_path)
    assert run.error.startswith("it could not be planted: PlantingError: dataclasses.nowhere is gone")
    assert not run.words
    assert result_of(NOBODY, run, CLEAN).status == "error"


def test_planting_of_a_private_name_is_refused() -> None:
    """Only public names are planted: nobody promises that a private one stays."""
    with pytest.raises(PlantingError, match=r"dataclasses\._fields_in_init_order is private"):
        plant(dataclasses, "_fields_in_init_order", lambda right: right())


def test_lost_kill_is_named_with_its_law(tmp_path: Path) -> None:
    """A law that killed a fault in the baseline and holds now is told; one that is new is not."""
    fault = next(iter(faults().values()))
    clean = run_of({"a.a": "passed", "b.b": "passed"})
    both, first = (
        Proof(1, "reference", ("a.a", "b.b"), (clean,), (result_of(fault, run_of(words), clean),), 1.0)
        for words in ({"a.a": "failed", "b.b": "failed"}, {"a.a": "failed", "b.b": "passed"})
    )
    path = tmp_path / "kill-matrix.json"
    path.write_text(baseline_text(both), encoding="utf-8")
    assert lost_kills(both, read_baseline(path, Campaign())) == []
    assert lost_kills(first, read_baseline(path, Campaign())) == [
        f"{fault.id} {fault.slug} is killed by b.b no more (killed)"
    ]
    path.write_text(baseline_text(first).replace(fault.id, "A9999"), encoding="utf-8")
    assert lost_kills(both, read_baseline(path, Campaign())) == ["A9999, which the baseline has, is no fault any more"]
    with pytest.raises(UsageError, match="is of another campaign"):
        read_baseline(path, Campaign(tier=2))
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="is no baseline"):
        read_baseline(path, Campaign())


def test_proof_without_a_fault_or_with_a_survivor_does_not_pass() -> None:
    """Only a campaign in which every fault was killed, and no clean run called broken, passes."""
    clean = run_of({"a.a": "passed"})
    killed = result_of(NOBODY, run_of({"a.a": "failed"}), clean)
    survived = dataclasses.replace(killed, status="survived")
    beyond = dataclasses.replace(survived, fault=dataclasses.replace(NOBODY, tier=2))
    alarm = run_of({"a.a": "failed"})
    for results, runs, passes in (
        ((killed,), (clean,), True),
        ((killed, beyond), (clean,), True),
        ((), (clean,), False),
        ((killed, survived), (clean,), False),
        ((killed,), (clean, alarm), False),
    ):
        assert Proof(1, "reference", ("a.a",), runs, results, 1.0).passes == passes
    assert by_stage((killed, survived)) == {"none": (1, 2)}


def test_law_that_caught_nothing_is_named() -> None:
    """Where every law was asked, those that no fault broke are told, in words and in the picture; else none is."""
    clean = run_of({"a.a": "passed", "b.b": "passed"})
    result = result_of(NOBODY, run_of({"a.a": "failed", "b.b": "passed"}), clean)
    whole, part = (Proof(1, "reference", ("a.a", "b.b"), (clean,), (result,), 1.0, stop_after) for stop_after in (0, 1))
    assert (whole.idle, part.idle) == (("b.b",), None)
    pages = [render_matrix(proof.as_dict()) for proof in (whole, part)]
    assert ["killed no fault: b.b" in page for page in pages] == [True, False]
    for page in pages:
        assert page.count('class="shade4" title="none.none: a.a">1</td>') == 1
        assert "A000 none.none" in page
        assert "1 of 1" in page


def test_marks_tell_answers_apart_by_what_is_in_their_files(tmp_path: Path) -> None:
    """Two answers that name files of other places are alike when the files are."""
    contents = iter([b"one", b"one", b"two"])

    def answer(number: int) -> dict[str, str]:
        path = tmp_path / f"{number}-{os.urandom(4).hex()}"
        path.write_bytes(next(contents))
        return {"file": str(path)}

    marks = []
    for _ in range(3):
        door = RecordingSubject(InProcessSubject(About("", {}, {}), {"loss": answer}, []), tmp_path)
        door.ask("loss", {"number": 1})
        marks.append(door.marks)
    assert marks[0] == marks[1] != marks[2]
    assert [len(each) for each in marks] == [1, 1, 1]


def test_planting_takes_the_place_of_what_is_right_and_is_counted() -> None:
    """A planted fault is given what is right, and how often it was come by is known."""

    class Adder:
        def add(self, one: int, two: int) -> int:
            return one + two

    plant(Adder, "add", lambda right, self, one, two: right(self, one, two) + 1)
    assert Adder().add(1, two=2) == 4
    assert hits["Adder.add"] == 1


def test_fault_that_does_not_exist_is_refused() -> None:
    """A fault is chosen by id or by name."""
    known = next(iter(faults().values()))
    assert chosen_faults([known.slug]) == chosen_faults([known.id])
    with pytest.raises(UsageError, match="there is no fault 'A9999'"):
        chosen_faults(["A9999"])


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_fault_can_be_planted_where_it_says(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a fault replaces is there and public; all but a few are no matter of one backend's inside."""
    need(backend)
    # What is planted is taken out again when the test ends.
    monkeypatch.setattr(fault_room, "setattr", monkeypatch.setattr, raising=False)
    here = chosen_faults(backend=backend)
    assert len(here) >= len(faults()) - 20
    for fault in here:
        fault.plant_in(backend)
    elsewhere = next(each for each in faults().values() if each.backends == ("reference",))
    with pytest.raises(UsageError, match=f"{elsewhere.id} cannot be planted in {backend}"):
        chosen_faults([elsewhere.id], backend)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_fault_of_loop_mask_and_resume_is_killed_in_every_backend(backend: str) -> None:
    """What is planted in the session of the backend under judgement is killed by the law that kills it in ours."""
    need(backend)
    pairs = {"A064": "loss.oracle", "A120": "train.oracle", "A164": "resume.same"}
    clean = run_job(Job(backend=backend, laws=tuple(pairs.values())))
    assert set(clean.words.values()) == {"passed"}
    for id, law in pairs.items():
        assert result_of(faults()[id], run_job(Job(fault=id, backend=backend, laws=(law,))), clean).laws == (law,)


def test_dropped_batch_is_killed_in_a_process_of_its_own() -> None:
    """A027, the last batch that is never trained on, breaks the law of coverage with at most three rows."""
    done = run_job(Job(fault="A027", laws=LAWS, shrink_seconds=60))
    assert not done.error
    assert (done.words["batches.cover"], done.words["mask.answers"]) == ("failed", "passed")
    assert done.first is not None
    assert len(done.first["case"]["rows"]) <= 3
    assert done.hits
    assert done.seconds_to_first is not None


def test_clean_plantings_answer_alike_wherever_they_lie() -> None:
    """Two processes without a fault give the same answer to every question that both were asked."""
    laws = ("template.bytes", "mask.answers", "store.keeps", "resume.same", "safety.template")
    one, two = (run_job(Job(laws=laws)).answers for _ in range(2))
    assert len(one) > 30
    assert [question for question in one.keys() & two.keys() if one[question] != two[question]] == []


def test_planting_that_hangs_is_ended() -> None:
    """A process that does not end in time is an error."""
    done = run_job(Job(laws=LAWS), patience=0.01)
    assert "did not end within" in done.error


def test_planting_has_its_time_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is what a processor did for it, and the clock only for one that waits without end."""
    monkeypatch.setattr(job_room, "_IDLE", 10_000)
    monkeypatch.setattr(job_room, "processor_seconds", lambda number: 0.0)
    assert not run_job(Job(laws=LAWS), patience=0.01).error
    monkeypatch.setattr(job_room, "processor_seconds", lambda number: 1.0)
    assert "did not end within 1 s of a processor" in run_job(Job(laws=LAWS), patience=0.01).error


def test_planting_is_ended_with_its_campaign() -> None:
    """Who sets the event ends the process, and that is told as what it is."""
    stop = threading.Event()
    stop.set()
    assert run_job(Job(laws=LAWS), stop=stop).error == "the campaign was ended"


def test_campaign_that_is_left_ends_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for no more results leaves no job that runs to its end."""
    begun, ended = threading.Event(), []

    def job(job: Job, *, stop: threading.Event) -> FaultRun:
        if job.seed:
            begun.set()
            ended.append(stop.wait(60))
        return FaultRun("", job.seed)

    monkeypatch.setattr(campaign, "run_job", job)
    jobs = run_jobs([Job(seed=0), Job(seed=1)], Spread(workers=2))
    assert next(jobs).seed == 0
    assert begun.wait(60)
    jobs.close()  # type: ignore[attr-defined]
    assert ended == [True]


def test_campaign_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is kept is not done again: but errors are, a line that was cut off, and all of it once the code is other."""
    asked: list[int] = []
    errors = {1: "it was ended"}

    def answered(job: Job, *, stop: threading.Event) -> FaultRun:
        asked.append(job.seed)
        return FaultRun("", job.seed, {"mask.answers": "passed"}, error=errors.get(job.seed, ""))

    monkeypatch.setattr(campaign, "run_job", answered)
    jobs, file = [Job(seed=seed) for seed in range(4)], tmp_path / "proof" / "runs.jsonl"
    first = list(run_jobs(jobs[:3], Spread(), KeptRuns(file)))
    with file.open("a") as cut:
        cut.write('\n{"code": "0123')
    errors.clear()
    asked.clear()
    kept = KeptRuns(file)
    assert (len(kept), kept.dropped) == (2, 1)
    again = list(run_jobs(jobs, Spread(), kept))
    assert asked == [1, 3]
    assert [run.seed for run in again] == [0, 1, 2, 3]
    assert [again[0], again[2]] == [first[0], first[2]]
    assert len(KeptRuns(file)) == 4
    monkeypatch.setattr("finetune.verify.prove.kept.version", lambda name: "another")
    assert (len(KeptRuns(file)), KeptRuns(file).dropped) == (0, 5)


def test_no_more_laws_are_asked_than_enough() -> None:
    """When enough laws have caught a fault, the others are not asked."""
    done = run_job(Job(fault="A027", laws=LAWS, stop_after=1))
    assert list(done.words) == ["batches.cover"]


def test_campaign_is_the_same_on_ray() -> None:
    """Spread over a local Ray cluster the campaign comes to the same."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'finetune-suite[ray]'")
    jobs = [Job(laws=LAWS, times=0.2), Job(fault="A027", laws=LAWS, times=0.2)]
    there, here = (list(run_jobs(jobs, spread)) for spread in (Spread("ray"), Spread()))
    assert [each.words for each in there] == [each.words for each in here]
    # Of the planted one the smallest case is looked for as long as there is time.
    assert there[0].answers == here[0].answers


def test_campaign_tells_of_each_fault() -> None:
    """A small campaign, whole: a clean run, one fault, and what each came to."""
    told: list[str] = []
    found = prove(chosen_faults(["A027"]), Campaign(seeds=1), tell=told.append)
    assert told[0] == "clean, seed 0: passed"
    assert told[1].startswith("A027 data.last_batch_dropped: killed by batches.cover")
    assert found.passes
    assert found.as_dict()["counts"] == {"killed": 1, "survived": 0, "equivalent": 0, "error": 0}
