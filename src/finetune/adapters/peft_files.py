"""An adapter's files in PEFT's own format: their names, their settings, and which layers they speak of.

Next to the tensors lies `adapter_config.json`. A tensor of a layer at `path` is named `base_model.model.<path>.` and
what its kind says, such as `lora_A.weight`; of a module that was trained whole the weights have their own names, and
of a table of which some rows were trained there are those (rows x width).

Source: `PeftConfig` and `get_peft_model_state_dict` of Hugging Face PEFT.
"""

import json
import math
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from finetune.adapters.kind import AdapterKind, Shape
from finetune.adapters.kinds import ADAPTER_KINDS, kind_of, layer_tensor, titles
from finetune.adapters.patterns import check_pattern, paths_that_fit
from finetune.errors import ModelError
from finetune.reading import check_regular, read_json
from finetune.records import DEFAULT_KIND, AdapterTarget

Layers = Mapping[str, tuple[int, int]]
"""(outputs, inputs) of each linear layer by its path, whichever way round its weight is stored."""
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
"""What mlx-lm calls the tensors of an adapter."""
ROWS = "token_adapter.trainable_tokens_delta"
"""What follows the path of a table for its rows that are trained; they are the rows themselves, no differences."""
_COMMON = {"peft_type", "target_modules", "modules_to_save"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""Settings that do not change what a saved adapter computes; any other must be switched off."""


def adapted_layers(layers: Layers, modules: Iterable[str]) -> list[str]:
    """The paths of the layers meant, in the model's order; as in PEFT a name means every path that ends with it.

    Raises:
        ModelError: a name matches no linear layer.
    """
    modules = tuple(modules)
    hit = [path for path in layers if any(path == name or path.endswith(f".{name}") for name in modules)]
    for name in modules:
        if not any(path == name or path.endswith(f".{name}") for path in hit):
            raise ModelError(
                f"the adapter's target {name!r} matches no linear layer of this model",
                hint=f"choose from: {', '.join(dict.fromkeys(path.rsplit('.', 1)[-1] for path in layers))}",
            )
    return hit


def layer_tensors(target: AdapterTarget, path: str) -> dict[str, str]:
    """What PEFT calls each tensor of one layer's adapter in memory, by the key that its kind has for it."""
    return {each.key: f"base_model.model.{path}.{each.in_memory}" for each in kind_of(target).tensors}


def saved_name(name: str) -> str:
    """What PEFT calls a weight of a module that is trained whole."""
    path, _, leaf = name.rpartition(".")
    return f"base_model.model.{path}.modules_to_save.default.{leaf}"


def rows_name(path: str) -> str:
    """What PEFT calls the rows of the table at a path that are trained, in their order."""
    return f"base_model.model.{path}.{ROWS}.default"


def frozen_name(name: str, adapted: Container[str], saved: Container[str], tables: Container[str] = ()) -> str:
    """What PEFT calls a weight of the base once layers at the paths `adapted` and the weights `saved` are trained.

    Args:
        tables: the paths of tables of which rows are trained.
    """
    path, _, leaf = name.rpartition(".")
    inner = "base_layer." if path in adapted else "original_module." if name in saved else ""
    inner = "token_adapter.base_layer." if path in tables else inner
    return f"base_model.model.{path}.{inner}{leaf}"


def on_disk(name: str) -> str:
    """The name in the file of a tensor that PEFT calls `name` in memory."""
    if found := layer_tensor(name):
        return name.removesuffix(found.tensor.in_memory).removesuffix(found.tensor.on_disk) + found.tensor.on_disk
    return name.replace(".modules_to_save.default.", ".").replace(f".{ROWS}.default", f".{ROWS}")


def tensor_shapes(
    layers: Layers, target: AdapterTarget, saved: Mapping[str, Shape], width: int = 0
) -> dict[str, Shape]:
    """The shape of every tensor in the file of this adapter, by its name there.

    Args:
        saved: the shape of each weight of the modules that are trained whole.
        width: of the tables of which rows are trained; the target names these by their whole paths.

    Raises:
        ModelError: as `adapted_layers`.
    """
    shapes: dict[str, Shape] = {}
    for path in adapted_layers(layers, target.modules):
        sizes = kind_of(target).shapes(target, path, *layers[path])
        shapes |= {on_disk(name): sizes[key] for key, name in layer_tensors(target, path).items()}
    shapes |= {on_disk(rows_name(path)): (len(rows), width) for path, rows in target.rows.items()}
    return shapes | {on_disk(saved_name(name)): shape for name, shape in saved.items()}


def check_tensor_shapes(saved: Mapping[str, tuple[int, ...]], expected: Mapping[str, object], folder: Path) -> None:
    """Refuse an adapter whose tensors are not exactly the `expected` ones.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape; they are counted and the first is named.
    """
    wrong = expected.keys() ^ saved.keys()
    wrong |= {name for name, shape in expected.items() if name in saved and saved[name] != shape}
    if wrong:
        raise ModelError(
            f"adapter {folder} does not fit this model: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"first {min(wrong)}",
            hint="use the base model that the adapter was trained on",
        )


def write_settings(target: AdapterTarget, base: str, folder: Path, *, transposed: bool) -> None:
    """Write the settings so that PEFT loads the adapter.

    Args:
        base: what its base model is to be found as.
        transposed: the layers' weights are stored inputs x outputs, as GPT-2's are.
    """
    settings = {
        **kind_of(target).write_peft(target),
        "base_model_name_or_path": base,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "modules_to_save": list(target.saved) or None,
        "peft_type": kind_of(target).peft_type,
        "target_modules": list(target.modules),
        "task_type": "CAUSAL_LM",
    }
    (folder / SETTINGS).write_text(json.dumps(dict(sorted(settings.items())), indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path, *, transposed: bool) -> AdapterTarget:
    """What the settings in `folder` say; `transposed` as for `write_settings`.

    Raises:
        ModelError: they are missing or broken, or the adapter is of a kind that is none of ours.
    """
    try:
        settings = read_json(folder / SETTINGS)
        kind = next((kind for kind in ADAPTER_KINDS.values() if kind.fits_peft(settings)), None)
        if kind is None:
            odd = {"peft_type": settings.get("peft_type")}
        else:
            target = kind.read_peft(settings, _modules(settings["target_modules"], folder))
            target = replace(target, saved=_names(settings.get("modules_to_save") or []))
            known = {*kind.write_peft(target), *_COMMON, *_WITHOUT_EFFECT} - kind.harmless.keys()
            odd = {key: value for key, value in settings.items() if key not in known and not _is_off(kind, key, value)}
            odd.pop("fan_in_fan_out" if transposed else "", None)
        sound = kind is None or is_sound(target)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: {error}") from None
    if not sound:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: a setting is of the wrong kind")
    if odd:
        key = min(odd)
        raise ModelError(
            f"adapter {folder} sets {key} to {odd[key]!r}; this backend does {titles()} only",
            hint="use the torch backend for this adapter",
        )
    return target


def is_sound(target: AdapterTarget) -> bool:
    """Whether ranks, alphas and dropout read from a file are numbers that an adapter can have."""
    ranks, alphas = [target.rank, *target.rank_pattern.values()], [target.alpha, *target.alpha_pattern.values()]
    for pattern in (*target.rank_pattern, *target.alpha_pattern):
        check_pattern(pattern)
    return (
        all(type(rank) is int and rank > 0 for rank in ranks)
        and all(type(alpha) in (int, float) and 0 < alpha < math.inf for alpha in alphas)
        and type(target.dropout) in (int, float)
        and 0 <= target.dropout < 1
    )


def _modules(value: object, folder: Path) -> tuple[str, ...]:
    """The modules that settings name: a list, or a pattern that each of the saved layers' whole paths may fit."""
    if not isinstance(value, str):
        return _names(value)
    if value.lower() == "all-linear":
        raise ValueError("target_modules: 'all-linear' names no layers; PEFT saves their names in its place")
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, "np") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} cannot be read: {error}") from None
    paths = dict.fromkeys(found.path for name in names if (found := layer_tensor(name)))
    try:
        fitting = paths_that_fit(value, paths)
    except ValueError as error:
        raise ValueError(f"target_modules: {value[:80]!r} {error}") from None
    if not fitting:
        raise ValueError(f"target_modules: {value[:80]!r} fits none of the layers in {WEIGHTS}")
    return fitting


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("a setting is of the wrong kind")
    return tuple(value)


def _is_off(kind: AdapterKind, key: str, value: object) -> bool:
    """Whether a setting changes nothing: switched off, or at a value that its kind calls harmless."""
    return not value or value in kind.harmless.get(key, ())


def base_of(folder: Path) -> str | None:
    """The base model that an adapter's settings name; None where they name none or there are no settings.

    Raises:
        ModelError: the settings are broken.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        settings = read_json(path)
        named = settings.get("base_model_name_or_path") or settings.get("model")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    return named if isinstance(named, str) else None


def peft_from_mlx(source: Path, folder: Path, base: str) -> None:
    """Write an adapter that mlx-lm saved in its own format, in PEFT's, into an existing folder.

    mlx-lm keeps each matrix transposed (`lora_a` is inputs x rank), and `scale` where PEFT has alpha / rank. Source:
    `LoRALinear` and `load_adapters` of mlx-lm.

    Raises:
        ModelError: the files are broken, or hold a kind that is none of ours.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    try:
        settings = read_json(source / SETTINGS)
        name, given = settings.get("fine_tune_type", DEFAULT_KIND), settings["lora_parameters"]
        rank, scale = int(given["rank"]), float(given["scale"])
        check_regular(source / MLX_WEIGHTS)
        saved = load_file(source / MLX_WEIGHTS)
        kind = ADAPTER_KINDS[name]
        paths = sorted({each.rpartition(".")[0] for each in saved})
        target = AdapterTarget(rank, scale * rank, 0.0, tuple(paths), kind.name)
        tensors = {
            on_disk(layer_tensors(target, path)[key]): saved.pop(f"{path}.{mlx_name}").T.copy()
            for path in paths
            for key, mlx_name in kind.mlx_lm_names.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(
            f"the mlx-lm adapter in {source} cannot be read: {error!r}",
            hint="save it again, or fuse it with mlx_lm.fuse and name the fused model instead",
        ) from None
    if saved or not tensors:
        what = f"it also holds {min(saved)}" if saved else "it holds no tensor"
        raise ModelError(f"the mlx-lm adapter in {source} is no {kind.title}: {what}", hint="fuse it with mlx_lm.fuse")
    write_settings(target, base, folder, transposed=False)
    save_file(tensors, folder / WEIGHTS)


@contextmanager
def in_peft_format(folder: Path, base: str) -> Iterator[Path]:
    """The folder of an adapter in PEFT's format: itself, or for a moment another, where mlx-lm saved it.

    Raises:
        ModelError: as `peft_from_mlx`.
    """
    if (folder / WEIGHTS).is_file() or not (folder / MLX_WEIGHTS).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="finetune-") as place:
        peft_from_mlx(folder, Path(place), base)
        yield Path(place)
