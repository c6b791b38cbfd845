"""Laws of subjects: whatever is behind one, it is judged in bounded time, with evidence, and nothing of it is left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from finetune.verify.client import SubjectClient
from finetune.verify.judge import Effort
from finetune.verify.laws.protocol import Opener, conform
from finetune.verify.results import LawResult
from finetune.verify.run import chosen_laws, verify
from finetune.verify.subjects import serving
from finetune.verify.subjects.choose import running_subject
from finetune.verify.subjects.process import SubprocessSubject
from finetune.verify.subjects.subject import Subject, SubjectError

SLEEPER = "import time; time.sleep(3600)"
SCRIPT = Path(__file__).parents[1] / "support" / "bad_subjects.py"
VERDICTS = {
    "well": {},
    "hangs": {"protocol.loss": ("error", "did not answer within")},
    "hangs before it speaks": {"protocol.hello": ("error", "did not answer within")},
    "crashes": {"protocol.loss": ("error", "the roof is on fire")},
    "prints garbage": {"protocol.loss": ("error", "no JSON")},
    "prints no end": {"protocol.loss": ("error", "did not answer within")},
    "leaks": {"protocol.leaves": ("failed", "time.sleep(3600)")},
    "leaks unmarked": {"protocol.leaves": ("failed", "time.sleep(3600)")},
    "writes beside": {"protocol.inside": ("failed", "litter.txt is new")},
    "spoils its input": {"protocol.inside": ("failed", "config.json is another")},
    "says no number": {"protocol.loss": ("failed", "loss is nan")},
    "lies": {"protocol.loss": ("failed", "there is no loss here")},
    "answers otherwise": {"protocol.alike": ("failed", "loss=2.0")},
    "names no file": {"protocol.logits": ("failed", "nowhere.safetensors, which is not")},
    "is no protocol": {"protocol.hello": ("error", "no JSON")},
}
"""What each is found out by; all else holds."""
SILENT = ("hangs", "hangs before it speaks", "prints no end")


def opener(way: str) -> Opener:
    """Opens a trainer that misbehaves in this way; only those that never answer are given little time for it."""

    @contextmanager
    def opened(folder: Path) -> Iterator[Subject]:
        subject = SubprocessSubject(
            [sys.executable, str(SCRIPT), way],
            folder,
            environment={"PYTHONPATH": str(Path(serving.__file__).parent)},
            patience=5 if way in SILENT else 120,
            first_patience=5 if way == "hangs before it speaks" else 120,
        )
        try:
            yield subject
        finally:
            subject.close()

    return opened


def orphans() -> list[int]:
    """What runs on of the processes that a trainer here leaves."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if (SLEEPER in command or str(SCRIPT) in command) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


@pytest.mark.parametrize("way", VERDICTS)
def test_conformance_finds_out_each_way_to_misbehave(way: str, tmp_path: Path) -> None:
    """Each of 14 ways to misbehave is found out by the sentence that it breaks, with evidence; the others hold."""
    assert len(VERDICTS) == 15
    judged = {each.law: each for each in conform(opener(way), tmp_path)}
    for law, (word, evidence) in VERDICTS[way].items():
        assert judged[law].outcome == word, judged[law]
        assert evidence in judged[law].got + judged[law].why
    others = {law: each.outcome for law, each in judged.items() if law not in VERDICTS[way]}
    if way == "well":
        assert set(others) == {
            "protocol.hello",
            "protocol.render",
            "protocol.loss",
            "protocol.alike",
            "protocol.stranger",
            "protocol.inside",
            "protocol.leaves",
        }
    assert set(others.values()) <= {"passed"}, others
    assert orphans() == []


@pytest.mark.parametrize("way", ["hangs", "crashes", "prints garbage", "says no number", "lies"])
def test_verification_goes_on_beside_a_law_that_cannot_be_judged(way: str, tmp_path: Path) -> None:
    """A trainer that misbehaves when one thing is asked is `error` or `broken` there; laws of the rest are judged."""
    told: list[LawResult] = []
    laws = [law for law in chosen_laws(1) if set(law.needs) <= {"loss"} or law.id == "batches.cover"]
    assert len(laws) >= 2
    with opener(way)(tmp_path) as subject:
        verify(SubjectClient(subject, tmp_path), laws, Effort(times=0.2), tell=told.append)
    words = {each.law: each.outcome for each in told}
    assert len(words) == len(laws)
    expected = {"lies": "not applicable", "says no number": "failed"}.get(way, "error")
    assert words["padding.same_loss"] == expected, told
    assert words["batches.cover"] == "not applicable"
    assert orphans() == []


def test_conformance_of_our_own_trainer(tmp_path: Path) -> None:
    """Our trainer in a process of its own is what the protocol says, in every ability that there is a question for."""

    @contextmanager
    def opened(folder: Path) -> Iterator[Subject]:
        with running_subject("reference", folder) as subject:
            yield subject

    judged = {each.law: each for each in conform(opened, tmp_path)}
    assert len(judged) >= 17
    assert {law: each for law, each in judged.items() if each.outcome != "passed"} == {}


SLOW = """
import time
from serving import serve

def slowly(**given):
    time.sleep(3)
    return {"steps": []}

serve("slow", {}, {"train": slowly, "render": slowly})
"""


def test_run_of_training_may_take_longer_than_an_answer(tmp_path: Path) -> None:
    """What takes longer than a question may is given up, but not where it trains; and a run has an end, too."""
    environment = {"PYTHONPATH": str(Path(serving.__file__).parent)}
    for patience, ability, answers in ((2, "train", True), (2, "render", False), (0.5, "train", False)):
        folder = tmp_path / f"{patience} {ability}"
        folder.mkdir()
        subject = SubprocessSubject([sys.executable, "-c", SLOW], folder, environment=environment, patience=patience)
        try:
            if answers:
                assert subject.ask(ability, {}) == {"steps": []}
            else:
                with pytest.raises(SubjectError, match=rf"asked to {ability}, it did not answer within"):
                    subject.ask(ability, {})
        finally:
            subject.close()
