"""PEFT: is a target that fits no module told of, beside one that does?"""

import warnings

import peft
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(target_modules=["q_proj", "other_proj"]))
about = [str(each.message) for each in told if "other_proj" in str(each.message)]
print("expected: a refusal or a warning that names other_proj")
print(f"got: adapters on {model.targeted_module_names}; said of it: {about or None}")
