"""Answers from a model folder through one of our backends, where transformers is not installed.

Started by `finetune.evidence.answering`; takes and gives what `finetune.backends.torch.plain` does.
"""

import json
import sys
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.evidence.answering import answers_of, rows_of
from finetune.evidence.drift import InferenceRequest
from finetune.records import ModelLocation


def main() -> None:
    """Read one request from standard input, write logits to its file, print the ids of each answer."""
    from safetensors.numpy import save_file

    request: dict[str, Any] = json.load(sys.stdin)
    asked = InferenceRequest(
        prompts=tuple(map(tuple, request["prompts"])),
        steps=tuple(request["steps"]),
        stops=tuple(request["stops"]),
        baseline=tuple(map(tuple, request["baseline"])),
        places=tuple((number, token) for number, token in request["places"]),
    )
    location = ModelLocation(request["folder"], Path(request["folder"]), "local")
    session = open_backend(request["backend"]).open(location, "float32", 0)
    rows = zip(asked.places, rows_of(session, asked), strict=True)
    save_file({f"{number} {token}": row for (number, token), row in rows}, request["logits"])
    sys.stdout.write(json.dumps({"ids": answers_of(session, asked)}) + "\n")


if __name__ == "__main__":
    main()
