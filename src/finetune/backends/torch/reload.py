"""Loads a saved adapter on a fresh base in this process, with PEFT alone, and compares its logits with those saved.

A saved model is loaded by transformers alone.

Started by `finetune.evidence.reload`. Nothing of the session's own loading code is used, but for the settings of a
quantised base: what this process can do, any user of PEFT can do.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.backends.torch.packed import quantizing
from finetune.records import Quantization


def main() -> None:
    """Read one request from standard input, compare, print one JSON object."""
    request = json.load(sys.stdin)
    saved = load_file(request["logits"])
    dtype = getattr(torch, request["dtype"])
    opening = {"dtype": dtype, "local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    how = Quantization(**request["quantize"]) if request.get("quantize") else None
    packing = {"quantization_config": quantizing(Path(request["folder"]), how, dtype, "the base")} if how else {}
    model = AutoModelForCausalLM.from_pretrained(request["folder"], **opening, **packing).eval()
    if how:
        # bitsandbytes' own layers would round what they read, too; this is transformers' way to be rid of them.
        model = model.dequantize()
    with torch.no_grad():
        base = [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in request["prompts"]]
        if "model" in request:
            adapted = AutoModelForCausalLM.from_pretrained(request["model"], **opening).eval()
        else:
            adapted = PeftModel.from_pretrained(model, request["adapter"]).eval()
        tuned = [adapted(input_ids=torch.tensor([ids])).logits[0].float() for ids in request["prompts"]]
    wanted = [saved[str(index)] for index in range(len(request["prompts"]))]
    print(
        json.dumps(
            {
                "prompts": len(wanted),
                "largest_logit": max(float(logits.abs().max()) for logits in wanted),
                "difference": max(float((a - b).abs().max()) for a, b in zip(tuned, wanted, strict=True)),
                "difference_from_base": max(float((a - b).abs().max()) for a, b in zip(base, wanted, strict=True)),
            }
        )
    )


if __name__ == "__main__":
    main()
