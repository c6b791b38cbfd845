"""Runs the shared comparison prompts through a session or, in a subprocess, a saved model."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.abilities import require_backend
from finetune.errors import ModelError
from finetune.evidence.drift import Ids, InferenceRequest, InferenceResponse, NextTokens, log_softmax
from finetune.ports import Session
from finetune.processes import ask_child

LogitsRow = NDArray[np.float32]
_PATIENCE = 3600
"""Seconds that a fresh process may take for all answers together."""


def answers_of(session: Session, request: InferenceRequest) -> tuple[Ids, ...]:
    """The session's greedy answers."""
    most = max(request.steps, default=0)
    return (
        request.cut(session.generate(request.prompts, most, request.stops))
        if most
        else tuple(() for _ in request.prompts)
    )


def rows_of(session: Session, request: InferenceRequest) -> tuple[LogitsRow, ...]:
    """The session's logits at each place, one prompt at a time."""
    from safetensors.numpy import load_file

    rows: dict[tuple[int, int], LogitsRow] = {}
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        path = Path(folder) / "logits.safetensors"
        for number in dict.fromkeys(number for number, _ in request.places):
            tokens = [token for owner, token in request.places if owner == number]
            session.save_logits([request.sequence((number, max(tokens)))], path)
            logits = load_file(path)["0"]
            start = len(request.prompts[number]) - 1
            rows |= {(number, token): logits[start + token].copy() for token in tokens}
    return tuple(rows[place] for place in request.places)


def ask_session(session: Session, request: InferenceRequest) -> InferenceResponse:
    """A session's answers and next tokens."""
    return InferenceResponse(answers_of(session, request), following_of(rows_of(session, request)))


def following_of(rows: Sequence[LogitsRow]) -> tuple[NextTokens, ...]:
    """Logits as next tokens: every id."""
    every = np.arange(len(rows[0]), dtype=np.int64) if rows else np.empty(0, np.int64)
    return tuple(NextTokens(every, log_softmax(row)) for row in rows)


def ask_folder(folder: Path, request: InferenceRequest, *, otherwise: str) -> InferenceResponse:
    """Answers of a model folder in a fresh process: plain transformers or, without it, one of our backends.

    Args:
        otherwise: the backend that loads it where transformers is not installed.

    Raises:
        EvidenceError: the fresh process could not load it or failed.
    """
    plain = all(find_spec(library) for library in ("torch", "transformers"))
    module = "finetune.backends.torch.plain" if plain else "finetune.evidence.answer_worker"
    return _ask_fresh(module, request, folder=folder, backend=otherwise)


def ask_peft(folder: Path, adapter: Path, request: InferenceRequest) -> InferenceResponse:
    """Answers of an adapter folder on a base's folder in a fresh process: transformers and PEFT alone.

    Raises:
        MissingExtraError: they are not installed.
        EvidenceError: the fresh process could not load it or failed.
    """
    require_backend("torch")
    return _ask_fresh("finetune.backends.torch.plain", request, folder=folder, adapter=adapter)


def ask_mlx_lm(folder: Path, request: InferenceRequest) -> InferenceResponse:
    """Answers of a model folder in a fresh process: mlx-lm alone.

    Raises:
        MissingExtraError: it is not installed.
        ModelError: it does not load such a model.
        EvidenceError: the fresh process failed.
    """
    require_backend("mlx")
    return _ask_fresh("finetune.backends.mlx.plain", request, folder=folder)


def _ask_fresh(
    module: str, request: InferenceRequest, *, folder: Path, backend: str = "", adapter: Path | None = None
) -> InferenceResponse:
    """What one of the programs that take such a request says.

    Raises:
        ModelError: it does not take such a model.
        EvidenceError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-") as place:
        logits = Path(place) / "logits.safetensors"
        paths = {"folder": str(folder), "adapter": str(adapter) if adapter else None, "logits": str(logits)}
        told = ask_child(module, {**paths, "backend": backend, **asdict(request)}, timeout=_PATIENCE)
        if "refused" in told:
            raise ModelError(str(told["refused"]))
        return InferenceResponse(request.cut(told["ids"]), following_of(_read_rows(logits, request)))


def _read_rows(path: Path, request: InferenceRequest) -> list[LogitsRow]:
    from safetensors.numpy import load_file

    found = load_file(path)
    return [found[f"{number} {token}"] for number, token in request.places]
