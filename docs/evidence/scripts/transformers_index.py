"""transformers: is a file read that a model's index names outside the model's folder?"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
with tempfile.TemporaryDirectory() as place:
    folder = Path(place, "model")
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "model.safetensors").rename(Path(place, "elsewhere.safetensors"))
    names = dict.fromkeys(LlamaForCausalLM(config).state_dict(), "../elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        LlamaForCausalLM.from_pretrained(folder)
about = [line for line in said.getvalue().splitlines() if "elsewhere" in line]
print("expected: a refusal or a warning that names ../elsewhere.safetensors")
print(f"got: loaded, said of it: {about or None}")
