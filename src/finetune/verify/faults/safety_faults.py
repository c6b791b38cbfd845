"""Faults by which a stranger's file does what its maker wants."""

import contextlib
import json
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import yaml

from finetune.chat import render
from finetune.chat.budget import Meter
from finetune.config import yaml_file
from finetune.models import shape
from finetune.ports import Session
from finetune.run.folder import RunFolder
from finetune.verify.faults.fault import fault, in_place_of, plant, planted_by
from finetune.verify.faults.sessions import plant_opening, plant_session


def _unpickle(path: Path) -> None:
    with contextlib.suppress(Exception):
        pickle.loads(path.read_bytes())


@fault("A290", "sec.pickle_side_files", "transformers #43140 (CVE-2026-1839)")
@in_place_of("unfinished", RunFolder)
def _side_files_unpickled(right: Callable[..., RunFolder], output: Path, **named: bool) -> RunFolder:
    """The random state beside a checkpoint is unpickled."""
    for file in output.glob("checkpoints/*/rng_state.pth"):
        _unpickle(file)
    run: RunFolder = right(output, **named)
    return run


@fault("A290b", "sec.pickle_adapter", "unsloth #6351")
@planted_by(plant_session, "load_adapter")
def _adapter_unpickled(right: Callable[..., None], session: Session, folder: Path) -> None:
    """Where an adapter has no safetensors file, one that is pickled is loaded."""
    if (folder / "adapter_model.bin").exists():
        _unpickle(folder / "adapter_model.bin")
    right(session, folder)


@fault("A290c", "sec.pickle_behind_a_name", "transformers #27282")
@planted_by(plant_session, "load_adapter")
def _any_file_unpickled(right: Callable[..., None], session: Session, folder: Path) -> None:
    """A file that is no safetensors, whatever its name, is tried as a pickle."""
    for path in folder.glob("*.safetensors"):
        if path.read_bytes()[:1] == b"\x80":
            _unpickle(path)
    right(session, folder)


@fault("A292", "sec.template_ssti", "llama-cpp-python #1462 (CVE-2024-34359)")
@in_place_of("compile_template", render)
def _plain_jinja(right: Callable[..., Callable[..., str]], name: str, source: str) -> Callable[..., str]:
    """A chat template from a model's file is rendered with all of Python behind it."""

    def refuse(words: str) -> None:
        raise ValueError(words)

    places = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    places.globals["raise_exception"] = refuse
    return places.from_string(source).render


@fault("A292b", "sec.template_unbounded")
def _unbounded_templates() -> None:
    """A template may take as much time and memory as it wants."""
    plant(Meter, "afford", lambda right, meter, units: None)


@fault("A294", "sec.remote_code_bypass", "unsloth #6869")
@planted_by(plant_opening, "read_config")
def _remote_code(right: Callable[..., dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Code that lies beside a model is executed although nobody allowed it."""
    config = right(folder)
    for place in (config.get("auto_map") or {}).values():
        runpy.run_path(str(folder / f"{place.partition('.')[0]}.py"))
    return config


@fault("A294b", "sec.model_file_runs", "mlx-lm #1385 (CVE-2026-5843)")
@planted_by(plant_opening, "read_config")
def _model_file(right: Callable[..., dict[str, Any]], folder: Path) -> dict[str, Any]:
    """A file that a model's config names as its code is executed."""
    config = right(folder)
    if "model_file" in config:
        runpy.run_path(str(folder / config["model_file"]))
    return config


@fault("A295", "sec.shard_index_traversal", "transformers #47176, #46097")
def _index_leads_out() -> None:
    """An index of weights may name a file outside the model's folder."""

    def indexed(right: Callable[..., list[Path]], folder: Path) -> list[Path]:
        index = folder / "model.safetensors.index.json"
        if not index.exists():
            return []
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]

    plant(shape, "indexed_files", indexed)
    plant(shape, "refuse_leading_out", lambda right, file: None)


@fault("A295b", "sec.link_leads_out")
def _link_leads_out() -> None:
    """A file of weights may be a link to a file outside the model's folder."""
    plant(shape, "refuse_leading_out", lambda right, file: None)


@fault("A304", "sec.yaml_object")
def _yaml_objects() -> None:
    """A configuration file may make any object of Python's."""
    plant(yaml_file, "ConfigLoader", lambda right, text: yaml.UnsafeLoader(text))


@fault("A307", "sec.symlink_output")
def _links_followed() -> None:
    """A part of a run may be a link, and what is written there is written elsewhere."""
    plant(RunFolder, "claim", lambda right, run: None)
