"""PEFT: is an adapter for two layers that is put on a base of one told of?"""

import tempfile
import warnings

import peft
from transformers import LlamaConfig, LlamaForCausalLM


def base(layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2
        )
    )


with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    peft.get_peft_model(base(2), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    peft.PeftModel.from_pretrained(base(1), folder)
about = [str(each.message) for each in told if "key" in str(each.message) or "adapter" in str(each.message)]
print("expected: a refusal, or a warning that names the layers whose tensors were dropped")
print(f"got: loaded; said of it: {about or None}")
