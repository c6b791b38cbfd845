"""Makes and opens Llamas in plain NumPy; whatever a file holds that this cannot compute is refused here."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from finetune.abilities import ABILITIES
from finetune.backends.reference.architecture import EMBEDDING, HEAD, read_architecture
from finetune.backends.reference.session import ReferenceSession
from finetune.backends.reference.weights import check_tensors, read_tensors
from finetune.distributed.data_parallel import SingleProcess
from finetune.distributed.environment import refuse_launched
from finetune.errors import ModelError
from finetune.models.quantize import refuse_schemes
from finetune.models.shape import read_config, weight_files
from finetune.ports import Group
from finetune.records import ModelLocation, Quantization


class ReferenceBackend:
    """LoRA on a float64 NumPy Llama with hand-written gradients."""

    name = "reference"
    abilities = ABILITIES["reference"]

    def versions(self) -> dict[str, str]:
        """Name and version of each library that computes."""
        return {"numpy": np.__version__, "safetensors": safetensors.__version__}

    def join(self) -> Group:
        """A group of one: this backend knows no other process.

        Raises:
            RefusedError: a launcher has started several, and each would make the same run.
        """
        refuse_launched(os.environ, "reference")
        return SingleProcess()

    def create(self, config: Mapping[str, Any], folder: Path, seed: int) -> None:
        """Write a Llama of random weights in float32: normal with `initializer_range` (0.02), norms one, padding zero.

        Raises:
            ModelError: as `open`, of the config.
        """
        config = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", **config}
        shape = read_architecture(config, "the new model")
        random = np.random.Generator(np.random.PCG64(seed))
        spread = config.get("initializer_range", 0.02)
        weights = {
            name: random.normal(0.0, spread, size) if len(size) == 2 else np.ones(size)
            for name, size in shape.tensors().items()
        }
        if config.get("pad_token_id") is not None:
            weights[f"{EMBEDDING}.weight"][config["pad_token_id"]] = 0.0
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(
            {name: weight.astype(np.float32) for name, weight in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )

    def open(
        self,
        location: ModelLocation,
        dtype: str,
        pad_id: int,
        *,
        quantize: Quantization | None = None,
        device: str = "auto",
    ) -> ReferenceSession:
        """Load a Llama's weights; float32, float16 and bfloat16 files alike become float64, which holds them exactly.

        Raises:
            ModelError: the architecture is not one that this backend computes, a file is corrupt, a weight is missing,
                unknown or of another shape, or the model is to compute in another dtype than float32 or float64, or is
                quantised or to be.
        """
        owner = f"model {location.name!r} in {location.folder}"
        if device not in ("auto", *self.abilities.devices):
            raise ModelError(
                "model.device is gpu, but the reference backend computes on the processor only",
                hint="set model.device to cpu, or use another backend",
            )
        if dtype not in ("float32", "float64"):
            raise ModelError(
                f"the reference backend always computes in float64 and cannot imitate {dtype}",
                hint="set model.dtype to float32, or use the torch backend",
            )
        config = read_config(location.folder)
        refuse_schemes(config, quantize, self.name, owner)
        shape = read_architecture(config, owner)
        weights: dict[str, Any] = {}
        for file in weight_files(location.folder):
            weights |= read_tensors(file, owner)
        expected = shape.tensors()
        # Of no weight's own: old files carry RoPE's frequencies, and a tied head may have been saved twice.
        twice = {name for name in weights if name.endswith(".rotary_emb.inv_freq")}
        twice |= {f"{HEAD}.weight"} if shape.tie_word_embeddings else set()
        weights = {name: weight for name, weight in weights.items() if name not in twice}
        check_tensors(weights, expected, owner)
        return ReferenceSession(shape, {name: weights[name] for name in expected}, location, pad_id)


BACKEND = ReferenceBackend
