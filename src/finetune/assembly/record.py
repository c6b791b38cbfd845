"""Writes down what a run was and what was measured: the content of run.json."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune.artifacts.run_folder import FORMAT
from finetune.artifacts.write import describe_file, file_hash
from finetune.assembly.prepare import Prepared
from finetune.config import plan_as_list
from finetune.criteria.evidence import Evidence
from finetune.criteria.judge import overall
from finetune.models.shape import weight_files
from finetune.records import ModelLocation, Scores, Verdict

_BASE_LIBRARIES = ("finetune-suite", "tokenizers", "numpy", "safetensors", "jinja2")


@dataclass(frozen=True, slots=True)
class Course:
    """How a run went: when it started, what was asked, how long each phase took."""

    run_id: str
    command: str
    started: str
    timing: Mapping[str, float]
    libraries: Mapping[str, str]
    resumed_from: int = 0


def run_record(
    prepared: Prepared,
    course: Course,
    evidence: Evidence,
    verdicts: tuple[Verdict, ...],
    events: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything another program needs to know of the run, as JSON values; nothing in it is guessed."""
    steps = [event for event in events if event["event"] == "StepDone"]
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    return {
        "format": FORMAT,
        "id": course.run_id,
        "status": "complete",
        "outcome": overall(verdicts),
        "started": course.started,
        "command": course.command,
        "versions": {"python": platform.python_version(), **_versions(), **course.libraries},
        "machine": machine(),
        "seeds": {"training": prepared.plan.config.training.seed},
        "plan": plan_as_list(prepared.plan),
        "model": _model(prepared),
        "data": _data(prepared),
        "losses": {
            "train": [_pick(step, "step", "loss", "learning_rate", "grad_norm") for step in steps],
            "fixed": [_pick(event, "step", "loss", "tokens") for event in events if event["event"] == "FixedLoss"],
            "held_out": [_pick(event, "step", "loss", "tokens") for event in events if event["event"] == "HeldOutLoss"],
        },
        "scores": _scores(evidence),
        "memory": asdict(evidence.memory) if evidence.memory else None,
        "reload": asdict(evidence.artifacts.reload) if evidence.artifacts.reload else None,
        "timing": dict(course.timing),
        "throughput": {"tokens_per_second": tokens / seconds} if seconds else None,
        "peak_rss_bytes": peak_rss(),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "notes": [*prepared.notes, *_resumed(course)],
        "not_measured": dict(evidence.why),
    }


def run_identity(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint belongs to: every setting, and the hashes of the base's weights and of the data."""
    # Of a mapping the order counts too: the first pattern that fits a layer is its own.
    settings = {entry["key"]: entry["value"] for entry in plan_as_list(prepared.plan)}
    identity = {key: list(value.items()) if isinstance(value, dict) else value for key, value in settings.items()}
    identity |= {f"weights {file['path']}": file["sha256"] for file in base_files(prepared.location)}
    identity |= {f"data {path.name}": file_hash(path) for path in prepared.files}
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def base_files(location: ModelLocation) -> list[dict[str, Any]]:
    """Name, size and hash of each file that holds the base model's weights."""
    return [describe_file(path, name=path.name) for path in weight_files(location.folder)]


def machine() -> dict[str, Any]:
    """What the run was made on."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def peak_rss() -> int | None:
    """The highest resident set of this process so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _model(prepared: Prepared) -> dict[str, Any]:
    location, shape = prepared.location, prepared.shape
    return {
        "name": location.name,
        "source": location.source,
        "architecture": shape.architecture,
        "parameters": shape.parameters,
        "trainable_parameters": prepared.trainable_parameters,
        "context_length": shape.context_length,
        "files": base_files(location),
    }


def _data(prepared: Prepared) -> dict[str, Any]:
    return {
        "files": data_files(prepared),
        "train": asdict(prepared.train.counts),
        "valid": asdict(prepared.held_out.counts) if prepared.held_out else None,
        "rehearsal": asdict(prepared.rehearsal.counts) if prepared.rehearsal else None,
    }


def data_files(prepared: Prepared) -> list[dict[str, Any]]:
    """Name, size and hash of each data file that was read."""
    return [describe_file(path, name=_shown(path)) for path in prepared.files]


def _resumed(course: Course) -> list[str]:
    if not course.resumed_from:
        return []
    return [f"the run was resumed from step {course.resumed_from}; the times are those of its last process"]


def _shown(path: Path) -> str:
    from finetune.data.shipped import FOLDER

    return f"shipped:{path.stem}" if path.parent == FOLDER else str(path)


def _scores(evidence: Evidence) -> dict[str, Any] | None:
    learning = evidence.learning
    if learning is None:
        return None
    kept = None
    if learning.retention_base and learning.retention_tuned:
        kept = {"base": _answers(learning.retention_base), "tuned": _answers(learning.retention_tuned)}
    return {
        "learning": {
            "base": _answers(learning.base),
            "tuned": _answers(learning.tuned),
            "sham": _answers(learning.sham) if learning.sham else None,
        },
        "retention": kept,
    }


def _answers(scores: Scores) -> dict[str, Any]:
    return {
        "right": scores.right,
        "count": len(scores.answers),
        "answers": [asdict(answer) for answer in scores.answers],
    }


def _pick(event: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: event[key] for key in keys}


def _versions() -> dict[str, str]:
    found = {}
    for name in _BASE_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
