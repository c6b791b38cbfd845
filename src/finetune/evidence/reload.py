"""Checks in a fresh process that a saved adapter, or a saved model, gives the same logits."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from finetune.evidence.rounding import factor_of, measure_rounding
from finetune.ports import Session
from finetune.processes import ask_child
from finetune.records import ModelLocation, Quantization, Reload


def check_reload(
    backend: str,
    session: Session,
    location: ModelLocation,
    saved: Path,
    *,
    prompts: Sequence[Sequence[int]],
    **opening: str | Quantization | None,
) -> Reload:
    """Compare the session's logits on `prompts` with those of the saved adapter or model in a fresh process.

    How far they may be apart is measured on the session itself: both compute the same weights in the same type.

    Args:
        location: the base.
        opening: the `dtype` that the session computes in, and `quantize` where the base was quantised as it was loaded.

    Raises:
        EvidenceError: the fresh process could not load what was saved.
    """
    kind = "model" if (saved / "config.json").exists() else "adapter"
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        logits = Path(folder) / "logits.safetensors"
        session.save_logits(prompts, logits)
        request = {
            "folder": str(location.folder),
            kind: str(saved.resolve()),
            "logits": str(logits),
            "prompts": [list(prompt) for prompt in prompts],
            **{key: asdict(value) if isinstance(value, Quantization) else value for key, value in opening.items()},
        }
        found = ask_child(f"finetune.backends.{backend}.reload", request)
    floor = measure_rounding(session, prompts).logit
    return Reload(**found, rounding=floor, allowed=factor_of(str(opening["dtype"])) * floor)
