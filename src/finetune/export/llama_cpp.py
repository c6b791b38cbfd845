"""Asks llama.cpp in a subprocess: loads a GGUF file, tokenizes texts, continues prompts.

A broken file can crash that process, and not ours.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evidence.drift import NextTokens
from finetune.export.llama_runtime import Line, load_exact
from finetune.processes import ask_child

MOST_PROBABILITIES = 1000
"""Of how many tokens, the likeliest first, llama.cpp tells the probability at each step."""
_PATIENCE = 300
"""Seconds that one answer may take."""


@dataclass(frozen=True, slots=True)
class Questions:
    """What is asked of a file: the tokens of texts, greedy continuations of prompts, the next token of sequences.

    `steps` is how long a continuation may be, `context` how many tokens llama.cpp must read, and `plain_id` a token
    whose text is a whole character: without one llama.cpp tells no probabilities.
    """

    texts: Sequence[str]
    prompts: Sequence[Sequence[int]]
    sequences: Sequence[Sequence[int]]
    steps: int
    context: int
    plain_id: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """What followed a prompt: ids without the one that ended it, their text, and whether one did."""

    ids: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True, slots=True)
class Answers:
    """What llama.cpp said: ids of each text as plain text, as markup, and with what it puts around a text."""

    plain: tuple[tuple[int, ...], ...]
    markup: tuple[tuple[int, ...], ...]
    around: tuple[tuple[int, ...], ...]
    continuations: tuple[Continuation, ...]
    following: tuple[NextTokens, ...]


def ask_llama_cpp(model: Path, questions: Questions, *, adapter: Path | None = None, timeout: float = 3600) -> Answers:
    """Load a file, with an adapter on it if there is one, and ask.

    Raises:
        EvidenceError: llama.cpp could not load it, or failed; its words are quoted.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        numbers = Path(folder) / "numbers.npz"
        request = {
            "model": str(model),
            "adapter": str(adapter) if adapter else None,
            "numbers": str(numbers),
            **{key: _plain(getattr(questions, key)) for key in Questions.__slots__},
        }
        told = ask_child("finetune.export.llama_cpp", request, timeout=timeout)
        with np.load(numbers) as stored:
            following = tuple(
                NextTokens(stored[f"ids{i}"], stored[f"logs{i}"]) for i in range(len(questions.sequences))
            )
    plain, markup, around = (tuple(map(tuple, told[kind])) for kind in ("plain", "markup", "around"))
    continuations = (Continuation(tuple(ids), text, ended) for ids, text, ended in told["continuations"])
    return Answers(plain, markup, around, tuple(continuations), following)


def _plain(value: object) -> object:
    """The value with lists for all sequences but text, as JSON needs it."""
    return [_plain(one) for one in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def main() -> None:
    """Answer one request from standard input on standard output."""
    request = json.load(sys.stdin)
    adapter = request["adapter"]
    server = load_exact(Path(request["model"]), context=request["context"], adapter=Path(adapter) if adapter else None)
    line = Line(server.listening_address, timeout=_PATIENCE)
    told: dict[str, Any] = {
        kind: [line.ask("tokenize", {"content": text, **how})["tokens"] for text in request["texts"]]
        for kind, how in {
            "plain": {"add_special": False, "parse_special": False},
            "markup": {"add_special": False, "parse_special": True},
            "around": {"add_special": True, "parse_special": False},
        }.items()
    }
    told["continuations"] = [_continue(line, prompt, request["steps"]) for prompt in request["prompts"]]
    numbers: dict[str, Any] = {}
    for index, sequence in enumerate(request["sequences"]):
        likeliest = _next(line, sequence, request["plain_id"])
        numbers[f"ids{index}"] = np.array([one["id"] for one in likeliest], np.int64)
        numbers[f"logs{index}"] = np.array([one["logprob"] for one in likeliest], np.float64)
    np.savez(request["numbers"], **numbers)
    sys.stdout.write(json.dumps(told) + "\n")


def _continue(line: Line, prompt: Sequence[int], steps: int) -> tuple[list[int], str, bool]:
    asked = {"prompt": prompt, "n_predict": steps, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    done = line.ask("completion", asked)
    ended = done["stop_type"] == "eos"
    return done["tokens"][:-1] if ended else done["tokens"], done["content"], ended


def _next(line: Line, sequence: Sequence[int], plain_id: int) -> list[dict[str, Any]]:
    """The likeliest tokens after a sequence.

    llama.cpp reports probabilities only with a token whose text is a whole character. So the bias forces such a token;
    the probabilities reported are those from before the bias.
    """
    asked = {
        "prompt": sequence,
        "n_predict": 1,
        "temperature": 0,
        "n_probs": MOST_PROBABILITIES,
        "logit_bias": [[plain_id, 1e6]],
        "cache_prompt": True,
    }
    [step] = line.ask("completion", asked)["completion_probabilities"]
    likeliest: list[dict[str, Any]] = step["top_logprobs"]
    return likeliest


if __name__ == "__main__":
    main()
