"""Opens models with torch and transformers."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from finetune.abilities import ABILITIES, ONE_THREAD
from finetune.backends.torch.device import choose_device
from finetune.backends.torch.group import join_group
from finetune.backends.torch.load import load_model
from finetune.backends.torch.session import TorchSession
from finetune.models.quantize import refuse_schemes
from finetune.models.shape import read_config
from finetune.ports import Group
from finetune.records import ModelLocation, Quantization

_THREADS = torch.get_num_threads()


class TorchBackend:
    """LoRA with torch and PEFT."""

    name = "torch"
    abilities = ABILITIES["torch"]

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

    def create(self, config: Mapping[str, object], folder: Path, seed: int) -> None:
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

        Args:
            quantize: how bitsandbytes quantises a full model as it is loaded.

        Raises:
            ModelError: the architecture is unknown, a file is corrupt, a weight is missing, or the model is quantised
                or cannot be.
            MissingExtraError: bitsandbytes is not installed.
            RefusedError: a GPU is asked for where there is none, or where several processes train.
        """
        place = choose_device(device)
        owner = f"model {location.name!r} in {location.folder}"
        refuse_schemes(read_config(location.folder), quantize, self.name, owner)
        model = load_model(location, dtype, quantize).to(place)
        if place.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # A small model's products take less time than it takes to wake a thread. Where other programs keep the
            # cores busy, each of them waits for the slowest thread, and training takes many times as long.
            torch.set_num_threads(1 if sum(each.numel() for each in model.parameters()) < ONE_THREAD else _THREADS)
        return TorchSession(model, location, pad_id)


BACKEND = TorchBackend
