"""Laws of the judge: what holds is said to hold, what is broken is made small, and nothing else is called either."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import UsageError
from finetune.verify import findings, formats, run
from finetune.verify.catalogue import Law
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.judge import Effort, judge, judge_again
from finetune.verify.results import LawResult
from finetune.verify.subjects.answers import Loss
from finetune.verify.subjects.subject import About, InProcessSubject, RefusesError, UnsupportedError
from finetune_strategies.profiles import examples
from finetune_strategies.recipes import Recipe

pytestmark = pytest.mark.tools


class Number(Recipe):
    """A case."""

    value: int


def law_of(asked: Callable[[SubjectClient, Any], None], cases: Any = None) -> Law:
    """A law that is nobody's."""
    drawn = st.builds(Number, value=st.integers(0, 1000) if cases is None else cases)
    return Law("test.law", "It is so.", ("loss",), "nothing", asked, Number, drawn)


def trainer_of(answer: Callable[[int], Any], scratch: Path) -> SubjectClient:
    """A trainer that answers one question, and counts."""
    about = About("somebody", {"somebody": "1.0"}, {"loss": ""})
    return SubjectClient(InProcessSubject(about, {"loss": lambda value: answer(value)}, []), scratch)


def loss_is_value(trainer: SubjectClient, case: Number) -> None:
    """What is asked comes back."""
    found = trainer.ask("loss", Loss, value=case.value)
    check(found.loss == case.value, expected=case.value, got=found.loss)


def test_judge_says_of_what_holds_that_it_holds(tmp_path: Path) -> None:
    """A trainer that keeps a law is told to, with the number of cases."""
    found = judge(law_of(loss_is_value), trainer_of(lambda value: {"loss": float(value)}, tmp_path), Effort())
    assert (found.outcome, found.cases, found.case) == ("passed", 24, None)


@pytest.mark.parametrize("limit", [0, 1, 7, 100, 899])
def test_judge_makes_what_breaks_as_small_as_it_gets(limit: int, tmp_path: Path) -> None:
    """Of all cases that break a law the smallest is told, with what had to be and what was, and breaks again."""
    trainer = trainer_of(lambda value: {"loss": float(value if value < limit else -1)}, tmp_path)
    law = law_of(loss_is_value, st.sampled_from([limit, 1000]) | st.integers(0, 1000))
    found = judge(law, trainer, Effort())
    assert (found.outcome, found.case) == ("failed", {"value": limit})
    assert (found.expected, found.got) == (str(limit), "-1.0")
    again = judge_again(law, trainer, Number.model_validate(found.case))
    assert (again.outcome, again.case) == ("failed", found.case)
    assert limit == 0 or judge_again(law, trainer, Number(value=limit - 1)).outcome == "passed"


def raises(error: Exception) -> Callable[[int], Any]:
    """An answer that is none."""

    def answer(value: int) -> Any:
        raise error

    return answer


TROUBLES: Mapping[str, tuple[Callable[[int], Any], str, str]] = {
    "fails": (raises(ZeroDivisionError("by zero")), "error", "ZeroDivisionError"),
    "answers garbage": (lambda value: {"words": 1}, "error", "loss: Field required"),
    "answers text": (lambda value: {"loss": "low"}, "error", "valid number"),
    "has nothing": (raises(UnsupportedError("no losses here")), "not applicable", "no losses here"),
    "refuses all": (raises(RefusesError("never")), "error", "never"),
}


@pytest.mark.parametrize("how", TROUBLES)
def test_judge_tells_trouble_from_what_is_broken(how: str, tmp_path: Path) -> None:
    """Whatever a trainer does instead of answering is never called a broken law, and says what it was."""
    answer, word, words = TROUBLES[how]
    found = judge(law_of(loss_is_value), trainer_of(answer, tmp_path), Effort())
    assert found.outcome == word
    assert words in found.why
    assert found.cases == 0


def test_judge_tells_what_is_not_answered_alike_twice(tmp_path: Path) -> None:
    """Where a broken case holds when it is asked again, that is said."""
    asked = iter(range(10_000))
    trainer = trainer_of(lambda value: {"loss": float(value) if next(asked) else -1.0}, tmp_path)
    found = judge(law_of(loss_is_value), trainer, Effort())
    assert found.outcome == "failed"
    assert "does not answer alike twice" in found.why


def test_judge_judges_what_it_can_of_a_trainer_that_cannot_all(tmp_path: Path) -> None:
    """Cases for which a trainer has nothing are counted, and the others are judged."""

    def answer(value: int) -> Any:
        if value % 2:
            raise UnsupportedError("odd numbers")
        return {"loss": float(value)}

    found = judge(law_of(loss_is_value), trainer_of(answer, tmp_path), Effort())
    assert found.outcome == "passed"
    assert found.cases > 0 < found.unable["odd numbers"]


def test_judge_counts_what_is_said_of_new_places_as_one(tmp_path: Path) -> None:
    """Names that are new in each case, and where the suite lies, do not make many reasons out of one."""

    def answer(value: int) -> Any:
        place = Path(tempfile.mkdtemp(dir=tempfile.mkdtemp(dir=tmp_path)))
        raise UnsupportedError(f"no template at {place / 'own.jinja'}, nor in {place}")

    found = judge(law_of(loss_is_value), trainer_of(answer, tmp_path), Effort())
    assert found.unable == {"no template at .../own.jinja, nor in .../": 25}
    assert found.why == "no template at .../own.jinja, nor in .../"


def test_judge_asks_nothing_of_an_ability_that_is_missing(tmp_path: Path) -> None:
    """A law about an ability that is missing is not applicable, with the reason."""
    about = About("somebody", {}, {"loss": "it keeps them to itself"})
    found = judge(law_of(loss_is_value), SubjectClient(InProcessSubject(about, {}, []), tmp_path), Effort())
    assert (found.outcome, found.why) == ("not applicable", "loss: it keeps them to itself")


def test_judge_stops_when_its_time_is_over(tmp_path: Path) -> None:
    """No more cases are begun after the seconds of a law, and what was judged counts."""
    trainer = trainer_of(lambda value: {"loss": float(value)}, tmp_path)
    found = judge(law_of(loss_is_value), trainer, Effort(seconds=0.0))
    assert (found.outcome, found.cases) == ("not applicable", 0)


def test_verify_goes_on_when_a_law_itself_fails(tmp_path: Path) -> None:
    """A law with a fault of its own is an error that says so, and the others are judged."""

    def fails(trainer: SubjectClient, case: Number) -> None:
        raise KeyError("mine")

    trainer = trainer_of(lambda value: {"loss": float(value)}, tmp_path)
    found = run.verify(trainer, [law_of(fails), law_of(loss_is_value)], Effort())
    assert [each.outcome for each in found.results] == ["error", "passed"]
    assert "the suite itself failed: KeyError: 'mine'" in found.results[0].why
    assert not found.passes


@pytest.fixture
def broken_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> run.Verification:
    """What comes of a trainer that breaks one law and lacks what another needs."""
    trainer = trainer_of(lambda value: {"loss": -1.0}, tmp_path)
    other = Law("test.other", "So is that.", ("merge",), "-", loss_is_value, Number, st.none())
    found = run.verify(trainer, [law_of(loss_is_value), other], Effort(seed=7))
    for module in (findings, formats):
        monkeypatch.setattr(module, "catalogue", lambda: {"test.law": law_of(loss_is_value)})
    return found


def test_finding_is_the_same_after_being_written(broken_loss: run.Verification, tmp_path: Path) -> None:
    """A finding's file holds its law, case and evidence; what was changed in it is refused by its place."""
    [path] = findings.write_findings(broken_loss, "somebody", tmp_path / "found")
    assert path.name == "test.law.json"
    assert findings.is_finding(path)
    again = findings.load_finding(path)
    assert (again.case, again.subject, again.expected, again.got) == (Number(value=0), "somebody", "0", "-1.0")
    values = json.loads(path.read_text())
    assert (values["seed"], values["versions"]) == (7, {"somebody": "1.0"})
    for spoilt, words in (
        ({"law": "test.none"}, "there is no law 'test.none'"),
        ({"case": {"value": "x"}}, "value: Input should be a valid integer"),
        ({"case": {"value": 1, "more": 2}}, "more: Extra inputs"),
        ({"version": 9}, "version 9"),
        ({"subject": None}, "subject: Input should be a valid string"),
    ):
        path.write_text(json.dumps({**values, **spoilt}))
        with pytest.raises(UsageError, match=words):
            findings.load_finding(path)
    path.write_text("{")
    assert not findings.is_finding(path)


def test_finding_is_told_ready_to_be_filed(broken_loss: run.Verification) -> None:
    """The report has the sentence, versions, seed, what was expected and got, the case, and how to have it again."""
    judgement = dataclasses.replace(broken_loss.results[0], got="-1.0\n```\n# not a title")
    told = findings.tell_report(broken_loss, judgement, "ft replay it.json")
    for words in (
        "It is so.",
        "somebody 1.0",
        "seed 7",
        "Expected:\n\n```text\n0\n```\n",
        "Got:\n\n````text\n-1.0\n```\n# not a title\n````\n",
        '"value": 0',
        "`ft replay it.json`",
    ):
        assert words in told


def test_verification_is_told_in_junit_and_sarif(broken_loss: run.Verification) -> None:
    """Both count what is broken and what is not applicable, and hold the evidence; no letter breaks them."""
    from xml.etree import ElementTree

    suite = ElementTree.fromstring(formats.junit(broken_loss))
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "2",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
    }
    assert "got: -1.0" in (suite.findtext("testcase/failure") or "")
    told = formats.sarif(broken_loss, "0.1.0", "mine.py")
    [result] = told["runs"][0]["results"]
    assert (result["ruleId"], result["level"]) == ("test.law", "error")
    assert [rule["id"] for rule in told["runs"][0]["tool"]["driver"]["rules"]] == ["test.law"]


@given(words=st.text())
@examples(share=2)
def test_junit_holds_whatever_a_trainer_says(words: str) -> None:
    """Control letters, markup and halves of letters leave the XML whole."""
    from xml.etree import ElementTree

    judgement = LawResult("test.law", words, "failed", got=words, why=words)
    other = LawResult("test.two", words, "error", why=words)
    found = run.Verification(words, {}, 1, Effort(), (judgement, other), 0.0, (words,))
    assert len(ElementTree.fromstring(formats.junit(found).encode())) == 3


def test_laws_are_chosen_by_name_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A law that does not exist is refused with those that do."""
    assert [law.id for law in run.chosen_laws(1, ["batches.cover"])] == ["batches.cover"]
    with pytest.raises(UsageError, match=r"there is no law 'batches\.covers' up to tier 1") as caught:
        run.chosen_laws(1, ["batches.covers"])
    assert caught.value.hint == "did you mean batches.cover?"
    assert "mask.fits" not in [law.id for law in run.chosen_laws(1, exclude=["mask.fits", "protocol.alike"])]
    with pytest.raises(UsageError, match=r"there is no law 'mask\.fit'") as caught:
        run.chosen_laws(1, exclude=["mask.fit"])
    assert caught.value.hint == "did you mean mask.fits?"
    with pytest.raises(UsageError, match=r"'learning\.by_heart' \(of tier 2\), 'x' up to tier 1") as caught:
        run.chosen_laws(1, ["learning.by_heart", "x"])
    assert caught.value.hint == "say --tier 2"


def test_verification_of_the_protocol_alone_does_not_pass() -> None:
    """Where only the subject was judged, and no law of fine-tuning, nothing is green."""
    subject = LawResult("protocol.hello", "It says who it is.", "passed", cases=1)
    law = LawResult("test.law", "It is so.", "passed", cases=1)
    only, both = (run.Verification("", {}, 1, Effort(), judged, 0.0) for judged in ((subject,), (subject, law)))
    assert (only.passes, both.passes) == (False, True)


ENDS: Mapping[str, Callable[[int], Any]] = {
    "exits": raises(SystemExit(0)),  # type: ignore[arg-type]
    "is a generator that ends": raises(GeneratorExit()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("how", ENDS)
def test_trainer_that_ends_the_process_is_an_error(how: str, tmp_path: Path) -> None:
    """A trainer in this process that leaves it, even with 0, is told so, and the suite goes on."""
    found = judge(law_of(loss_is_value), trainer_of(ENDS[how], tmp_path), Effort())
    assert found.outcome == "error"
    assert "it ended the process" in found.why


def test_law_named_twice_is_judged_once() -> None:
    """The same law named twice is one law."""
    assert [law.id for law in run.chosen_laws(1, ["batches.cover", "batches.cover"])] == ["batches.cover"]
