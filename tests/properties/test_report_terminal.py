"""Laws of what a terminal is shown of a run: the verdict first, then only what did not pass, each with its reason."""

import io
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from finetune.criteria.judge import judge
from finetune.events import CheckpointSaved, Event, HeldOutLoss, PhaseStarted, StepDone
from finetune.report import build_report, print_report
from finetune.report.progress import Progress
from support.evidence import altered
from support.sample_run import sample_run

CRITERIA = ("Loss convergence", "Model learning", "Memory efficiency", "Parameter updates", "Artifacts")


def printed(*runs: dict[str, Any], verbose: bool = False) -> str:
    """What is printed of runs in a pipe of 80 columns."""
    stream = io.StringIO()
    print_report(runs, Console(file=stream, width=80), verbose=verbose)
    return stream.getvalue()


def test_terminal_report_begins_with_the_verdict_and_the_five_criteria() -> None:
    """The first line tells the outcome, five lines what became of each criterion; all fits 80 columns."""
    lines = printed(sample_run(advice=["look at the rows"])).splitlines()
    assert lines[0] == "✗ failed: tiny-llama on facts.jsonl; 2 of 5 criteria passed"
    assert [line[3:20].rstrip() for line in lines[2:7]] == list(CRITERIA)
    assert lines[7].strip() == ""
    assert max(map(len, lines)) <= 80
    assert lines[-2:] == [
        "what to try: look at the rows",
        "-v shows 2 notes, every verdict, figure and file",
    ]


@pytest.mark.parametrize("outcome", ["passed", "failed", "inconclusive", "not applicable", "error"])
def test_terminal_report_shows_what_did_not_pass_with_its_reason(outcome: str) -> None:
    """A verdict that did not pass is there with its reason in its row, one that passed is not; -v shows them all."""
    run = sample_run()
    passed = {"reason": "", "outcome": "passed"}
    shown = {each["id"]: each | passed | {"title": f"T{place}t"} for place, each in enumerate(run["verdicts"])}
    odd = shown["criterion-4-6"]
    odd |= {"outcome": outcome, "reason": "because"}
    short = printed({**run, "verdicts": list(shown.values())})
    assert (odd["title"] in short, "because" in short) == (outcome != "passed", outcome != "passed")
    assert not any(each["title"] in short for each in shown.values() if each is not odd)
    assert "adapter_model.safetensors" not in short
    if outcome != "passed":
        at = short.index(odd["title"])
        assert "because" in short[at : at + 200]
    long = printed({**run, "verdicts": list(shown.values())}, verbose=True)
    assert all(each["title"] in long for each in shown.values())
    assert "adapter/adapter_model.safetensors" in long


def test_terminal_report_of_several_runs_is_one_table() -> None:
    """Each run is a row beside the others, named by its id, with its verdict and figures."""
    runs = [sample_run(id=name) for name in ("first", "second", "third")]
    text = printed(*runs)
    rows = [line for line in text.splitlines() if line.startswith(("first", "second", "third"))]
    assert len(rows) == 3
    assert all("failed" in row for row in rows)
    assert len(text.splitlines()) < 20
    assert printed(*runs, verbose=True).count("criterion") >= 3


@given(before=st.floats(1e-6, 1e6), after=st.floats(1e-6, 1e6))
def test_change_of_a_loss_is_never_negative(before: float, after: float) -> None:
    """What fell is so much lower, what rose so much higher or so many times; no number has a minus."""
    verdicts = {each.id: each for each in judge(altered("loss", per_step=(before, after)))}
    told = verdicts["loss-convergence"].measured
    said = re.fullmatch(r"([\d.,e+]+)(%|x) (lower|higher) \(.*\)", told)
    assert said is not None, told
    number = float(said[1].replace(",", ""))
    ratio = number if said[2] == "x" else 1 + number / 100 * (1 if said[3] == "higher" else -1)
    assert ratio == pytest.approx(after / before, rel=0.006, abs=0.0006)


def test_steps_checkpoints_and_evaluations_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, too, they are printed as lines that stay, as in a log."""

    def shown(stream: io.StringIO) -> list[str]:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress() as progress:
            for event in _events():
                progress(event)
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n")
        return [line.rstrip() for line in plain.splitlines()]

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    log, terminal = shown(io.StringIO()), shown(Terminal())
    assert "  checkpoint checkpoints/step-00000020" in log
    assert "  held-out loss 0.5000 at step 20" in log
    assert sum(line.startswith("  step ") for line in log) == 11
    assert [line for line in log if line not in terminal] == []


def _events() -> list[Event]:
    steps = [StepDone(step, 20, step / 20, 1.0, 1e-3, 1.0, 10, 5, 0.1, 1) for step in range(1, 21)]
    last = (HeldOutLoss(20, 0.5, 10), CheckpointSaved(20, "checkpoints/step-00000020"))
    return [PhaseStarted("train", "20 steps"), *steps, *last, PhaseStarted("observe tuned", "")]


def test_advice_is_told_to_programs_too() -> None:
    """`report.json` has what to try as a list of its own."""
    assert build_report(sample_run(advice=["a", "b"]))["advice"] == ["a", "b"]
