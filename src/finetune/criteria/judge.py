"""Judges a run: the five criteria as the strategy words them, and the companions that make them mean something."""

import math

from finetune.criteria.evidence import Evidence, LossEvidence
from finetune.criteria.judge_learning import judge_learning
from finetune.criteria.judge_memory import judge_memory
from finetune.criteria.validator import (
    MIN_CHANGED_SHARE,
    MIN_LOSS_REDUCTION,
    TrainingSuccessValidator,
)
from finetune.errors import EvidenceError
from finetune.records import Outcome, Verdict

_START_MARGIN = 1.0
"""Nats by which the start loss may exceed that of a uniform guess before 'it fell' means nothing."""
_FIRST_STEP = "At the first step B has a gradient and A has none"
_LOGIT_TOLERANCE = 1e-4
"""Allowed difference of reloaded logits, as a share of the largest logit; float32 sums in another order stay below."""


def judge(evidence: Evidence) -> tuple[Verdict, ...]:
    """A verdict on every criterion and companion, each with the measured and the allowed value.

    Raises:
        EvidenceError: what was measured cannot be judged: a number is not finite, or two halves do not fit.
    """
    return (
        *_judge_loss(evidence),
        *judge_learning(evidence),
        *judge_memory(evidence),
        *_judge_parameters(evidence),
        *_judge_artifacts(evidence),
    )


def overall(verdicts: tuple[Verdict, ...]) -> Outcome:
    """The run's outcome: the worst of its verdicts; what does not apply does not count."""
    outcomes = {verdict.outcome for verdict in verdicts}
    ranked: tuple[Outcome, ...] = ("broken", "undecided", "holds")
    return next((outcome for outcome in ranked if outcome in outcomes), "not applicable")


def _word(holds: bool) -> Outcome:  # noqa: FBT001
    return "holds" if holds else "broken"


def _judge_loss(evidence: Evidence) -> list[Verdict]:
    loss = evidence.loss
    verdicts = []
    if len(loss.per_step) < 2:
        verdicts.append(
            Verdict(
                "loss-convergence",
                "Training loss falls",
                1,
                "undecided",
                f"{len(loss.per_step)} step",
                "> 5 % lower",
                "needs at least two steps",
            )
        )
    else:
        fell = TrainingSuccessValidator.loss_reduction(loss.per_step)
        verdicts.append(
            Verdict(
                "loss-convergence",
                "Training loss falls",
                1,
                _word(fell > MIN_LOSS_REDUCTION),
                f"{fell:.1%} lower ({loss.per_step[0]:.3g} to {loss.per_step[-1]:.3g})",
                "> 5 % lower",
                numbers={"reduction": fell},
            )
        )
    same = TrainingSuccessValidator.loss_reduction((loss.fixed_before, loss.fixed_after))
    verdicts.append(
        Verdict(
            "loss-fixed-batches",
            "It falls on the same batches, dropout off",
            1,
            _word(same > MIN_LOSS_REDUCTION),
            f"{same:.1%} lower ({loss.fixed_before:.3g} to {loss.fixed_after:.3g})",
            "> 5 % lower",
            companion=True,
            numbers={"before": loss.fixed_before, "after": loss.fixed_after},
        )
    )
    return [*verdicts, _judge_start(loss), *_judge_held_out(evidence)]


def _judge_start(loss: LossEvidence) -> Verdict:
    """Falling from a bad start is not learning, unless the end is better than any guess could be."""
    guess = math.log(loss.vocab_size)
    outcome: Outcome = "holds"
    reason = ""
    if loss.fixed_before > guess + _START_MARGIN:
        outcome = "undecided" if loss.fixed_after < guess else "broken"
        reason = (
            f"the base is worse on these rows than a uniform guess ({guess:.3g}): is it the right base and tokenizer?"
        )
    return Verdict(
        "loss-start",
        "The start was plausible",
        1,
        outcome,
        f"{loss.fixed_before:.3g} nats",
        f"<= {guess + _START_MARGIN:.3g} (ln of the vocabulary + 1)",
        reason,
        companion=True,
        numbers={"start": loss.fixed_before, "guess": guess},
    )


def _judge_held_out(evidence: Evidence) -> list[Verdict]:
    before, after = evidence.loss.held_out_before, evidence.loss.held_out_after
    if before is None or after is None:
        reason = evidence.why.get("held_out", "no rows were held out")
        return [
            Verdict(
                "loss-held-out",
                "It falls on rows never trained on",
                1,
                "not applicable",
                "not measured",
                "lower than before",
                reason,
                companion=True,
            )
        ]
    outcome: Outcome = "holds" if after < before else "broken" if after > before * 1.05 else "undecided"
    return [
        Verdict(
            "loss-held-out",
            "It falls on rows never trained on",
            1,
            outcome,
            f"{before:.3g} to {after:.3g}",
            "lower than before",
            "" if outcome == "holds" else "what was learned does not carry over to other rows",
            companion=True,
            numbers={"before": before, "after": after},
        )
    ]


def _judge_parameters(evidence: Evidence) -> list[Verdict]:
    parameters = evidence.parameters
    declared = set(parameters.declared)
    if not declared <= parameters.before.keys() == parameters.after.keys():
        raise EvidenceError(
            "parameter updates need fingerprints of the same tensors, the declared ones among them, twice"
        )
    adapter_before = {name: parameters.before[name] for name in declared}
    adapter_after = {name: parameters.after[name] for name in declared}
    share = TrainingSuccessValidator.changed_share(adapter_before, adapter_after)
    whole = parameters.kind == "full"
    enough = whole or parameters.steps >= 2
    verdicts = [
        Verdict(
            "parameter-updates",
            "The model's tensors change" if whole else "Adapter tensors change",
            4,
            _word(share > MIN_CHANGED_SHARE) if enough else "undecided",
            f"{share:.0%} of {len(declared)} tensors",
            "> 80 %",
            "" if enough else "A cannot change at the first step (B starts at 0): needs two steps",
            numbers={"share": share},
        )
    ]
    if whole:
        return [*verdicts, *_without_adapter()]
    changed = {name for name in parameters.before if parameters.before[name] != parameters.after[name]}
    strays = sorted(changed - declared)
    verdicts.append(
        Verdict(
            "parameter-exactly",
            "Nothing else changes",
            4,
            _word(not strays),
            f"{len(strays)} of {len(parameters.before) - len(declared)} frozen tensors",
            "0",
            f"changed: {strays[0]}" if strays else "",
            companion=True,
        )
    )
    return [*verdicts, _judge_first_gradients(evidence)]


def _without_adapter() -> list[Verdict]:
    """What is said of the frozen rest and of A and B where the whole model is trained."""
    return [
        Verdict(
            "parameter-exactly",
            "Nothing else changes",
            4,
            "not applicable",
            "0 frozen tensors",
            "0",
            "nothing is frozen: the whole model is trained",
            companion=True,
        ),
        Verdict(
            "parameter-first-step",
            _FIRST_STEP,
            4,
            "not applicable",
            "not measured",
            "B > 0, A = 0",
            "no adapter is trained, so there is neither A nor B",
            companion=True,
        ),
    ]


def _judge_first_gradients(evidence: Evidence) -> Verdict:
    norms = evidence.parameters.first_gradients
    title = _FIRST_STEP
    if not norms:
        reason = evidence.why.get("first_gradients", "the first step's gradients were not recorded")
        return Verdict(
            "parameter-first-step", title, 4, "not applicable", "not measured", "B > 0, A = 0", reason, companion=True
        )
    # Written so that NaN is no gradient.
    silent = [name for name, norm in norms.items() if ".lora_B." in name and not 0 < norm < math.inf]
    moved = [name for name, norm in norms.items() if ".lora_A." in name and norm != 0]
    return Verdict(
        "parameter-first-step",
        title,
        4,
        _word(not silent and not moved),
        f"{len(silent)} B without, {len(moved)} A with a gradient",
        "0 and 0",
        f"for example {(silent + moved)[0]}" if silent or moved else "",
        companion=True,
    )


def _judge_artifacts(evidence: Evidence) -> list[Verdict]:
    artifacts = evidence.artifacts
    good = TrainingSuccessValidator.validate_artifacts(artifacts.files)
    empty = [name for name, size in artifacts.files.items() if size == 0]
    verdicts = [
        Verdict(
            "artifacts",
            "Files are written",
            5,
            _word(good),
            f"{len(artifacts.files)} files, {len(empty)} empty",
            "all there, none empty",
        ),
        Verdict(
            "artifacts-no-strays",
            "Nothing unreferenced is left",
            5,
            _word(not artifacts.stray),
            f"{len(artifacts.stray)} files",
            "0",
            ", ".join(artifacts.stray[:3]),
            companion=True,
        ),
    ]
    reload = artifacts.reload
    title = "The adapter works in a fresh process on a fresh base"
    idle = "the adapter changes nothing"
    if evidence.parameters.kind == "full":
        title, idle = "The saved model works in a fresh process", "the saved model is the base"
    if reload is None:
        reason = evidence.why.get("reload", "not tried")
        missing = Verdict(
            "artifacts-reload", title, 5, "undecided", "not measured", "same logits", reason, companion=True
        )
        return [*verdicts, missing]
    limit = _LOGIT_TOLERANCE * max(reload.largest_logit, 1.0)
    same, differs = reload.difference <= limit, reload.difference_from_base > limit
    verdicts.append(
        Verdict(
            "artifacts-reload",
            title,
            5,
            _word(same and differs),
            f"logits differ by {reload.difference:.2g}; from the base by {reload.difference_from_base:.2g}",
            f"<= {limit:.2g}; > {limit:.2g}",
            "" if differs else idle,
            companion=True,
        )
    )
    return verdicts
