"""Writes down what a run was and what was measured: the content of run.json."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune.config import FORMAT, plan_as_list
from finetune.config.derive import derived_learning_rate
from finetune.criteria.advice import RunFacts, advise
from finetune.criteria.evidence import ControlEvidence, Evidence
from finetune.criteria.judge import overall
from finetune.data.batches import sides_of
from finetune.data.shipped import FOLDER
from finetune.data.sources import files_of
from finetune.data.stored import join
from finetune.data.survey import shared_text, system_prompt
from finetune.events import Event, FixedLoss, HeldOutLoss, RunLengthened, RunResumed, RunStarted, StepDone
from finetune.evidence.asked import Asked
from finetune.files import describe_file, files_hash
from finetune.memory.estimate import weight_bytes
from finetune.models.quantize import kept_in_full, say_quantized
from finetune.models.shape import weight_files
from finetune.processes import peak_rss
from finetune.records import ModelLocation, Scores, TokenizedRow, Verdict
from finetune.run.checkpoints import Owner
from finetune.training.early_stopping import Trained
from finetune.training.longer import lengthening_notes
from finetune.training.prepare import FEWEST_UNSEEN, Prepared
from finetune.training.run import Run
from finetune.training.start import begun, start_of

_SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_FREE = ("tracking.", "tokens.cache", "training.save_every")
"""Settings that change no weight: a run may go on with others than it was started with, and says so."""
_JUDGING = ("observe", "check ", "shuffled-label control", "measure memory")
"""The phases that would not be there, were nothing judged."""
_BASE_LIBRARIES = ("finetune-suite", "tokenizers", "numpy", "safetensors", "jinja2")


def run_record(
    run: Run, trained: Trained, evidence: Evidence, verdicts: tuple[Verdict, ...], asked: Asked
) -> dict[str, Any]:
    """Everything another program needs to know of the run, as JSON values; nothing in it is guessed.

    Of a resumed run the command and the time are those that it was started with.
    """
    prepared, trackers, events = run.prepared, run.trackers, run.folder.read_events()
    started = next((event for event in events if isinstance(event, RunStarted)), run.started)
    steps = [event for event in events if isinstance(event, StepDone)]
    seconds, tokens = sum(step.seconds for step in steps), sum(step.tokens for step in steps)
    config = prepared.plan.config
    return {
        "format": FORMAT,
        "id": run.folder.path.name,
        "status": "complete",
        "outcome": overall(verdicts),
        "goal": "preference" if evidence.preference else evidence.open.goal if evidence.open else None,
        "started": started.started,
        "command": started.command,
        "versions": _all_versions(run.backend.versions()),
        "machine": {**machine(), "device": run.device},
        "seeds": {"training": config.training.seed},
        "plan": plan_as_list(prepared.plan),
        "model": _model(prepared),
        "data": _data(prepared),
        "training": _training(trained, events),
        "continues": begun(run.start, run.beginning),
        "tracking": trackers.places() if trackers else [],
        "losses": {
            "train": [_pick(step, "step", "loss", "learning_rate", "grad_norm") for step in steps],
            "fixed": [_pick(event, "step", "loss", "tokens") for event in events if isinstance(event, FixedLoss)],
            "held_out": [_pick(event, "step", "loss", "tokens") for event in events if isinstance(event, HeldOutLoss)],
        },
        "scores": _scores(evidence),
        "claims": json.loads(json.dumps(asdict(evidence.open))) if evidence.open else None,
        "preference": json.loads(json.dumps(asdict(evidence.preference))) if evidence.preference else None,
        "memory": asdict(evidence.memory) if evidence.memory else None,
        "reload": asdict(evidence.artifacts.reload) if evidence.artifacts and evidence.artifacts.reload else None,
        "timing": dict(run.timing),
        "judging": asked.told(),
        "throughput": {"tokens_per_second": tokens / seconds, "judging": _judging_seconds(run, asked, seconds, tokens)}
        if seconds
        else None,
        "peak_rss_bytes": peak_rss(),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "advice": list(advise(evidence, verdicts, _facts(prepared))),
        "notes": [
            *prepared.notes,
            *run.notes,
            *trained.notes(load_best_model=config.training.load_best_model),
            *lengthening_notes({step.step: step.learning_rate for step in steps}, events),
            *_resumed(events),
            *(trackers.notes() if trackers else []),
        ],
        "not_measured": _why_not_left(prepared) | dict(evidence.why),
    }


def _facts(prepared: Prepared) -> RunFacts:
    """What advice needs to know of a run."""
    config = prepared.plan.config
    usual = derived_learning_rate(prepared.shape.parameters, config.adapter.kind, config.training.objective)
    rate = config.training.learning_rate or usual
    return RunFacts(prepared.train.counts, rate, usual, len(prepared.unseen), FEWEST_UNSEEN)


def _why_not_left(prepared: Prepared) -> dict[str, str]:
    """For held-out and retention rows, that none is left to measure on, since training repeats all of them."""
    names = {"held_out": prepared.overlaps["valid"], "retention": prepared.overlaps["retention"]}
    return {
        name: f"all {found.rows} rows stand in the rows trained on"
        for name, found in names.items()
        if found.rows and not found.unseen
    }


def _judging_seconds(run: Run, asked: Asked, training: float, tokens: int) -> dict[str, float]:
    """What judging took, what it could take at the pace of this training, and the share of the training it took."""
    took = sum(time for phase, time in run.timing.items() if phase.startswith(_JUDGING))
    return {"allowed": asked.budget.allowed * training / tokens, "took": took, "share": took / training}


def run_owner(prepared: Prepared, libraries: Mapping[str, str]) -> Owner:
    """What a checkpoint belongs to.

    To go on as if nothing had happened, the settings, the files of the base, the data, the template and the token ids
    made of them must be the same. Versions, the machine and the settings that change no weight may differ.
    """
    settings = {entry["key"]: entry["value"] for entry in plan_as_list(prepared.plan)}
    # Of a mapping the order counts too: the first pattern that fits a layer is its own.
    settings = {key: list(value.items()) if isinstance(value, dict) else value for key, value in settings.items()}
    told = {key: settings.pop(key) for key in list(settings) if key.startswith(_FREE)}
    told |= {f"version of {name}": number for name, number in _all_versions(libraries).items()}
    told |= {key: value for key, value in machine().items() if key in ("system", "processor", "cores")}
    identity = settings | {f"model {file['path']}": file["sha256"] for file in base_files(prepared.location)}
    named = ((key, getattr(prepared.plan.config.data, key)) for key in ("train", "valid", "rehearsal", "retention"))
    identity |= {f"data.{key} file": files_hash(files_of(name)) for key, name in named if name}
    if start := start_of(prepared.plan.config):
        identity["the adapter to go on from"] = start.sha256
    identity["template"] = hashlib.sha256(prepared.encoder.source.jinja.encode()).hexdigest()
    identity["token ids"] = _digest(join(prepared.training_rows, prepared.held_out.rows if prepared.held_out else ()))
    plain: list[dict[str, Any]] = json.loads(json.dumps([identity, told]))
    return Owner(*plain)


def _digest(rows: Sequence[TokenizedRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for side in sides_of(row):
            digest.update(json.dumps([side.ids, side.trained]).encode())
    return digest.hexdigest()


def base_files(location: ModelLocation) -> list[dict[str, Any]]:
    """Name, size and hash of each file of the base model that training depends on: weights, shape and tokenizer."""
    others = (location.folder / name for name in _SIDE_FILES)
    return [
        describe_file(path, name=path.name)
        for path in [*weight_files(location.folder), *(path for path in others if path.exists())]
    ]


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


def _model(prepared: Prepared) -> dict[str, Any]:
    location, shape = prepared.location, prepared.shape
    return {
        "name": location.name,
        "source": location.source,
        "architecture": shape.architecture,
        "parameters": shape.parameters,
        "trainable_parameters": prepared.trainable_parameters,
        "context_length": shape.context_length,
        "quantization": _quantization(prepared),
        "files": base_files(location),
    }


def _quantization(prepared: Prepared) -> dict[str, Any] | None:
    """How the base is quantised, for whoever loads it again under the adapter; None for a full one."""
    model, shape = prepared.plan.config.model, prepared.shape
    if not shape.quantized:
        return None
    return {
        "where": "load" if model.quantize else "files",
        "how": say_quantized(shape),
        "quantized": len(shape.quantized),
        "in_full": kept_in_full(shape),
        "weight_bytes": weight_bytes(shape, model.dtype),
    }


def _data(prepared: Prepared) -> dict[str, Any]:
    told = {
        "files": data_files(prepared),
        "train": asdict(prepared.train.counts),
        "valid": asdict(prepared.held_out.counts) if prepared.held_out else None,
        "rehearsal": asdict(prepared.rehearsal.counts) if prepared.rehearsal else None,
        "overlap": {name: found.values() for name, found in prepared.overlaps.items() if found.rows},
        # With these a model is asked as it was trained.
        "system": asdict(shared_text([system_prompt(each) for each in prepared.conversations])),
        "tools": asdict(shared_text([each.tools for each in prepared.conversations])),
        "variables": asdict(shared_text([_sorted(each.variables) for each in prepared.conversations])),
    }
    found: dict[str, Any] = json.loads(json.dumps(told))
    return found


def _sorted(variables: str) -> str:
    """Variables in one order: the same ones are the same text."""
    return json.dumps(json.loads(variables), sort_keys=True, ensure_ascii=False) if variables else ""


def data_files(prepared: Prepared) -> list[dict[str, Any]]:
    """Name, size and hash of each data file that was read."""
    return [describe_file(path, name=_shown(path)) for path in prepared.files]


def _training(trained: Trained, events: Sequence[Event]) -> dict[str, Any]:
    stopping = trained.stopping
    longer = [event for event in events if isinstance(event, RunLengthened)]
    return {
        "planned_steps": trained.planned,
        "steps": trained.taken,
        "kept_step": trained.kept,
        "stopped_early": trained.stopped_early,
        "lengthened": [_pick(event, "step", "planned_steps", "total_steps") for event in longer],
        "best": {"step": stopping.best_step, "held_out_loss": stopping.best_loss} if stopping.best_step else None,
    }


def _resumed(events: Sequence[Event]) -> list[str]:
    found = [event for event in events if isinstance(event, RunResumed)]
    notes = [
        f"since the run was resumed from step {event.step}, this is not as it was: {'; '.join(event.changes)}"
        for event in found
        if event.changes
    ]
    if not found:
        return notes
    steps = ", ".join(str(event.step) for event in found)
    return [f"the run was resumed from step {steps}; the times are those of its last process", *notes]


def _shown(path: Path) -> str:
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
            "control": _control(learning.control) if learning.control else None,
        },
        "retention": kept,
    }


def _control(control: ControlEvidence[Scores]) -> dict[str, Any]:
    """The answers after shuffled training; of a shortened one also the tuned model's after as many steps."""
    beside = {"tuned": _answers(control.tuned)} if control.tuned else {}
    return {**_answers(control.found), "steps": control.steps, **beside}


def _answers(scores: Scores) -> dict[str, Any]:
    return {
        "right": scores.right,
        "count": len(scores.answers),
        "answers": [asdict(answer) for answer in scores.answers],
    }


def _pick(event: Event, *keys: str) -> dict[str, Any]:
    return {key: getattr(event, key) for key in keys}


def _all_versions(libraries: Mapping[str, str]) -> dict[str, str]:
    return {"python": platform.python_version(), **_versions(), **libraries}


def _versions() -> dict[str, str]:
    found = {}
    for name in _BASE_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
