"""Answers with plain transformers, and PEFT, from a model folder in this process: what they do, any user of it gets.

Started by `finetune.evidence.answering`; nothing of ours is used, and where to stop is what the folder says.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Read one request from standard input, write logits to its file, print the ids of each answer."""
    request = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(
        request["folder"], dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    if request["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"])
    model.eval()
    ids = []
    rows: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for number, (prompt, steps) in enumerate(zip(request["prompts"], request["steps"], strict=True)):
            asked = torch.tensor([prompt])
            said = asked
            if steps:
                said = model.generate(
                    asked, attention_mask=torch.ones_like(asked), max_new_tokens=steps, do_sample=False
                )
            ids.append(said[0, len(prompt) :].tolist())
            places = [token for owner, token in request["places"] if owner == number]
            if places:
                path = torch.tensor([[*prompt, *request["baseline"][number]]])
                logits = model(input_ids=path).logits[0].float()
                rows |= {f"{number} {token}": logits[len(prompt) - 1 + token].clone() for token in places}
    save_file(rows, request["logits"])
    sys.stdout.write(json.dumps({"ids": ids}) + "\n")


if __name__ == "__main__":
    main()
