"""Finds the adapter that training goes on from, its base and its settings: a run's, PEFT's or mlx-lm's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.adapters.kinds import kind_of, titles
from finetune.adapters.peft_files import MLX_WEIGHTS, SETTINGS, WEIGHTS, base_of, in_peft_format, read_settings
from finetune.config import LoadedConfig, flatten, load_plan, unflatten
from finetune.errors import ConfigError, ModelError, Problem, UsageError
from finetune.evidence.record import base_files
from finetune.evidence.saved import changed, saved_in
from finetune.files import is_run
from finetune.models.locate import SHIPPED, SHIPPED_FOLDER, locate_model
from finetune.models.shape import read_shape
from finetune.models.travel import is_hashed
from finetune.records import AdapterTarget, ModelShape
from finetune.run.find import LATEST, RUNS, find_run
from finetune.run.folder import RunFolder

_SET_BY_USER = ("flag", "file", "environment")
_BY_RUN = ("model.quantize", "model.quantize_group_size", "tokens.add_special_tokens", "tokens.add_tokens")
"""Settings that the function of a run's adapter depends on, beside those of the adapter itself."""
_FREE = ("adapter.dropout", "model.dtype", "template.name", "template.date", "template.variables")
"""Settings that are taken from the adapter where nothing else is set."""


@dataclass(frozen=True, slots=True)
class _Source:
    """An adapter's folder, and the run that it is of, if any."""

    folder: Path
    run: RunFolder | None


def with_start(loaded: LoadedConfig) -> LoadedConfig:
    """The same configuration; where it names an adapter to go on from, with its base and its settings.

    Raises:
        ConfigError: settings contradict the adapter, each by its name.
        FineTuneError: the adapter, its run or its base cannot be used or have changed, or the run has no adapter.
    """
    model, origins = loaded.config.model, loaded.origins
    if model.adapter is not None:
        if origins["model.adapter"] == "derived":
            return loaded  # settled before
        source = _source(_named(model.adapter) or Path(model.adapter).expanduser())
        base = model.path if origins["model.path"] in _SET_BY_USER else None
    else:
        found = _named(model.path)
        if found is None:
            return loaded
        source, base = _source(found), None
    given = _of_run(source.run, base) if source.run else _of_folder(source.folder, base)
    location = locate_model(given["model.path"], revision=given.get("model.revision", model.revision))
    if source.run:
        _check_base(source.run, base_files(location), location.name)
    target = _read_target(source.folder, read_shape(location.folder), given["model.path"])
    given |= _settings_of(target)
    given["model.adapter"] = str(source.folder.absolute())
    _check_contradictions(loaded, given, source.folder, read_shape(location.folder))
    values = flatten(loaded.config)
    taken = {key: value for key, value in given.items() if not (key in _FREE and origins[key] in _SET_BY_USER)}
    config = unflatten({**values, **taken})
    return LoadedConfig(config, {**origins, **dict.fromkeys(taken, "derived")})


def _named(name: str) -> Path | None:
    """The run or the adapter's folder that a name may mean; None where it is that of a model."""
    try:
        path = Path(name).expanduser()
        there = path.is_dir()
    except (OSError, RuntimeError, ValueError):
        return None
    if there:
        whole = (path / "config.json").is_file() and not (path / WEIGHTS).is_file()
        return path if is_run(path) or ((path / SETTINGS).is_file() and not whole) else None
    if name == LATEST or is_run(RUNS / name):
        return find_run(name)
    return None


def _source(path: Path) -> _Source:
    """Where the adapter lies.

    Raises:
        FineTuneError: there is none, its run is not finished or trained the whole model, or it has changed.
    """
    run = next((RunFolder(place) for place in (path, path.parent) if is_run(place)), None)
    if run is not None and path in (run.path, run.adapter):
        run = RunFolder.finished(run.path)
        config = load_plan(run.plan).config
        if config.adapter.kind == "full":
            raise UsageError(
                f"{run.path} trained the whole model, and no adapter that could be trained on",
                hint=f"train on that model, which is then the base: --model {run.model}",
            )
        return _Source(saved_in(run, config), run)
    if not path.is_dir():
        raise UsageError(f"there is no adapter and no run at {path}", hint="name a run, or a folder with " + SETTINGS)
    if not (path / SETTINGS).is_file():
        raise UsageError(f"{path} holds no adapter: it has no {SETTINGS}", hint="name the folder that holds one")
    return _Source(path, None)


def _of_run(run: RunFolder, base: str | None) -> dict[str, Any]:
    """What a run's plan says of its base, its template and its new tokens."""
    config = load_plan(run.plan).config
    given = {key: value for key, value in flatten(config).items() if key in (*_BY_RUN, *_FREE)}
    given |= {"model.path": base or config.model.path, "model.revision": None if base else config.model.revision}
    if config.template.name.endswith(".jinja"):
        # The file may have changed since; in the run's copy variables are set.
        given |= {"template.name": str((run.adapter / "chat_template.jinja").absolute()), "template.variables": None}
    return given


def _of_folder(folder: Path, base: str | None) -> dict[str, Any]:
    """The base that an adapter's settings name, and the template that lies beside it."""
    named = base or base_of(folder)
    if named is None:
        raise UsageError(
            f"the adapter in {folder} names no base model",
            hint=f"name both: --model BASE --set model.adapter={folder}",
        )
    if is_hashed(named):
        raise UsageError(
            f"the adapter in {folder} was trained on the folder {named}, wherever it lies",
            hint=f"name both: --model BASE --set model.adapter={folder}",
        )
    given: dict[str, Any] = {"model.path": _shipped(named)}
    try:
        locate_model(given["model.path"])
    except ModelError as error:
        raise ModelError(
            f"the base {named!r} that the adapter in {folder} names cannot be used: {error.message}",
            hint=f"name both: --model BASE --set model.adapter={folder}",
        ) from None
    if (folder / "chat_template.jinja").is_file():
        given["template.name"] = str((folder / "chat_template.jinja").absolute())
    return given


def _shipped(named: str) -> str:
    """The name of a shipped model for its folder: with it come its rehearsal and its retention rows."""
    return next((name for name in SHIPPED if Path(named) == SHIPPED_FOLDER / name), named)


def _check_base(run: RunFolder, found: Sequence[Mapping[str, object]], name: str) -> None:
    if differing := changed(run.read_manifest()["model"]["files"], found):
        raise ModelError(
            f"the base model {name!r} is not the one that {run.path} was trained on: "
            f"changed or gone: {', '.join(differing)}",
            hint="get the model revision that run.json names",
        )


def _read_target(folder: Path, shape: ModelShape, base: str) -> AdapterTarget:
    """What the adapter is; layers of one name that all have it go by that name."""
    if not any((folder / name).is_file() for name in (WEIGHTS, MLX_WEIGHTS)):
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(
            f"the adapter in {folder} has no {WEIGHTS}"
            + (", only adapter_model.bin, which could run code as it is read" if pickled else ""),
            hint="save it again as safetensors" if pickled else "restore the file",
        )
    try:
        with in_peft_format(folder, base) as place:
            target = read_settings(place, transposed=shape.transposed)
    except ModelError as error:
        raise ModelError(
            f"training cannot go on from {folder}: {error.message.replace('this backend does', 'FineTune trains')}",
            hint=f"name an adapter of {titles()}, or merge it into its base and train on that",
        ) from None
    paths = [layer.name for layer in shape.linear_layers if target.adapts(layer.name)]
    ends = {path.rpartition(".")[2] for path in paths}
    every = [layer.name for layer in shape.linear_layers if layer.name.rpartition(".")[2] in ends]
    if not paths:
        raise ModelError(
            f"the adapter in {folder} sits on {', '.join(target.modules[:3])}, and {shape.architecture} has none of it",
            hint=f"name its base: --model BASE --set model.adapter={folder}",
        )
    # In the order of the model, whatever order they were saved in: the seed deals out the same numbers.
    short = tuple(dict.fromkeys(path.rpartition(".")[2] for path in every))
    return replace(target, modules=short if paths == every else tuple(paths))


def _settings_of(target: AdapterTarget) -> dict[str, Any]:
    """The settings of an adapter like this one."""
    known: dict[str, Any] = {"adapter.kind": target.kind, "adapter.target_modules": target.modules}
    known |= {"adapter.modules_to_save": target.saved or None}
    own = kind_of(target).settings
    return known | {
        f"adapter.{name}": getattr(target, name) or (None if name.endswith("_pattern") else getattr(target, name))
        for name in ("rank", "alpha", "scaling", "dropout", "rank_pattern", "alpha_pattern")
        if name in own
    }


def _check_contradictions(loaded: LoadedConfig, given: Mapping[str, Any], folder: Path, shape: ModelShape) -> None:
    """Refuse settings that say otherwise than the adapter.

    Raises:
        ConfigError: each of them by its name.
    """
    values = flatten(loaded.config)
    problems = []
    for key, value in given.items():
        told, origin = values[key], loaded.origins[key]
        if origin not in _SET_BY_USER or key in ("model.path", "model.adapter", *_FREE):
            continue
        if told != value and not (key == "adapter.target_modules" and _same_layers(told, value, shape)):
            name = key.rpartition(".")[2]
            what = f"{name} is {_say(told)}, but the adapter in {folder} has {_say(value)}"
            hint = "leave it out: an adapter that is trained on keeps its shape"
            problems.append(Problem(what, f"{key} ({origin})", hint))
    if problems:
        raise ConfigError(problems)


def _same_layers(told: str | Sequence[str], value: Sequence[str], shape: ModelShape) -> bool:
    if isinstance(told, str):  # all-linear
        return {path.name.rpartition(".")[2] for path in shape.linear_layers} == set(value)
    return set(told) == set(value)


def _say(value: object) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
