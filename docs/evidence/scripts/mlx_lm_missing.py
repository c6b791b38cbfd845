"""mlx-lm: is an adapter file told of in which a tensor is missing?"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.utils import load_adapters

block, model = nn.Module(), nn.Module()
block.q_proj = nn.Linear(8, 8)
model.layers = [block]

lora = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["q_proj"]}
said = io.StringIO()
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    Path(folder, "adapter_config.json").write_text(json.dumps({"num_layers": 1, "lora_parameters": lora}))
    mx.save_safetensors(f"{folder}/adapters.safetensors", {"layers.0.q_proj.lora_a": mx.ones((8, 2))})
    load_adapters(model, folder)
print("expected: a refusal or a warning that names layers.0.q_proj.lora_b")
print(f"got: loaded, said: {said.getvalue() or None}")
