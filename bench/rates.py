"""Counts how often the verdict on open answers errs, on runs of known kind: `make rates`.

Each seed draws rows that nothing can be inferred from (names put at random into one pattern), trains a model on them in
nine ways, and judges each. A kind says which claims are false of it by construction, and whether its goal is reached.
What the output file already has is not done again.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.config import Plan, load_config
from finetune.criteria.claims import judge_claims
from finetune.criteria.judge import overall
from finetune.data.facts import CAPITALS
from finetune.data.read import read_rows
from finetune.data.shipped import REHEARSAL, RETENTION, data_path
from finetune.evidence.observe import open_evidence
from finetune.evidence.open_answers import OpenLook, look, open_questions
from finetune.files import write_text
from finetune.intervals import most_probable
from finetune.processes import usable_cores
from finetune.records import Outcome, TokenizedRow, Verdict
from finetune.report import ink
from finetune.report.charts import axes_inside
from finetune.report.html import page_template
from finetune.run.folder import RunFolder
from finetune.train import training_events
from finetune.training.prepare import Prepared, prepare, shuffled_rows
from finetune.training.run import Run
from finetune.verify.prove.campaign import on_ray

DOCS = Path(__file__).resolve().parent.parent / "docs"
EVIDENCE = DOCS / "evidence" / "rates.jsonl"
_WIDTH = 720
_ROWS = 24
_STEPS = 24
_RATE = 1e-2
_NAMES = tuple(name for pair in CAPITALS for name in pair)


@dataclass(frozen=True, slots=True)
class Data:
    """What a seed has drawn: the run as prepared, and other rows of the same pattern."""

    prepared: Prepared
    others: tuple[TokenizedRow, ...]

    @property
    def rehearsed(self) -> tuple[TokenizedRow, ...]:
        """What is mixed in so that nothing is forgotten."""
        return self.prepared.rehearsal.rows if self.prepared.rehearsal else ()


def _shuffled(data: Data) -> tuple[TokenizedRow, ...]:
    rows = shuffled_rows(data.prepared)
    assert rows is not None
    return rows


def _without_end(row: TokenizedRow) -> TokenizedRow:
    """The row less its last trained token, by which the answer ends, and what follows."""
    end = len(row.trained) - row.trained[::-1].index(True) - 1
    return TokenizedRow(row.ids[:end], row.trained[:end], row.where)


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to train, and what is true of it: claims that are false by construction, and whether the goal is met.

    `learned` is None where the training is so short that either can be.
    """

    name: str
    sentence: str
    goal: str
    trained_on: Callable[[Data], tuple[TokenizedRow, ...]]
    learned: bool | None = False
    false: tuple[str, ...] = ()
    steps: int = _STEPS
    rate: float = _RATE
    rows: int = _ROWS


ROWS, UNSEEN, CARRIES, RETAINED, ENDS = (
    f"claim-{name}" for name in ("rows", "unseen", "association", "retention", "ends")
)


def _own(data: Data) -> tuple[TokenizedRow, ...]:
    return data.prepared.training_rows


KINDS = (
    Kind("learned", "its rows, beside what is to be kept", "style", _own, learned=True, false=(CARRIES,), steps=28),
    Kind("half learned", "the same, half the steps", "style", _own, learned=None, false=(CARRIES,), steps=14),
    Kind("nothing", "six steps at a millionth", "style", _own, false=(ROWS, UNSEEN, CARRIES), steps=6, rate=1e-6),
    Kind("shuffled", "each answer under a wrong prompt", "rows", _shuffled, false=(ROWS, CARRIES)),
    Kind(
        "style only",
        "other rows of the same pattern",
        "rows",
        lambda data: data.others + data.rehearsed,
        false=(ROWS, CARRIES),
    ),
    Kind(
        "memorised",
        "a third of the rows, three times as often",
        "generalise",
        lambda data: data.prepared.train.rows[: _ROWS // 3] + data.rehearsed,
        false=(CARRIES,),
        steps=32,
    ),
    Kind(
        "forgot",
        "its rows alone, at three times the rate",
        "rows",
        lambda data: data.prepared.train.rows,
        false=(RETAINED,),
        steps=32,
        rate=3 * _RATE,
    ),
    Kind(
        "endless",
        "answers less the token that ends them",
        "rows",
        lambda data: tuple(map(_without_end, _own(data))),
        false=(ENDS,),
    ),
    Kind("few rows", "four rows, and four unseen", "style", _own, false=(CARRIES,), rows=4),
)


def draw_rows(rng: random.Random, count: int) -> list[dict[str, str]]:
    """So many questions and answers of one pattern; what an answer says follows from nothing."""
    rows = []
    for _ in range(count):
        asked, said = rng.sample(_NAMES, 2), rng.sample(_NAMES, 2)
        rows.append(
            {
                "prompt": f"What comes of {asked[0]} and {asked[1]}?",
                "completion": f"{said[0]} plus {rng.randrange(10, 60)} of {said[1]}.",
            }
        )
    return rows


def _write(path: str, rows: Sequence[object]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw_data(model: str, seed: int, count: int, folder: Path) -> Data:
    """So many rows to train on, as many unseen ones, and as many others; the same for every kind."""
    rng = random.Random(f"rates-{seed}-{count}")
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "valid", "others", "kept")}
    for name in ("train", "valid", "others"):
        _write(files[name], draw_rows(rng, count))
    _write(files["kept"], rng.sample([row.values for row in read_rows(data_path(REHEARSAL))], _ROWS))
    settings: dict[str, object] = {
        "model.path": model,
        "data.train": files["train"],
        "data.valid": files["valid"],
        "data.rehearsal": files["kept"],
        "data.retention": RETENTION,
        "judge.answers": "open",
        "judge.goal": "generalise",
        "adapter.rank": 16,
        "training.seed": seed,
        "training.batch_size": _ROWS * 2 // 3,
        "training.evaluate_every": 1_000_000,
    }

    def prepared(**changes: object) -> Prepared:
        overrides = settings | {key.replace("_", "."): value for key, value in changes.items()}
        return prepare(load_config(None, environ={}, overrides=overrides, profile=None))

    return Data(prepared(), prepared(data_train=files["others"]).train.rows)


def _planned(prepared: Prepared, kind: Kind) -> Prepared:
    """The run with the steps and the rate of a kind."""
    config = prepared.plan.config
    training = config.training.model_copy(update={"learning_rate": kind.rate, "max_steps": kind.steps})
    plan = replace(prepared.plan, config=config.model_copy(update={"training": training}))
    return replace(prepared, plan=plan, total_steps=kind.steps)


def judge_seed(model: str, seed: int, kinds: Sequence[Kind]) -> list[dict[str, Any]]:
    """Train and judge each kind once on the rows of this seed: a line for each, with the outcome of every claim."""
    return [
        line
        for count in sorted({kind.rows for kind in kinds}, reverse=True)
        for line in _judge_alike(model, seed, count, [kind for kind in kinds if kind.rows == count])
    ]


def _judge_alike(model: str, seed: int, count: int, kinds: Sequence[Kind]) -> Iterator[dict[str, Any]]:
    """Kinds that have the same rows: the base is looked at once."""
    with tempfile.TemporaryDirectory(prefix="finetune-rates-") as place:
        data = draw_data(model, seed, count, Path(place))
        backend = open_backend(data.prepared.plan.config.backend)
        base, questions = None, open_questions(data.prepared)
        for kind in kinds:
            started = time.perf_counter()
            folder = RunFolder(Path(place) / "run")
            run = Run(_planned(data.prepared, kind), backend, backend.join(), folder, lambda event: None)
            session = run.open_session()
            base = base or look(session, data.prepared, questions)
            run.attach_adapter(session)
            deque(training_events(run, session, kind.trained_on(data)), maxlen=0)
            tuned = look(session, data.prepared, questions, base)
            verdicts = _verdicts(data.prepared, kind, base, tuned)
            yield {
                "model": model,
                "kind": kind.name,
                "seed": seed,
                "outcome": overall(verdicts),
                "claims": {each.id: each.outcome for each in verdicts},
                "measured": {each.id: each.measured for each in verdicts},
                "seconds": round(time.perf_counter() - started, 1),
            }


def _verdicts(prepared: Prepared, kind: Kind, base: OpenLook, tuned: OpenLook) -> tuple[Verdict, ...]:
    evidence = open_evidence(replace(prepared, plan=_with_goal(prepared.plan, kind.goal)), base, tuned)
    assert evidence is not None
    return tuple(judge_claims(evidence))


def _with_goal(plan: Plan, goal: str) -> Plan:
    judge = plan.config.judge.model_copy(update={"goal": goal})
    return replace(plan, config=plan.config.model_copy(update={"judge": judge}))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was judged before."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _judge_task(task: tuple[str, int, tuple[str, ...]]) -> list[dict[str, Any]]:
    model, seed, names = task
    return judge_seed(model, seed, [kind for kind in KINDS if kind.name in names])


def summarise(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each kind: how many runs there are, how each ended, and how often a claim held that is false of it."""
    found = []
    for kind in KINDS:
        of_kind = [line for line in lines if line["kind"] == kind.name]
        if of_kind:
            ends = {
                word: sum(line["outcome"] == word for line in of_kind) for word in ("passed", "inconclusive", "failed")
            }
            wrong = {name: sum(line["claims"][name] == Outcome.PASSED for line in of_kind) for name in kind.false}
            found.append({"kind": kind, "runs": len(of_kind), **ends, "wrong": wrong})
    return found


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """The page of docs/ with both tables."""
    found = summarise(lines)
    models = ", ".join(f"`{name}`" for name in sorted({line["model"] for line in lines}))
    text = [
        "# How often the verdict errs",
        "",
        f"Made by `make rates` from `docs/evidence/rates.jsonl`: runs of known kind on {models}, {_ROWS} rows trained",
        "on and as many unseen, judged as open answers (`judge.answers=open`). The rows put names drawn at random into",
        "one pattern, so nothing can be inferred from them; each seed draws its own. Bounds are one-sided, at 95%,",
        "after Clopper and Pearson: no error in 300 runs bounds the rate at 1%. Fewer runs state less.",
        "",
        "![How runs of each kind were judged](rates.svg)",
        "",
        "| kind | trained on | goal | runs | passed | inconclusive | failed | called wrongly | at most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        kind, runs = each["kind"], each["runs"]
        wrong = each["failed"] if kind.learned else each["passed"]
        bound = f"{wrong} | {most_probable(wrong, runs):.1%}" if kind.learned is not None else "- | -"
        ends = " | ".join(str(each[word]) for word in ("passed", "inconclusive", "failed"))
        text.append(f"| {kind.name} | {kind.sentence} | {kind.goal} | {runs} | {ends} | {bound} |")
    text += [
        "",
        "A kind that learned is called wrongly when it fails, every other when it passes. `inconclusive` is no error:",
        "it says that the rows are too few. Of those that learned, the ones that passed were recognised; half the",
        "steps show how that falls with the effect, and are called neither right nor wrong.",
        "",
        "## Claims that are false by construction",
        "",
        "| kind | claim | runs | held all the same | at most |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        for name, wrong in each["wrong"].items():
            bound = f"{most_probable(wrong, each['runs']):.1%}"
            text.append(f"| {each['kind'].name} | `{name}` | {each['runs']} | {wrong} | {bound} |")
    return "\n".join(text) + "\n"


def picture(lines: Sequence[Mapping[str, Any]]) -> str:
    """A bar for each kind: which share passed, stayed open and failed."""
    found = summarise(lines)
    colours = {"passed": ink.TEAL, "inconclusive": ink.GREY, "failed": ink.RED}
    height = 34 * len(found) + 60
    with ink.sheet(_WIDTH, height) as figure:
        axes = figure.add_axes(axes_inside(_WIDTH, height, left=130, right=20, top=30))
        for at, each in enumerate(found):
            start = 0.0
            for word, colour in colours.items():
                share = each[word] / each["runs"]
                axes.barh(at, share, left=start, height=0.62, color=colour, label=word if at == 0 else None)
                start += share
        axes.set_yticks(range(len(found)), [each["kind"].name for each in found], color=ink.INK)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100%"])
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        ink.plain_axes(axes, grid="x")
        title = "How runs of each kind were judged"
        said = "; ".join(
            f"{each['kind'].name}: {each['passed']} of {each['runs']} passed, {each['failed']} failed" for each in found
        )
        return alone(ink.to_svg(figure, prefix="rates", title=title, description=said))


def alone(svg: str) -> str:
    """A drawing of the report's as a file of its own, which takes its colours from the reader's theme."""
    colours: Any = page_template("style.css.j2").module
    style = (
        f"svg {{ {colours.light()} font-family: sans-serif; }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {colours.dark()} }} }}"
    )
    head = '<svg xmlns="http://www.w3.org/2000/svg"'
    return svg.replace("<svg", head, 1).replace("<title>", f"<style>{style}</style><title>", 1) + "\n"


def main() -> None:
    """Judge every kind of every seed that the output does not have yet, and append each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference-llama", help="a shipped model")
    parser.add_argument("--runs", type=int, default=300, help="runs of each kind: seeds 0, 1, ...")
    parser.add_argument("--kind", action="append", choices=[kind.name for kind in KINDS], help="only this one")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="seeds at once")
    parser.add_argument("--engine", choices=["processes", "ray"], default="processes")
    parser.add_argument("--output", type=Path, default=EVIDENCE)
    given = parser.parse_args()
    wanted = given.kind or [kind.name for kind in KINDS]
    done = {(line["model"], line["seed"], line["kind"]) for line in read_lines(given.output)}
    todo = [
        (given.model, seed, names)
        for seed in range(given.runs)
        if (names := tuple(name for name in wanted if (given.model, seed, name) not in done))
    ]
    print(f"{len(todo)} of {given.runs} seeds to do", file=sys.stderr)
    with given.output.open("a", encoding="utf-8") as output, ProcessPoolExecutor(given.jobs) as pool:
        found = on_ray(_judge_task, todo) if given.engine == "ray" else pool.map(_judge_task, todo)
        for place, lines in enumerate(found, start=1):
            output.write("".join(json.dumps(line) + "\n" for line in lines))
            output.flush()
            told = ", ".join(f"{each['kind']} {each['outcome']}" for each in lines)
            print(f"{place} of {len(todo)}: {told}", flush=True)
    lines = read_lines(given.output)
    if given.output == EVIDENCE:
        write_text(DOCS / "rates.md", page(lines))
        write_text(DOCS / "rates.svg", picture(lines))


if __name__ == "__main__":
    main()
