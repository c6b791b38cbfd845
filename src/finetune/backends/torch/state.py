"""Writes and restores what a torch session is made of: adapter tensors, optimizer moments, random state."""

import contextlib
import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.adapters.choose import ends_with
from finetune.adapters.kinds import layer_tensor
from finetune.adapters.patterns import check_settings
from finetune.adapters.peft_files import ROWS, WEIGHTS, check_tensor_shapes, on_disk
from finetune.backends.torch import without_bitsandbytes
from finetune.backends.torch.packed import is_packed, turn_back, unpack
from finetune.errors import ModelError, RefusedError
from finetune.reading import read_json

_TENSORS = "state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(
    trainable: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    drawn: Mapping[str, torch.Tensor],
    folder: Path,
) -> None:
    """Write every trainable tensor, its optimizer moments and the random states `drawn` into `folder`."""
    tensors: dict[str, torch.Tensor] = dict(drawn)
    for name, tensor in trainable.items():
        tensors[f"weight/{name}"] = tensor.detach().contiguous()
        for moment in _MOMENTS:
            # Before a tensor's first step torch keeps nothing of it, and begins with zeros.
            start = torch.zeros(()) if moment == "step" else torch.zeros_like(tensor)
            value = optimizer.state.get(tensor, {}).get(moment, start)
            tensors[f"{moment}/{name}"] = torch.as_tensor(value).detach().contiguous()
    save_file(tensors, folder / _TENSORS)


def load_state(
    trainable: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, kinds: Collection[str], folder: Path
) -> dict[str, torch.Tensor]:
    """Restore what `save_state` wrote, all but the random states of these kinds, which are returned.

    Nothing is changed unless every tensor is there with its shape.

    Raises:
        RefusedError: the file is corrupt, or its tensors are not those of this model and adapter.
    """
    path = folder / _TENSORS
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RefusedError(f"checkpoint {path} cannot be read: {error}", hint="use an older checkpoint") from None
    expected = {f"{part}/{name}" for name in trainable for part in ("weight", *_MOMENTS)}
    wrong = (expected | set(kinds)) ^ set(saved)
    wrong |= {
        f"{part}/{name}"
        for name, tensor in trainable.items()
        for part in ("weight", *_MOMENTS[:2])
        if f"{part}/{name}" in saved and saved[f"{part}/{name}"].shape != tensor.shape
    }
    if wrong:
        raise RefusedError(
            f"checkpoint {path} does not fit this run: {len(wrong)} tensors differ, among them {min(wrong)}",
            hint="resume with the model, device and adapter settings that the run was started with",
        )
    with torch.no_grad():
        for name, tensor in trainable.items():
            tensor.copy_(saved[f"weight/{name}"])
            optimizer.state[tensor] = {moment: saved[f"{moment}/{name}"].to(tensor.device) for moment in _MOMENTS}
    return {kind: saved[kind] for kind in kinds}


def start_from(trainable: Mapping[str, torch.nn.Parameter], folder: Path) -> None:
    """Put the tensors of a saved adapter into trainable ones; nothing is changed unless every tensor fits.

    Raises:
        ModelError: the file is missing or corrupt, or a tensor is missing, unknown, of another shape or no float.
    """
    try:
        saved = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"adapter {folder} cannot be loaded: {error}", hint="get its files again") from None
    expected = {on_disk(name): tuple(tensor.shape) for name, tensor in trainable.items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items() if tensor.is_floating_point()}
    check_tensor_shapes(found, expected, folder)
    with torch.no_grad():
        for name, tensor in trainable.items():
            tensor.copy_(saved[on_disk(name)])


def whole_paths(model: Any, names: tuple[str, ...]) -> list[str]:
    """The whole paths of the modules meant: PEFT would take `norm` for the end of `input_layernorm`, too."""
    modules = [path for path, _ in model.named_modules()]
    return [path for name in names for path in ends_with(modules, name)]


@contextlib.contextmanager
def quiet_wrapping() -> Iterator[None]:
    """Keep back what PEFT says while it wraps a model: of a renamed attribute, and of turned layers that are packed."""
    with warnings.catch_warnings(), without_bitsandbytes():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def merged(model: Any) -> Any:
    """A full model without an adapter that computes the same; where there is one, or what is packed, a copy."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) and not is_packed(model):
        return model
    whole = copy.deepcopy(model)
    unpack(whole)
    whole = whole.merge_and_unload() if isinstance(whole, PeftModel) else whole
    turn_back(whole)
    return whole


def load_peft_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter in `folder` on it, through PEFT's own reader; every tensor must match.

    Raises:
        ModelError: a file is missing or corrupt, or a tensor is missing, unknown or of another shape.
    """
    from peft import PeftModel

    weights = folder / "adapter_model.safetensors"
    try:
        check_settings(read_json(folder / "adapter_config.json"))
        saved = set(load_file(weights))
        with quiet_wrapping():
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"adapter {folder} cannot be loaded on this model: {first}") from None
    names = [name for name, _ in adapted.named_parameters()]
    own = (".modules_to_save.", f".{ROWS}.")
    wanted = {on_disk(name) for name in names if layer_tensor(name) or any(each in name for each in own)}
    if saved != wanted:
        odd = sorted(saved ^ wanted)
        raise ModelError(
            f"adapter {folder} does not fit this model: {len(odd)} tensors are missing or unknown, first {odd[0]}",
            hint="use the base model that the adapter was trained on",
        )
    return adapted
