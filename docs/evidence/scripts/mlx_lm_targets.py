"""mlx-lm: is a key that fits no module told of, beside one that does?"""

import contextlib
import io

import mlx.nn as nn
from mlx_lm.tuner.utils import linear_to_lora_layers

block, model = nn.Module(), nn.Module()
block.q_proj = nn.Linear(8, 8)
model.layers = [block]

keys = ["q_proj", "other_proj"]
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": keys})
adapted = [name for name, module in model.layers[0].named_modules() if type(module).__name__ == "LoRALinear"]
print("expected: a refusal or a warning that names other_proj")
print(f"got: adapters on {adapted}, said: {said.getvalue() or None}")
