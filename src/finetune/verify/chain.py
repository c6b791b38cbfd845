"""The whole chain as its users live it: model, rows, fine-tuning, MLX, GGUF, a server, scores; each step told.

Every step is a command of `ft`, in a process of its own, or somebody else's program. A step that cannot be done here is
skipped and says what is missing; one that fails is told, and those that can do without it go on.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from finetune.data.facts import new_facts
from finetune.data.shipped import REHEARSAL, RETENTION, facts_as_jsonl, shipped_facts
from finetune.errors import FineTuneError, RefusedError
from finetune.files import (
    describe_files,
    file_hash,
    is_torn,
    make_folder,
    remove_torn,
    write_json,
    write_text,
)
from finetune.models.locate import SHIPPED, locate_model
from finetune.processes import python_command

FORMAT = 1
"""The version of what `chain.json` holds."""
ROWS = 100
"""Questions; the shipped models know the answers of those that they rehearse, and are to learn all others."""
BUDGET = 900.0
"""Seconds that the whole chain may take."""
REFUSED = 3
MADE = ("run", "merged", "questions.jsonl", "known.jsonl", "report.html", "chain.md", "chain.json")
"""What a chain leaves in its folder; the last is there from the first step on."""
PROGRAM = (*python_command("-c", "from finetune.cli import main; main()"),)
Outcome = Literal["done", "skipped", "failed"]
Teller = Callable[[str], None]
_LEARNS: dict[str, Any] = {"profile": "demo", "training.epochs": 24.0, "judge.memory_batch_size": 2}
"""How the shipped models learn and keep them."""
_GENTLE: dict[str, Any] = {
    "training.learning_rate": 1e-3,
    "training.epochs": 10.0,
    "judge.sham": "never",
    "judge.memory": "never",
}
"""How any other model does."""


@dataclass(frozen=True, slots=True)
class ChainStep:
    """One step: what came of it, in how many seconds, why it was skipped or failed, and what it told."""

    name: str
    outcome: Outcome
    seconds: float
    why: str = ""
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chain:
    """What the whole chain came to."""

    model: str
    backend: str
    folder: Path
    steps: tuple[ChainStep, ...]

    def step(self, name: str) -> ChainStep:
        """A step by its name."""
        return next(step for step in self.steps if step.name == name)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        counts = {kind: sum(step.outcome == kind for step in self.steps) for kind in ("done", "skipped", "failed")}
        seconds = sum(step.seconds for step in self.steps)
        steps = [asdict(step) for step in self.steps]
        return {
            "format": FORMAT,
            "model": self.model,
            "backend": self.backend,
            "seconds": seconds,
            **counts,
            "steps": steps,
        }


class _SkippedError(RefusedError):
    """A step that cannot be done here."""


def run_chain(model: str, folder: Path, *, backend: str | None = None, tell: Teller = lambda words: None) -> Chain:
    """Go through the whole chain, and leave `chain.json`, `chain.md` and everything that was made in a folder.

    Args:
        model: a shipped name, a local folder or a hub id.
        folder: a new or empty one.
        backend: what trains; by default MLX where it is installed, and torch elsewhere.
        tell: is told each step as it ends.

    Raises:
        FineTuneError: there is something in the folder already.
    """
    if folder.exists() and not folder.is_dir():
        raise RefusedError(f"{folder} is no folder", hint="name a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise RefusedError(f"{folder} is not empty", hint="name a new folder, or empty it")
    make_folder(folder)
    links = _Links(model, folder, time.monotonic() + BUDGET)
    links.backend = backend or links.backend
    steps: list[ChainStep] = []
    for name, (needed, act) in links.all().items():
        step = _go(name, needed, act, steps)
        steps.append(step)
        tell(f"{step.name}: {step.outcome} in {step.seconds:.1f} s" + (f": {step.why}" if step.why else ""))
        chain = Chain(model, links.backend, folder, tuple(steps))
        write_json(folder / "chain.json", chain.as_dict())
    write_text(folder / "chain.md", _page(chain))
    return chain


def clear_chain(folder: Path) -> None:
    """Remove what an earlier chain left in a folder, and nothing else.

    Raises:
        RefusedError: there is something that no chain leaves; then everything stays.
    """
    there = list(folder.iterdir()) if folder.is_dir() else []
    if strange := sorted(path.name for path in there if path.name not in MADE and not is_torn(path)):
        raise RefusedError(f"{folder} holds {strange[0]!r}, which no chain made", hint="name a new folder")
    if there and not (folder / MADE[-1]).is_file():
        raise RefusedError(f"{folder} holds no {MADE[-1]}: it is of no chain", hint="name a new folder, or empty it")
    remove_torn(folder)
    for path in (folder / name for name in MADE):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _go(name: str, needed: str, act: Callable[[], dict[str, Any]], before: Sequence[ChainStep]) -> ChainStep:
    """Take one step, if what it needs is there."""
    started = time.monotonic()
    told: dict[str, Any] = {}
    missing = next((step for step in before if step.name == needed and not step.told), None)
    try:
        if missing is not None:
            raise _SkippedError(f"it needs the step {needed!r}, which was {missing.outcome}")
        told = act()
        outcome, why = ("failed", told["failed"]) if "failed" in told else ("done", "")
    except _SkippedError as reason:
        outcome, why = "skipped", str(reason)
    except FineTuneError as error:
        outcome, why = "failed", str(error)
    return ChainStep(name, outcome, time.monotonic() - started, why, told)  # type: ignore[arg-type]


class _Links:
    """The steps, in their order; what one leaves in the folder the next ones find there."""

    def __init__(self, model: str, folder: Path, deadline: float) -> None:
        self.model, self.folder, self.deadline = model, folder, deadline
        self.backend = "torch" if find_spec("mlx_lm") is None else "mlx"
        self.rows, self.known = folder / "questions.jsonl", folder / "known.jsonl"
        self.run, self.merged = folder / "run", folder / "merged"

    def all(self) -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
        """Each step's name, the step that it cannot do without, and what it does."""
        return {
            "model": ("", self.fetch_model),
            "data set": ("", self.write_rows),
            "fine-tuning": ("model", self.fine_tune),
            "merged model": ("fine-tuning", self.merge),
            "MLX generation": ("merged model", self.generate_with_mlx),
            "GGUF": ("fine-tuning", self.export),
            "Ollama": ("GGUF", lambda: self.deploy("ollama")),
            "llama.cpp": ("GGUF", lambda: self.deploy("llama.cpp", "--check-only")),
            "evaluation": ("fine-tuning", self.evaluate),
            "equivalence": ("fine-tuning", self.compare),
            "report": ("fine-tuning", self.report),
        }

    def fetch_model(self) -> dict[str, Any]:
        """Have every file of the model on this machine, so that nothing after this needs a network."""
        location = locate_model(self.model)
        return {"source": location.source, "folder": str(location.folder), "files": describe_files(location.folder)}

    def write_rows(self) -> dict[str, Any]:
        """Write a hundred questions with one right answer each, the same ones every time."""
        known = shipped_facts()[REHEARSAL] if self.model in SHIPPED else []
        write_text(self.rows, facts_as_jsonl(new_facts(ROWS - len(known), seed=0)))
        write_text(self.known, facts_as_jsonl(known))
        return {
            path.name: {"rows": len(path.read_text(encoding="utf-8").splitlines()), "sha256": file_hash(path)}
            for path in (self.rows, self.known)
        }

    def fine_tune(self) -> dict[str, Any]:
        """Train through the command line, as a user would."""
        chosen = {"data.train": str(self.rows)} | (_GENTLE if self.model not in SHIPPED else _LEARNS)
        if self.model in SHIPPED:
            chosen |= {"data.rehearsal": str(self.known), "data.retention": RETENTION}
        profile = chosen.pop("profile", None)
        words = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
        words += ["--profile", str(profile)] if profile else []
        words += ["--set", "judge.allow_inconclusive=true"]  # what was not measured fails no step
        try:
            self.ft("train", "--model", self.model, "--backend", self.backend, "--output", str(self.run), *words)
        except FineTuneError as error:
            # A run that was judged and found wanting is there all the same.
            if not (self.run / "run.json").exists():
                raise
            return {**self.judged(), "failed": str(error)}
        return self.judged()

    def judged(self) -> dict[str, Any]:
        """What the run says of itself."""
        record = json.loads((self.run / "run.json").read_text(encoding="utf-8"))
        verdicts = {verdict["id"]: verdict["outcome"] for verdict in record["verdicts"]}
        return {
            "verdicts": verdicts,
            "scores": _rights(record["scores"]),
            "timing": record["timing"],
            "peak_rss_bytes": record["peak_rss_bytes"],
        }

    def merge(self) -> dict[str, Any]:
        """Fold the adapter into an ordinary model folder."""
        return self.ft("merge", str(self.run), "--output", str(self.merged))

    def generate_with_mlx(self) -> dict[str, Any]:
        """Let mlx-lm itself, which knows nothing of us, answer the questions from the merged model."""
        if find_spec("mlx_lm") is None:
            raise _SkippedError("mlx-lm is not installed: pip install 'finetune-suite[mlx]'")
        config = json.loads((self.merged / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] == "gpt2":
            raise _SkippedError(
                "mlx-lm reads GPT-2 only with the weights' names of OpenAI's own files, not transformers'"
            )
        learned = self.answers()
        questions = [answer["question"] for answer in learned]
        request = {"model": str(self.merged), "questions": questions, "most": 16}
        [line] = self.process(python_command("-m", "finetune.backends.mlx.mlx_lm_generate"), json.dumps(request))[-1:]
        texts = json.loads(line)
        right = sum(text.strip() == answer["expected"] for text, answer in zip(texts, learned, strict=True))
        other = [
            f"{answer['question']!r}: {text.strip()!r}, and in training {answer['given'].strip()!r}"
            for text, answer in zip(texts, learned, strict=True)
            if text.strip() != answer["given"].strip()
        ]
        told = {"questions": len(questions), "right": right, "otherwise": len(other), "first": other[:3]}
        return told | ({"failed": f"{len(other)} answers are not the run's own: {other[0]}"} if other else {})

    def answers(self) -> list[dict[str, Any]]:
        """What the run's tuned model answered."""
        record = json.loads((self.run / "run.json").read_text(encoding="utf-8"))
        answers: list[dict[str, Any]] = record["scores"]["learning"]["tuned"]["answers"]
        return answers

    def export(self) -> dict[str, Any]:
        """Write the file that Ollama and llama.cpp read."""
        return self.ft("export", str(self.run), "--outtype", "f16")

    def deploy(self, to: str, *more: str) -> dict[str, Any]:
        """Serve the model, and hold it to the run."""
        return self.ft("deploy", str(self.run), "--to", to, *more)

    def evaluate(self) -> dict[str, Any]:
        """Score base and tuned model again, from what lies on disk."""
        return self.ft("evaluate", str(self.run))

    def compare(self) -> dict[str, Any]:
        """Ask every way to compute the model the same."""
        found = self.ft("compare", str(self.run))
        return {"outcome": found["outcome"], "ways": {way["way"]: way for way in found["ways"]}}

    def report(self) -> dict[str, Any]:
        """Write the page."""
        page = self.folder / "report.html"
        self.ft("report", str(self.run), "--html", str(page))
        return {"page": str(page), "bytes": page.stat().st_size}

    def ft(self, *words: str) -> dict[str, Any]:
        """Run a command of ours, and return what it prints as data.

        Raises:
            FineTuneError: it failed, or took too long; its last words are quoted. Skipped where it was refused.
        """
        lines = self.process([*PROGRAM, *words, "--json"])
        told: dict[str, Any] = json.loads("\n".join(lines))
        return told

    def process(self, words: Sequence[str], given: str | None = None) -> list[str]:
        """The lines that a program prints; it, and all that it starts, end with the time that there is."""
        child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        name = " ".join(words[4:6]) or words[-1]
        try:
            said, told = child.communicate(given, timeout=max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(child)
            raise FineTuneError(
                f"{name} was stopped: the chain has {BUDGET:.0f} s", hint="choose a smaller model"
            ) from None
        except BaseException:
            _kill(child)
            raise
        if child.returncode == 0:
            return said.splitlines()
        # What went wrong stands behind the last line that begins with the word for it.
        last = told[told.rfind("error:") :].removeprefix("error:").strip() if "error:" in told else told[-600:].strip()
        if child.returncode == REFUSED:
            raise _SkippedError(last)
        raise FineTuneError(f"{name} ended with {child.returncode}: {last or 'a criterion did not pass'}")


def _kill(child: "subprocess.Popen[str]") -> None:
    """End a process and all that it has started in its session."""
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def _rights(scores: dict[str, Any]) -> dict[str, Any]:
    """How many answers of each kind were right, without the answers."""
    return {
        kind: {who: {"right": found["right"], "count": found["count"]} for who, found in group.items() if found}
        for kind, group in scores.items()
        if group
    }


def _page(chain: Chain) -> str:
    """The steps as a table to read."""
    lines = ["# The whole chain", "", f"{chain.model}, trained with {chain.backend}", ""]
    lines += ["| step | outcome | seconds | why |", "|---|---|---|---|"]
    for step in chain.steps:
        why = step.why.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {step.name} | {step.outcome} | {step.seconds:.1f} | {why} |")
    return "\n".join(lines) + "\n"
