"""Checks in a fresh process that a saved adapter, or a saved model, gives the same logits."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

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

    Args:
        location: the base.
        opening: the base's `dtype`, and `quantize` where it is quantised as it is loaded.

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
        return Reload(**ask_child(f"finetune.backends.{backend}.reload", request))
