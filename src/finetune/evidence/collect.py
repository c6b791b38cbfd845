"""Collects what the criteria are judged on, from a run that has just been trained."""

from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.criteria.evidence import Evidence
from finetune.events import FirstGradients, StepDone
from finetune.evidence.observe import (
    Observation,
    artifact_evidence,
    learning_evidence,
    loss_evidence,
    makes_extra_run,
    memory_evidence,
    open_evidence,
    parameter_evidence,
)
from finetune.ports import Session
from finetune.records import TokenizedRow
from finetune.training.run import Run


def collect_evidence(
    run: Run,
    session: Session,
    saved: Path,
    looks: tuple[Observation, Observation, Mapping[str, str]],
    kept: int,
    train_control: Callable[[tuple[TokenizedRow, ...]], Session],
) -> Evidence:
    """Measure everything that the criteria ask for.

    Args:
        saved: the folder of what was trained.
        looks: the base and the tuned model as they were observed, and the fingerprints of the weights before training.
        kept: the step whose weights the run keeps.
        train_control: gives a session that was trained for as many steps on other rows.
    """
    prepared, (before, after, fingerprints) = run.prepared, looks
    events = run.folder.read_events()
    # The steps that the kept weights are made of; what came after the best step has left nothing behind.
    steps = [event for event in events if isinstance(event, StepDone) and event.step <= kept]
    gradients = next((event.norms for event in events if isinstance(event, FirstGradients)), {})
    parameters = parameter_evidence(prepared, session, fingerprints, gradients, len(steps))
    with run.phase(f"check {saved.name}", "in a fresh process" + (", on a fresh base" if prepared.target else "")):
        artifacts = artifact_evidence(prepared, session, saved, run.folder.describe(), run.why)
    learning = learning_evidence(prepared, before, after, train_control, run.why)
    memory = None
    full_too = prepared.target is not None and not prepared.shape.quantized
    unable = frozenset() if full_too and run.backend.abilities.memory else frozenset({"memory"})
    if makes_extra_run(prepared, "memory", run.why, unable):
        with run.phase("measure memory", "LoRA and full fine-tuning, each in a fresh process"):
            memory = memory_evidence(prepared, run.why)
    losses = loss_evidence(prepared, [step.loss for step in steps], before, after)
    openly = open_evidence(prepared, before, after)
    return Evidence(losses, parameters, artifacts, learning, memory, openly, run.why, unable)
