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

from finetune.backends.reference import adapter, backend
from finetune.backends.reference.model import Array
from finetune.chat import render
from finetune.chat.budget import Meter
from finetune.config import yaml_file
from finetune.models import shape
from finetune.ports import Session
from finetune.run.folder import RunFolder
from finetune.verify.faults.fault import fault, plant
from finetune.verify.faults.sessions import plant_session


def _unpickle(path: Path) -> None:
    """Load a file as `torch.load` did by default."""
    with contextlib.suppress(Exception):
        pickle.loads(path.read_bytes())


@fault(
    "A290",
    "sec.pickle_side_files",
    real="transformers #43140 (CVE-2026-1839)",
    what="The random state beside a checkpoint is unpickled.",
)
def side_files_unpickled() -> None:
    """Before anybody looks at the checkpoint's hashes."""

    def unfinished(right: Callable[..., RunFolder], output: Path) -> RunFolder:
        for file in output.glob("checkpoints/*/rng_state.pth"):
            _unpickle(file)
        run: RunFolder = right(output)
        return run

    plant(RunFolder, "unfinished", unfinished)


@fault(
    "A290b",
    "sec.pickle_adapter",
    real="unsloth #6351",
    what="Where an adapter has no safetensors file, one that is pickled is loaded.",
)
def adapter_unpickled() -> None:
    """PEFT's older format."""

    def load(right: Callable[..., None], session: Session, folder: Path) -> None:
        if (folder / "adapter_model.bin").exists():
            _unpickle(folder / "adapter_model.bin")
        right(session, folder)

    plant_session("load_adapter", load)


@fault(
    "A290c",
    "sec.pickle_behind_a_name",
    real="transformers #27282",
    what="A file that is no safetensors, whatever its name, is tried as a pickle.",
    backends=("reference",),
)
def any_file_unpickled() -> None:
    """For the sake of older files."""

    def read(right: Callable[..., dict[str, Array]], path: Path, owner: str) -> dict[str, Array]:
        if path.exists() and path.read_bytes()[:1] == b"\x80":
            _unpickle(path)
        return right(path, owner)

    plant(adapter, "read_tensors", read)


@fault(
    "A292",
    "sec.template_ssti",
    real="llama-cpp-python #1462 (CVE-2024-34359)",
    what="A chat template from a model's file is rendered with all of Python behind it.",
)
def plain_jinja() -> None:
    """`jinja2.Environment`."""

    def compiled(right: Callable[..., Callable[..., str]], name: str, source: str) -> Callable[..., str]:
        def refuse(words: str) -> None:
            raise ValueError(words)

        places = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        places.globals["raise_exception"] = refuse
        return places.from_string(source).render

    plant(render, "compile_template", compiled)


@fault(
    "A292b",
    "sec.template_unbounded",
    real="",
    what="A template may take as much time and memory as it wants.",
)
def unbounded_templates() -> None:
    """The account is never empty."""
    plant(Meter, "afford", lambda right, meter, units: None)


@fault(
    "A294",
    "sec.remote_code_bypass",
    real="unsloth #6869",
    what="Code that lies beside a model is executed although nobody allowed it.",
    backends=("reference",),
)
def remote_code() -> None:
    """trust_remote_code=True on one of the ways in."""

    def read(right: Callable[..., dict[str, Any]], folder: Path) -> dict[str, Any]:
        config = right(folder)
        for place in (config.get("auto_map") or {}).values():
            runpy.run_path(str(folder / f"{place.partition('.')[0]}.py"))
        return config

    plant(backend, "read_config", read)


@fault(
    "A295",
    "sec.shard_index_traversal",
    real="transformers #47176, #46097",
    what="An index of weights may name a file outside the model's folder.",
)
def index_leads_out() -> None:
    """os.path.join, and no look at the name."""

    def indexed(right: Callable[..., list[Path]], folder: Path) -> list[Path]:
        index = folder / "model.safetensors.index.json"
        if not index.exists():
            return []
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]

    plant(shape, "indexed_files", indexed)
    plant(shape, "refuse_leading_out", lambda right, file: None)


@fault(
    "A295b",
    "sec.link_leads_out",
    real="",
    what="A file of weights may be a link to a file outside the model's folder.",
)
def link_leads_out() -> None:
    """Links are followed."""
    plant(shape, "refuse_leading_out", lambda right, file: None)


@fault("A304", "sec.yaml_object", real="", what="A configuration file may make any object of Python's.")
def yaml_objects() -> None:
    """yaml.load with the loader that makes everything."""
    plant(yaml_file, "ConfigLoader", lambda right, text: yaml.UnsafeLoader(text))


@fault(
    "A307",
    "sec.symlink_output",
    real="",
    what="A part of a run may be a link, and what is written there is written elsewhere.",
)
def links_followed() -> None:
    """Nobody looks for links before the run goes on."""
    plant(RunFolder, "claim", lambda right, run: None)
