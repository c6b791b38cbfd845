"""Answers with mlx-lm alone from a model folder in this process: what it does, any user of that folder gets.

Started by `finetune.evidence.answering`; takes and gives what `finetune.backends.torch.plain` does.
"""

import json
import sys

import mlx.core as mx
from mlx_lm import load, stream_generate

from finetune.backends.mlx.tensors import first_line


def main() -> None:
    """Read one request from standard input, write logits to its file, print the ids of each answer."""
    request = json.load(sys.stdin)
    try:
        model, tokenizer = load(request["folder"])
    except ValueError as error:
        sys.stdout.write(json.dumps({"refused": f"mlx-lm does not load it: {first_line(error)}"}) + "\n")
        return
    model.set_dtype(mx.float32)
    ids = []
    rows: dict[str, mx.array] = {}
    for number, (prompt, steps) in enumerate(zip(request["prompts"], request["steps"], strict=True)):
        said = list(stream_generate(model, tokenizer, prompt, max_tokens=steps)) if steps else []
        ids.append([each.token for each in said if each.finish_reason != "stop"])
        places = [token for owner, token in request["places"] if owner == number]
        if places:
            logits = model(mx.array([[*prompt, *request["baseline"][number]]]))[0].astype(mx.float32)
            rows |= {f"{number} {token}": logits[len(prompt) - 1 + token] for token in places}
    mx.save_safetensors(request["logits"], rows)
    sys.stdout.write(json.dumps({"ids": ids}) + "\n")


if __name__ == "__main__":
    main()
