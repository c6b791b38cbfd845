"""Collects what the criteria are judged on, from a run that has just been trained."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.criteria.evidence import Evidence, PreferenceEvidence
from finetune.criteria.judge_learning import could_pass
from finetune.criteria.judge_preference import gains_of
from finetune.events import FirstGradients, StepDone
from finetune.evidence.extra_runs import Trainings, control_evidence, memory_evidence, why_no_memory
from finetune.evidence.observe import (
    Observation,
    artifact_evidence,
    learning_evidence,
    loss_evidence,
    open_evidence,
    parameter_evidence,
)
from finetune.ports import Session
from finetune.records import Outcome
from finetune.training.run import Run


def collect_evidence(
    run: Run,
    session: Session,
    saved: Path,
    looks: tuple[Observation, Observation, Mapping[str, str]],
    trainings: Trainings[Any],
    preference: PreferenceEvidence | None = None,
) -> Evidence:
    """Measure everything that the criteria ask for; the session may be that of an earlier step afterwards.

    Args:
        saved: the folder of what was trained.
        looks: the base and the tuned model as they were observed, and the fingerprints of the weights before training.
        preference: what the tuned model makes of pairs.
    """
    prepared, (before, after, fingerprints) = run.prepared, looks
    events = run.folder.read_events()
    # The steps that the kept weights are made of; what came after the best step has left nothing behind.
    steps = [event for event in events if isinstance(event, StepDone) and event.step <= trainings.kept]
    gradients = next((event.norms for event in events if isinstance(event, FirstGradients)), {})
    unable = set[str]()
    if run.start is not None:
        gradients, unable = {}, {"steps"}
        told = f"the run went on from the adapter {run.start.name}"
        run.why |= {"first_gradients": f"{told}, whose B is not zero", "steps": f"{told}: its first loss is no base's"}
    parameters = parameter_evidence(prepared, session, fingerprints, gradients, len(steps))
    with run.phase(f"check {saved.name}", "in a fresh process" + (", on a fresh base" if prepared.target else "")):
        artifacts = artifact_evidence(prepared, session, saved, run.folder.sizes(), run.why)
    if preference:
        beta = preference.beta
        flipped = control_evidence(
            prepared, before, trainings, lambda gains: gains_of(gains, beta).outcome == Outcome.PASSED, run.why
        )
        preference = replace(preference, control=flipped, why_no_control=run.why.get("control", ""))
    control = None if preference else control_evidence(prepared, before, trainings, could_pass, run.why)
    learning = learning_evidence(before, after, control, prepared, run.why)
    memory = None
    full_too = prepared.target is not None and not prepared.shape.quantized
    unable |= set() if full_too and run.backend.abilities.memory else {"memory"}
    if reason := why_no_memory(prepared, before, able=run.backend.abilities.memory):
        run.why["memory"] = reason
    else:
        with run.phase("measure memory", "LoRA and full fine-tuning, each in a fresh process"):
            memory = memory_evidence(prepared, run.why)
    losses = loss_evidence(prepared, [step.loss for step in steps], before, after)
    openly = open_evidence(prepared, before.open, after.open)
    return Evidence(losses, parameters, artifacts, learning, memory, openly, preference, run.why, frozenset(unable))
