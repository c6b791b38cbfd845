"""Judges a run: the five criteria as the strategy words them, and the companions that make them mean something."""

import math
from collections.abc import Mapping
from dataclasses import replace

from finetune.adapters.kinds import layer_tensor
from finetune.criteria.claims import judge_claims
from finetune.criteria.evidence import Evidence, LossEvidence
from finetune.criteria.judge_learning import judge_learning
from finetune.criteria.judge_memory import judge_memory
from finetune.criteria.judge_preference import judge_preference, of_pairs
from finetune.criteria.validator import (
    MIN_CHANGED_SHARE,
    MIN_LOSS_REDUCTION,
    TrainingSuccessValidator,
)
from finetune.criteria.verdicts import NOT_MEASURED, too_few_left, verdict
from finetune.errors import EvidenceError, counted
from finetune.records import Outcome, Reload, Verdict

_START_MARGIN = 1.0
"""Nats by which the start loss may exceed that of a uniform guess before 'it fell' means nothing."""
_LOWER = "> 5% lower"
_RELOADED_WHOLE = "The saved model reloads in a new process"
_STORED = 2.0**-23
"""By how much two logits can be apart, relatively, merely because they were written down in float32."""


def judge(evidence: Evidence) -> tuple[Verdict, ...]:
    """A verdict on every criterion and companion, each with the measured and the allowed value.

    Raises:
        EvidenceError: what was measured cannot be judged: a number is not finite, or two halves do not fit.
    """
    literal = [*_judge_loss(evidence), *judge_learning(evidence), *judge_memory(evidence)]
    claims: list[Verdict] = []
    if evidence.open:
        claims = judge_claims(evidence.open)
        if evidence.preference:
            claims = [*judge_preference(evidence.preference), *map(of_pairs, claims)]
        literal = [replace(each, counts=False) for each in literal]
    return (*claims, *literal, *_judge_parameters(evidence), *_judge_artifacts(evidence))


def overall(verdicts: tuple[Verdict, ...]) -> Outcome:
    """The run's outcome: the worst of the verdicts that count; what does not apply does not count."""
    return Outcome.worst(verdict.outcome for verdict in verdicts if verdict.counts) or Outcome.NOT_APPLICABLE


def _judge_loss(evidence: Evidence) -> list[Verdict]:
    loss = evidence.loss
    if "steps" in evidence.unable:
        reason = evidence.why.get("steps", "")
        convergence = verdict("loss-convergence", Outcome.NOT_APPLICABLE, NOT_MEASURED, _LOWER, reason)
    elif len(loss.per_step) < 2:
        few = f"{len(loss.per_step)} step"
        convergence = verdict("loss-convergence", Outcome.INCONCLUSIVE, few, _LOWER, "needs at least two steps")
    else:
        fell = TrainingSuccessValidator.loss_reduction(loss.per_step)
        measured = f"{_say_change(fell)} ({loss.per_step[0]:.3g} to {loss.per_step[-1]:.3g})"
        outcome = Outcome.of(fell > MIN_LOSS_REDUCTION)
        reason = "" if outcome == Outcome.PASSED else "the first step's batch against the last one's, which differ"
        convergence = verdict("loss-convergence", outcome, measured, _LOWER, reason, reduction=fell)
    same = TrainingSuccessValidator.loss_reduction((loss.fixed_before, loss.fixed_after))
    fixed = verdict(
        "loss-fixed-batches",
        Outcome.of(same > MIN_LOSS_REDUCTION),
        f"{_say_change(same)} ({loss.fixed_before:.3g} to {loss.fixed_after:.3g})",
        _LOWER,
        before=loss.fixed_before,
        after=loss.fixed_after,
    )
    start = of_pairs(_judge_start(loss)) if evidence.preference else _judge_start(loss)
    return [convergence, fixed, start, _judge_held_out(evidence)]


def _say_change(fell: float) -> str:
    """By what share a loss fell, in words: what rose is higher, and from twice on so many times as high."""
    if fell >= 0:
        return f"{fell:.1%} lower"
    return f"{-fell:.1%} higher" if fell > -1 else f"{1 - fell:,.3g}x higher"


def _judge_start(loss: LossEvidence) -> Verdict:
    """Falling from a bad start is not learning, unless the end is better than any guess could be."""
    guess = math.log(loss.vocab_size)
    outcome, reason = Outcome.PASSED, ""
    if loss.fixed_before > guess + _START_MARGIN:
        outcome = Outcome.INCONCLUSIVE if loss.fixed_after < guess else Outcome.FAILED
        reason = (
            f"the base is worse on these rows than a uniform guess ({guess:.3g}): is it the right base and tokenizer?"
        )
    allowed = f"<= {guess + _START_MARGIN:.3g} (ln of the vocabulary + 1)"
    measured = f"{loss.fixed_before:.3g} nats"
    return verdict("loss-start", outcome, measured, allowed, reason, start=loss.fixed_before, guess=guess)


def _judge_held_out(evidence: Evidence) -> Verdict:
    key, allowed = "loss-held-out", "lower than before"
    loss = evidence.loss
    before, after = loss.held_out_before, loss.held_out_after
    few = too_few_left(loss.held_out_rows, loss.held_out_trained, "held-out rows")
    if before is None or after is None:
        reason = few or evidence.why.get("held_out", "no rows were held out")
        return verdict(key, Outcome.INCONCLUSIVE if few else Outcome.NOT_APPLICABLE, NOT_MEASURED, allowed, reason)
    outcome = Outcome.PASSED if after < before else Outcome.FAILED if after > before * 1.05 else Outcome.INCONCLUSIVE
    reason = "" if outcome == Outcome.PASSED else "what was learned does not carry over to other rows"
    if few:
        outcome, reason = Outcome.INCONCLUSIVE, few
    measured = f"{before:.3g} to {after:.3g}"
    if loss.held_out_trained:
        measured += f" on {counted(loss.held_out_rows, 'row')} that training does not repeat"
    if loss.held_out_near:
        measured += f"; {counted(loss.held_out_near, 'row')} nearly as in training"
    return verdict(key, outcome, measured, allowed, reason, before=before, after=after)


def _judge_parameters(evidence: Evidence) -> list[Verdict]:
    parameters = evidence.parameters
    if parameters is None:
        return _not_seen(evidence, "parameters", "parameter-updates", "parameter-exactly", "parameter-first-step")
    declared = set(parameters.declared)
    if not declared <= parameters.before.keys() == parameters.after.keys():
        raise EvidenceError(
            "parameter updates need fingerprints of the same tensors, the declared ones among them, twice"
        )
    share = TrainingSuccessValidator.changed_share(
        {name: parameters.before[name] for name in declared}, {name: parameters.after[name] for name in declared}
    )
    whole = parameters.kind == "full"
    enough = whole or parameters.steps >= 2
    updates = verdict(
        "parameter-updates",
        Outcome.of(share > MIN_CHANGED_SHARE) if enough else Outcome.INCONCLUSIVE,
        f"{share:.0%} of {len(declared)} tensors",
        "> 80%",
        "" if enough else "A cannot change at the first step (B starts at 0): needs two steps",
        title="The model's tensors change" if whole else "",
        share=share,
    )
    if whole:
        frozen, neither = (
            "nothing is frozen: the whole model is trained",
            "no adapter is trained, so there is neither A nor B",
        )
        return [
            updates,
            verdict("parameter-exactly", Outcome.NOT_APPLICABLE, "0 frozen tensors", "0", frozen),
            verdict("parameter-first-step", Outcome.NOT_APPLICABLE, NOT_MEASURED, "B > 0, A = 0", neither),
        ]
    changed = {name for name in parameters.before if parameters.before[name] != parameters.after[name]}
    strays = sorted(changed - declared)
    exactly = verdict(
        "parameter-exactly",
        Outcome.of(not strays),
        f"{len(strays)} of {len(parameters.before) - len(declared)} frozen tensors",
        "0",
        f"changed: {strays[0]}" if strays else "",
    )
    return [updates, exactly, _judge_first_gradients(evidence, parameters.first_gradients)]


def _not_seen(evidence: Evidence, part: str, *keys: str) -> list[Verdict]:
    reason = evidence.why.get(part, "")
    return [verdict(key, Outcome.NOT_APPLICABLE, NOT_MEASURED, "", reason) for key in keys]


def _judge_first_gradients(evidence: Evidence, norms: Mapping[str, float]) -> Verdict:
    key = "parameter-first-step"
    if not norms:
        reason = evidence.why.get("first_gradients", "the first step's gradients were not recorded")
        return verdict(key, Outcome.NOT_APPLICABLE, NOT_MEASURED, "B > 0, A = 0", reason)
    # Written so that NaN is no gradient.
    found = {name: known.tensor for name in norms if (known := layer_tensor(name))}
    silent = [name for name, one in found.items() if one.first_gradient == "some" and not 0 < norms[name] < math.inf]
    moved = [name for name, one in found.items() if one.first_gradient == "zero" and norms[name] != 0]
    measured = f"{len(silent)} B without, {len(moved)} A with a gradient"
    example = f"for example {(silent + moved)[0]}" if silent or moved else ""
    return verdict(key, Outcome.of(not silent and not moved), measured, "0 and 0", example)


def _judge_artifacts(evidence: Evidence) -> list[Verdict]:
    artifacts = evidence.artifacts
    if artifacts is None or evidence.parameters is None:
        return _not_seen(evidence, "artifacts", "artifacts", "artifacts-no-strays", "artifacts-reload")
    empty = [name for name, size in artifacts.files.items() if size == 0]
    verdicts = [
        verdict(
            "artifacts",
            Outcome.of(TrainingSuccessValidator.validate_artifacts(artifacts.files)),
            f"{len(artifacts.files)} files, {len(empty)} empty",
            "all there, none empty",
        ),
        verdict(
            "artifacts-no-strays",
            Outcome.of(not artifacts.stray),
            f"{len(artifacts.stray)} files",
            "0",
            ", ".join(artifacts.stray[:3]),
        ),
    ]
    whole = evidence.parameters.kind == "full"
    if artifacts.reload is not None:
        return [*verdicts, _judge_reload(artifacts.reload, whole=whole)]
    reason = evidence.why.get("reload", "not tried")
    title = _RELOADED_WHOLE if whole else ""
    return [
        *verdicts,
        verdict("artifacts-reload", Outcome.INCONCLUSIVE, NOT_MEASURED, "same logits", reason, title=title),
    ]


def _judge_reload(reload: Reload, *, whole: bool) -> Verdict:
    """The same logits within rounding, and not those of the base: an effect within rounding shows neither."""
    limit, effect, subject = reload.allowed, reload.difference_from_base, "the saved model" if whole else "the adapter"
    outcome, reason = Outcome.of(reload.difference <= limit), ""
    if not effect > _STORED * reload.largest_logit:
        outcome, reason = Outcome.FAILED, f"{subject} changes nothing"
    elif not effect > limit:
        outcome = Outcome.worst([outcome, Outcome.INCONCLUSIVE]) or outcome
        reason = f"what {subject} changes cannot be told from rounding"
    seen = f"; {limit / effect:.2g} of what {subject} changes would show" if effect > limit else ""
    return verdict(
        "artifacts-reload",
        outcome,
        f"max logit difference: {reload.difference:.2g} to the trained, {effect:.2g} to the base",
        f"<= {limit:.2g}, {limit / reload.rounding:.0f} times rounding{seen}",
        reason,
        title=_RELOADED_WHOLE if whole else "",
        difference=reload.difference,
        rounding=reload.rounding,
    )
