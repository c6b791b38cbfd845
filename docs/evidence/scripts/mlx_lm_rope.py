"""mlx-lm: does a model that transformers 5 saved keep its rotary base?"""

import tempfile

import torch
from mlx_lm.utils import load_model
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
)
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    model, _ = load_model(Path(folder))
print("expected: rope_theta 500000.0")
print(f"got: rope_theta {model.args.rope_theta:.1f}")
