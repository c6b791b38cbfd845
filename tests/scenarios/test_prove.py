"""Laws of the proof: a planted fault is killed in a process of its own, and what changes nothing is said to."""

import dataclasses
import os
import threading
from pathlib import Path

import pytest

from finetune.errors import UsageError
from finetune.report.matrix import render_matrix
from finetune.verify.doors.door import About, InsideDoor
from finetune.verify.faults.fault import Fault, faults, plant, reached
from finetune.verify.prove import campaign
from finetune.verify.prove.campaign import Proof, Spread, by_stage, chosen_faults, fate_of, prove, run_jobs
from finetune.verify.prove.job import Job, MarkingDoor, Planted, run_job

LAWS = ("batches.cover", "mask.answers")
NOBODY = Fault("A000", "none.none", "", "Nothing goes wrong.", lambda: None)


def planted(words: dict[str, str], **more: object) -> Planted:
    """What came of a planting."""
    return dataclasses.replace(Planted("A000", 0, words=words), **more)  # type: ignore[arg-type]


def test_fate_is_told_from_the_clean_run() -> None:
    """Killed by what the clean run holds; else it changed an answer and survived, or it changed nothing."""
    clean = planted({"a.a": "holds", "b.b": "broken", "c.c": "holds"}, answers={"1": "x", "2": "y"})
    fate = fate_of(NOBODY, planted({"a.a": "broken", "b.b": "broken", "c.c": "error"}), clean)
    assert (fate.outcome, fate.laws) == ("killed", ("a.a", "c.c"))
    gone = fate_of(NOBODY, planted({"a.a": "not applicable", "b.b": "broken", "c.c": "holds"}), clean)
    assert (gone.outcome, gone.laws) == ("killed", ("a.a",))
    same = planted({"a.a": "holds", "b.b": "broken", "c.c": "holds"}, answers={"1": "x", "3": "new"})
    assert fate_of(NOBODY, same, clean).outcome == "inert"
    other = dataclasses.replace(same, answers={"1": "changed"})
    assert fate_of(NOBODY, other, clean).outcome == "inert", "nothing that was planted was come by"
    met = dataclasses.replace(other, reached={"a.b": 1})
    assert fate_of(NOBODY, met, clean).outcome == "survived"
    assert fate_of(NOBODY, planted({}, trouble="it hung"), clean).outcome == "killed"


def test_proof_without_a_fault_or_with_a_survivor_does_not_pass() -> None:
    """Only a campaign in which every fault was killed, and no clean run called broken, passes."""
    clean = planted({"a.a": "holds"})
    killed = fate_of(NOBODY, planted({"a.a": "broken"}), clean)
    survived = dataclasses.replace(killed, outcome="survived")
    beyond = dataclasses.replace(survived, fault=dataclasses.replace(NOBODY, tier=2))
    alarm = planted({"a.a": "broken"})
    for fates, runs, passes in (
        ((killed,), (clean,), True),
        ((killed, beyond), (clean,), True),
        ((), (clean,), False),
        ((killed, survived), (clean,), False),
        ((killed,), (clean, alarm), False),
    ):
        assert Proof(1, "reference", ("a.a",), runs, fates, 1.0).passes == passes
    assert by_stage((killed, survived)) == {"none": (1, 2)}


def test_law_that_caught_nothing_is_named() -> None:
    """Where every law was asked, those that no fault broke are told, in words and in the picture; else none is."""
    clean = planted({"a.a": "holds", "b.b": "holds"})
    fate = fate_of(NOBODY, planted({"a.a": "broken", "b.b": "holds"}), clean)
    whole, part = (Proof(1, "reference", ("a.a", "b.b"), (clean,), (fate,), 1.0, enough) for enough in (0, 1))
    assert (whole.idle, part.idle) == (("b.b",), None)
    pages = [render_matrix(proof.as_dict()) for proof in (whole, part)]
    assert ["caught no fault: b.b" in page for page in pages] == [True, False]
    for page in pages:
        assert page.count('<rect class="first"') == 1
        assert "A000 none.none" in page
        assert "none.none: a.a" in page


def test_marks_tell_answers_apart_by_what_is_in_their_files(tmp_path: Path) -> None:
    """Two answers that name files of other places are alike when the files are."""
    contents = iter([b"one", b"one", b"two"])

    def answer(number: int) -> dict[str, str]:
        path = tmp_path / f"{number}-{os.urandom(4).hex()}"
        path.write_bytes(next(contents))
        return {"file": str(path)}

    marks = []
    for _ in range(3):
        door = MarkingDoor(InsideDoor(About("", {}, {}), {"loss": answer}, []), tmp_path)
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
    assert reached["Adder.add"] == 1


def test_fault_that_does_not_exist_is_refused() -> None:
    """A fault is chosen by id or by name."""
    known = next(iter(faults().values()))
    assert chosen_faults([known.slug]) == chosen_faults([known.id])
    with pytest.raises(UsageError, match="there is no fault 'A9999'"):
        chosen_faults(["A9999"])


def test_dropped_batch_is_killed_in_a_process_of_its_own() -> None:
    """A027, the last batch that is never trained on, breaks the law of coverage with at most three rows."""
    done = run_job(Job(fault="A027", laws=LAWS, shrink_seconds=60))
    assert not done.trouble
    assert (done.words["batches.cover"], done.words["mask.answers"]) == ("broken", "holds")
    assert done.first is not None
    assert len(done.first["case"]["rows"]) <= 3
    assert done.reached
    assert done.seconds_to_first is not None


def test_clean_plantings_answer_alike_wherever_they_lie() -> None:
    """Two processes without a fault give the same answer to every question that both were asked."""
    laws = ("template.bytes", "mask.answers", "store.keeps", "resume.same", "safety.template")
    one, two = (run_job(Job(laws=laws)).answers for _ in range(2))
    assert len(one) > 30
    assert [question for question in one.keys() & two.keys() if one[question] != two[question]] == []


def test_planting_that_hangs_is_ended() -> None:
    """A process that does not end in time is trouble, and trouble is noticed."""
    done = run_job(Job(laws=LAWS), patience=0.01)
    assert "did not end within" in done.trouble


def test_planting_is_ended_with_its_campaign() -> None:
    """Who sets the event ends the process, and that is told as what it is."""
    stop = threading.Event()
    stop.set()
    assert run_job(Job(laws=LAWS), stop=stop).trouble == "the campaign was ended"


def test_campaign_that_is_left_ends_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for no more results leaves no job that runs to its end."""
    begun, ended = threading.Event(), []

    def job(job: Job, *, stop: threading.Event) -> Planted:
        if job.seed:
            begun.set()
            ended.append(stop.wait(60))
        return Planted("", job.seed)

    monkeypatch.setattr(campaign, "run_job", job)
    jobs = run_jobs([Job(seed=0), Job(seed=1)], Spread(workers=2))
    assert next(jobs).seed == 0
    assert begun.wait(60)
    jobs.close()  # type: ignore[attr-defined]
    assert ended == [True]


def test_no_more_laws_are_asked_than_enough() -> None:
    """When enough laws have caught a fault, the others are not asked."""
    done = run_job(Job(fault="A027", laws=LAWS, enough=1))
    assert list(done.words) == ["batches.cover"]


def test_campaign_is_the_same_on_ray() -> None:
    """Spread over a local Ray cluster the campaign comes to the same."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'finetune-suite[ray]'")
    jobs = [Job(laws=LAWS), Job(fault="A027", laws=LAWS)]
    there, here = (list(run_jobs(jobs, spread)) for spread in (Spread("ray"), Spread()))
    assert [each.words for each in there] == [each.words for each in here]
    # Of the planted one the smallest case is looked for as long as there is time.
    assert there[0].answers == here[0].answers


def test_campaign_tells_of_each_fault() -> None:
    """A small campaign, whole: a clean run, one fault, and what each came to."""
    told: list[str] = []
    found = prove(chosen_faults(["A027"]), seeds=1, enough=1, tell=told.append)
    assert told[0] == "clean, seed 0: holds"
    assert told[1].startswith("A027 data.last_batch_dropped: killed by batches.cover")
    assert found.passes
    assert found.as_dict()["counts"] == {"killed": 1, "survived": 0, "inert": 0}
