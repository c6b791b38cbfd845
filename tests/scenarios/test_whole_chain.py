"""Tier 3: the whole chain as its users live it, command by command; all that it makes is held to the run."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finetune.data.facts import new_facts
from finetune.data.shipped import REHEARSAL, RETENTION, facts_as_jsonl, shipped_facts
from finetune.files import write_text
from finetune.models.locate import SHIPPED
from finetune_strategies.scratch import lasting_folder
from support.real_ollama import serving

pytestmark = pytest.mark.tier3
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

MODEL = os.environ.get("FT_E2E_MODEL_ID") or SHIPPED[0]
ROWS = 100
SECONDS = 900
REFUSED = 3
IDENTICAL = ("merged", "torch", "reference", "gguf-f32", "gguf-f16", "server")
"""Ways whose greedy text is the trainer's own, of every question."""
SETTINGS = (
    ["--profile", "demo", "--set", "training.epochs=24", "--set", "judge.memory_batch_size=2"]
    if MODEL in SHIPPED
    else [
        f"--set={each}"
        for each in ("training.learning_rate=1e-3", "training.epochs=10", "judge.control=never", "judge.memory=never")
    ]
)


def ft(*words: str) -> dict[str, Any]:
    """What a command prints as data; what is refused here, for something is missing, is skipped."""
    done = process("-c", "from finetune.cli import main; main()", *words, "--json")
    if done.returncode == REFUSED:
        pytest.skip(done.stderr.strip()[-300:])
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def process(*words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """A program of Python's."""
    return subprocess.run([sys.executable, *words], input=given, capture_output=True, text=True, timeout=SECONDS)


@cache
def run() -> Path:
    """The run, trained once through the command line on a hundred questions with one right answer each."""
    folder = Path(os.environ.get("FT_ARTIFACTS") or lasting_folder("chain"))
    known = shipped_facts()[REHEARSAL] if MODEL in SHIPPED else []
    rows, kept = folder / "questions.jsonl", folder / "known.jsonl"
    write_text(rows, facts_as_jsonl(new_facts(ROWS - len(known), seed=0)))
    write_text(kept, facts_as_jsonl(known))
    data = ["--set", f"data.train={rows}", "--set", "judge.allow_inconclusive=true"]
    if MODEL in SHIPPED:
        data += ["--set", f"data.rehearsal={kept}", "--set", f"data.retention={RETENTION}"]
    backend = "torch" if find_spec("mlx_lm") is None else "mlx"
    ft("train", "--model", MODEL, "--backend", backend, "--output", str(folder / "run"), *data, *SETTINGS)
    return folder / "run"


def record() -> dict[str, Any]:
    """What the run says of itself."""
    said: dict[str, Any] = json.loads((run() / "run.json").read_text(encoding="utf-8"))
    return said


@cache
def merged() -> Path:
    """The merged model."""
    folder = run().with_name("merged")
    ft("merge", str(run()), "--output", str(folder))
    return folder


@cache
def exported() -> dict[str, Any]:
    """The GGUF file."""
    return ft("export", str(run()), "--outtype", "f16")


def test_chain_learns_and_keeps(record_property: Callable[[str, object], None]) -> None:
    """A shipped model learns nine of ten new answers at least; the scores from the disk are those of the run."""
    learning = record()["scores"]["learning"]
    again = ft("evaluate", str(run()))["trained questions"]
    assert (again["tuned"], again["count"]) == (learning["tuned"]["right"], learning["tuned"]["count"])
    if MODEL in SHIPPED:
        assert learning["tuned"]["right"] >= 0.9 * learning["tuned"]["count"]
        assert learning["base"]["right"] <= 0.2 * learning["base"]["count"]
    record_property("score.chain learning", learning["tuned"]["right"] / learning["tuned"]["count"])


def test_chain_mlx_lm_answers_as_the_run_did() -> None:
    """mlx-lm itself, which knows nothing of us, says from the merged model what the run's tuned model said."""
    pytest.importorskip("mlx_lm", reason="needs the mlx extra: pip install 'finetune-suite[mlx]'")
    config = json.loads((merged() / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "gpt2":
        pytest.skip("mlx-lm reads GPT-2 only with the weights' names of OpenAI's own files, not transformers'")
    learned = record()["scores"]["learning"]["tuned"]["answers"]
    asked = {"model": str(merged()), "questions": [each["question"] for each in learned], "most": 16}
    done = process("-m", "finetune.backends.mlx.mlx_lm_generate", given=json.dumps(asked))
    texts = json.loads(done.stdout.splitlines()[-1])
    assert [text.strip() for text in texts] == [each["given"].strip() for each in learned]


@pytest.mark.parametrize("to", [("ollama",), ("llama.cpp", "--check-only")], ids=["ollama", "llama.cpp"])
def test_chain_serves_what_was_trained(to: tuple[str, ...], tmp_path: Path) -> None:
    """The served model is held to the run; of Ollama the one that runs, or that `make ollama` got."""
    assert exported()
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if to == ("ollama",) and "OLLAMA_HOST" not in os.environ:
            with contextlib.suppress(LookupError):
                patch.setenv("OLLAMA_HOST", stack.enter_context(serving(tmp_path)))
        assert ft("deploy", str(run()), "--to", *to)


def test_chain_answers_are_those_of_the_run_everywhere() -> None:
    """Merged model, other backends, GGUF in f32 and f16, and the server say what the trainer says, word for word."""
    merged(), exported()
    paths = {path["path"]: path for path in ft("compare", str(run()))["paths"]}
    for name in IDENTICAL:
        if paths.get(name, {"outcome": "not applicable"})["outcome"] != "not applicable":
            assert paths[name]["drift"]["mismatches"] == [], name
    assert {name: path["reason"] for name, path in paths.items() if path["outcome"] == "failed"} == {}
    assert len(paths) >= 8


def test_chain_ends_in_a_page() -> None:
    """The report of the run is written."""
    page = run().with_name("report.html")
    ft("report", str(run()), "--html", str(page))
    assert page.stat().st_size > 1_000
