"""Tier 3: the whole chain from a model's name to a served model, each step judged, all of it held to the run."""

import json
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finetune.models.locate import SHIPPED
from finetune.verify.chain import ROWS, Chain, clear_chain, run_chain

pytestmark = pytest.mark.tier3
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

MODEL = os.environ.get("FT_E2E_MODEL_ID") or SHIPPED[0]
STEPS = (
    "model",
    "data set",
    "fine-tuning",
    "merged model",
    "MLX generation",
    "GGUF",
    "Ollama",
    "llama.cpp",
    "evaluation",
    "equivalence",
    "report",
)
QUESTIONS = "01c89cf1f3f4f592727327a56b22ac7a18ec0cb261ace7b194b9996750a82c59"
"""The hash of the shipped models' questions."""
IDENTICAL = ("merged", "torch", "reference", "gguf-f32", "gguf-f16", "server")
"""Ways whose greedy text is the trainer's own, of every question."""


@cache
def chain() -> Chain:
    """The chain, gone through once; what it made is kept in `FT_ARTIFACTS`."""
    folder = Path(os.environ.get("FT_ARTIFACTS") or ".finetune/chain")
    clear_chain(folder)
    return run_chain(MODEL, folder, tell=lambda words: print(words, flush=True))


@pytest.mark.parametrize("name", STEPS)
def test_chain_step(name: str, record_property: Callable[[str, object], None]) -> None:
    """Each step of the chain is done, or says what is missing here and how to get it."""
    step = chain().step(name)
    record_property(f"score.chain {name} seconds", step.seconds)
    if step.outcome == "skipped":
        pytest.skip(step.why)
    assert step.outcome == "done", step.why


@pytest.mark.skipif(MODEL not in SHIPPED, reason=f"FT_E2E_MODEL_ID={MODEL}: not every step knows every kind of model")
def test_chain_of_a_shipped_model_skips_only_what_is_missing_here() -> None:
    """Nothing is refused of a shipped model: what is skipped are Ollama, where none answers, and mlx-lm's GPT-2."""
    missing = {"Ollama"} | ({"MLX generation"} if find_spec("mlx_lm") is None or "gpt2" in MODEL else set())
    assert {step.name for step in chain().steps if step.outcome == "skipped"} <= missing


def test_chain_tells_every_step_once() -> None:
    """There are 11 steps, in order; the table and the JSON that are left tell the same."""
    found = chain()
    assert tuple(step.name for step in found.steps) == STEPS
    told = json.loads((found.folder / "chain.json").read_text(encoding="utf-8"))
    assert [step["name"] for step in told["steps"]] == list(STEPS)
    assert told["done"] + told["skipped"] + told["failed"] == len(STEPS)
    page = (found.folder / "chain.md").read_text(encoding="utf-8")
    assert all(f"| {step.name} | {step.outcome} |" in page for step in found.steps)


def test_chain_asks_a_hundred_questions_the_same_ones_every_time() -> None:
    """The rows are 100, and byte for byte those of any other time."""
    told = done("data set")
    assert sum(file["rows"] for file in told.values()) == ROWS == 100
    if MODEL in SHIPPED:
        assert told["questions.jsonl"]["sha256"] == QUESTIONS


def test_chain_answers_are_those_of_the_run_everywhere() -> None:
    """Merged model, other backends, GGUF in f32 and f16, and the server say what the trainer says, word for word."""
    ways = done("equivalence")["ways"]
    for name in IDENTICAL:
        if ways.get(name, {"outcome": "skipped"})["outcome"] != "skipped":
            assert ways[name]["drift"]["partings"] == [], name
    broken = {name: way["reason"] for name, way in ways.items() if way["outcome"] == "failed"}
    assert broken == {}
    assert len(ways) >= 8


@pytest.mark.skipif(MODEL not in SHIPPED, reason=f"FT_E2E_MODEL_ID={MODEL}: what is learned is known of shipped models")
def test_chain_learns_and_keeps(record_property: Callable[[str, object], None]) -> None:
    """The shipped model learns at least nine of ten new answers, and the chain's scores are those of the run."""
    learning, again = done("fine-tuning")["scores"]["learning"], done("evaluation")["trained questions"]
    assert learning["tuned"]["right"] >= 0.9 * learning["tuned"]["count"]
    assert learning["base"]["right"] <= 0.2 * learning["base"]["count"]
    assert (again["tuned"], again["count"]) == (learning["tuned"]["right"], learning["tuned"]["count"])
    record_property("score.chain learning", learning["tuned"]["right"] / learning["tuned"]["count"])


def done(name: str) -> dict[str, Any]:
    """What a step told; what needs it is skipped where it was."""
    step = chain().step(name)
    if step.outcome == "skipped":
        pytest.skip(step.why)
    assert step.outcome == "done", step.why
    return step.told
