"""Opens models with torch and transformers; every foreign exception is mapped to one of ours here, at the wall."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from finetune.backends.torch.device import choose_device
from finetune.backends.torch.group import join_group
from finetune.backends.torch.session import TorchSession
from finetune.errors import ModelError
from finetune.models.quantize import refuse_quantized
from finetune.models.shape import read_config
from finetune.ports import Group
from finetune.records import ModelLocation, Quantization

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TorchBackend:
    """LoRA with torch and PEFT."""

    name = "torch"
    abilities: frozenset[str] = frozenset({"memory"})

    def __init__(self) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    def versions(self) -> dict[str, str]:
        """Name and version of each library that computes."""
        import peft

        return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}

    def join(self) -> Group:
        """The processes that torchrun or accelerate has started together with this one."""
        return join_group()

    def create(self, config: Mapping[str, Any], folder: Path, seed: int) -> None:
        """Write a model of random weights and the given transformers config into an existing folder."""
        settings = transformers.AutoConfig.for_model(**config)
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder)

    def open(
        self,
        location: ModelLocation,
        dtype: str,
        pad_id: int,
        *,
        quantize: Quantization | None = None,
        device: str = "auto",
    ) -> TorchSession:
        """Load the model's weights, all of them from its files.

        Raises:
            ModelError: the architecture is unknown, a file is corrupt, a weight is missing, or the model is quantised
                or to be.
            RefusedError: a GPU is asked for where there is none, or where several processes train.
        """
        place = choose_device(device)
        owner = f"model {location.name!r} in {location.folder}"
        refuse_quantized(read_config(location.folder), quantize, self.name, owner)
        return TorchSession(load_model(location, dtype).to(place), location, pad_id)


BACKEND = TorchBackend


def load_model(location: ModelLocation, dtype: str) -> Any:
    """The causal language model in `location`, every weight read from its files and none made up.

    Raises:
        ModelError: as `TorchBackend.open`.
    """
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            location.folder, dtype=_DTYPES[dtype], output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {location.name!r} in {location.folder} cannot be loaded: {first}",
            hint="check that it is a causal language model whose weights are complete",
        ) from None
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"model {location.name!r} lacks {len(lacking)} weights, among them {lacking[0]}; they would be random",
            hint="get the model's weights again",
        )
    _fuse_activations(model)
    _train_every_word(model)
    return model


def _train_every_word(model: Any) -> None:
    """Let the word that pads be trained like any other where rows really hold it, as when it ends them too.

    As padding it has no loss and is never seen, and so no gradient anyway.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def _fuse_activations(model: Any) -> None:
    """Compute GPT-2's GELU in one kernel: the same formula, without keeping its five intermediate results."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
