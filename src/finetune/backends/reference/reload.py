"""Loads a saved adapter on a fresh base, or a saved model, in this process and compares its logits with those saved.

No framework is used. Started by `finetune.evidence.reload`. The logits compared are float32; so is the adapter on
disk, while the session that saved it computes with more digits: the difference is not zero, but far below a float32
model's own.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from finetune.backends.reference.backend import ReferenceBackend
from finetune.records import ModelLocation


def main() -> None:
    """Read one request from standard input, compare, print one JSON object."""
    request = json.load(sys.stdin)
    saved = load_file(request["logits"])
    wanted = [saved[str(index)] for index in range(len(request["prompts"]))]
    location = ModelLocation(request["folder"], Path(request["folder"]), "local")
    session = ReferenceBackend().open(location, request["dtype"], pad_id=0)
    base = [session.logits(ids) for ids in request["prompts"]]
    if "model" in request:
        saved_model = ModelLocation(request["model"], Path(request["model"]), "local")
        session = ReferenceBackend().open(saved_model, request["dtype"], pad_id=0)
    else:
        session.load_adapter(Path(request["adapter"]))
    tuned = [session.logits(ids) for ids in request["prompts"]]
    answer = {
        "prompts": len(wanted),
        "largest_logit": max(float(np.abs(logits).max()) for logits in wanted),
        "difference": max(float(np.abs(a - b).max()) for a, b in zip(tuned, wanted, strict=True)),
        "difference_from_base": max(float(np.abs(a - b).max()) for a, b in zip(base, wanted, strict=True)),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
