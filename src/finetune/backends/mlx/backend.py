"""Makes and opens models with MLX and mlx-lm; every foreign exception is mapped to one of ours here, at the wall."""

import functools
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from finetune.abilities import ABILITIES
from finetune.backends.mlx.blas import blas_name, blas_note
from finetune.backends.mlx.group import join_group
from finetune.backends.mlx.load import build_model, load_model, put_weights, write_config
from finetune.backends.mlx.names import WeightNames
from finetune.backends.mlx.session import MlxSession
from finetune.backends.mlx.tensors import DTYPES, write_tensors
from finetune.errors import ModelError, RefusedError, install_line
from finetune.models.quantize import refuse_schemes
from finetune.models.shape import read_config
from finetune.ports import Group
from finetune.records import ModelLocation, Quantization

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


class MlxBackend:
    """LoRA with MLX on the architectures of mlx-lm: on the GPU of Apple silicon, or on a processor."""

    name = "mlx"
    abilities = ABILITIES["mlx"]

    def __init__(self) -> None:
        _tell_once()

    def versions(self) -> dict[str, str]:
        """Name and version of each library that computes; of the BLAS, which MLX calls without a GPU, its name."""
        told = {"mlx": version("mlx"), "mlx-lm": version("mlx-lm")}
        return told | ({"blas": blas_name()} if mx.default_device() == mx.cpu else {})

    def join(self) -> Group:
        """The processes that mlx.launch has started together with this one."""
        return join_group()

    def create(self, config: Mapping[str, Any], folder: Path, seed: int) -> None:
        """Write a model of random weights in float32: normal with `initializer_range` (0.02), norms one, biases zero.

        Raises:
            ModelError: mlx-lm does not know the architecture, computes it otherwise than the config has it, or does
                not read its weights by the names that it gives them itself.
        """
        kind = str(config.get("model_type"))
        named = {"architectures": [_ARCHITECTURES[kind]]} if kind in _ARCHITECTURES else {}
        config = {**named, "dtype": "float32", **config}
        # transformers ties GPT-2's head and leaves a Llama's free, unless the config says otherwise.
        model = build_model(config, "the new model", tied=kind == "gpt2")
        shapes = {name: tensor.shape for name, tensor in tree_flatten(model.parameters())}
        keys = mx.random.split(mx.random.key(seed), len(shapes))
        spread = config.get("initializer_range", 0.02)
        drawn = {
            name: _drawn(name, shape, spread, key) for (name, shape), key in zip(shapes.items(), keys, strict=True)
        }
        if (pad := config.get("pad_token_id")) is not None:
            table = next(name for name in drawn if name.endswith(("embed_tokens.weight", "wte.weight")))
            drawn[table][pad] = 0.0
        weights = WeightNames(kind, frozenset()).to_files(drawn)
        put_weights(model, WeightNames(kind, frozenset(weights)), weights, "the new model")
        found = dict(tree_flatten(model.parameters()))
        if not all(mx.array_equal(found[name], tensor) for name, tensor in drawn.items()):
            raise ModelError(f"mlx-lm reads the weights of {kind} in another form than it keeps them")
        write_config(config, folder)
        write_tensors(weights, folder / "model.safetensors")

    def open(
        self,
        location: ModelLocation,
        dtype: str,
        pad_id: int,
        *,
        quantize: Quantization | None = None,
        device: str = "auto",
    ) -> MlxSession:
        """Load the model's weights, all of them from its files; what mlx-lm has quantised there stays so.

        Args:
            quantize: how to quantise a full model as it is loaded.

        Raises:
            ModelError: the architecture is unknown to mlx-lm or computed otherwise by it, a file is corrupt, a weight
                is missing, unknown or of another shape, or the model is quantised in another way or cannot be.
            RefusedError: a GPU is asked for where there is none.
        """
        _compute_on(device)
        if dtype not in DTYPES:
            raise ModelError(f"the mlx backend computes in {' or '.join(DTYPES)}, not in {dtype}")
        refuse_schemes(
            read_config(location.folder), quantize, self.name, f"model {location.name!r} in {location.folder}"
        )
        return MlxSession(load_model(location, dtype, quantize), location, pad_id)


BACKEND = MlxBackend


def _compute_on(device: str) -> None:
    gpu = mx.is_available(mx.gpu)
    if device == "gpu" and not gpu:
        raise RefusedError(
            "model.device is gpu, but MLX sees none on this machine",
            hint=f"set model.device to cpu, or on Linux with an NVIDIA GPU: {install_line('mlx[cuda13]')}",
        )
    mx.set_default_device(mx.gpu if gpu and device != "cpu" else mx.cpu)


def _drawn(name: str, shape: tuple[int, ...], spread: float, key: mx.array) -> mx.array:
    if len(shape) > 1:
        return mx.random.normal(shape, scale=spread, key=key)
    return mx.zeros(shape) if name.endswith(".bias") else mx.ones(shape)


@functools.cache
def _tell_once() -> None:
    if note := blas_note():
        logging.getLogger(__name__).warning(note)
