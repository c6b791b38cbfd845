"""Laws of the judges: thresholds are exact, noise never passes, and what was not measured never passes."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.criteria.evidence import ArtifactEvidence, ControlEvidence, Evidence, MemoryEvidence
from finetune.criteria.judge import judge, overall
from finetune.criteria.validator import TrainingSuccessValidator as Validator
from finetune.errors import EvidenceError
from finetune.records import Outcome, Reload, Verdict
from support.evidence import ADAPTER, COUNT, FROZEN, altered, healthy, measure, scores, verdicts_on

NOT_FINITE = (math.nan, math.inf, -math.inf)
RANK = {"failed": 0, "inconclusive": 1, "passed": 2}


def _tensors(changed: int) -> tuple[dict[str, str], dict[str, str]]:
    """Ten tensors before and after, so many of them changed."""
    return {str(n): "a" for n in range(10)}, {str(n): "ab"[n < changed] for n in range(10)}


@pytest.mark.parametrize(
    ("judged", "at", "above"),
    [
        (Validator.validate_loss_convergence, ([100.0, 3.0, 95.0],), ([100.0, 300.0, 94.999],)),
        (
            Validator.validate_model_learning,
            (["n"] * 10, ["y"] * 3 + ["n"] * 7, ["y"] * 10),
            (["n"] * 10, ["y"] * 4 + ["n"] * 6, ["y"] * 10),
        ),
        (Validator.validate_memory_efficiency, (100, 70), (100, 69.999)),
        (Validator.validate_parameter_updates, _tensors(8), _tensors(9)),
        (Validator.validate_artifacts, ({"a": 1, "b": 0},), ({"a": 1, "b": 1},)),
    ],
)
def test_validator_exactly_the_threshold_is_not_enough(
    judged: Any, at: tuple[Any, ...], above: tuple[Any, ...]
) -> None:
    """Exactly 5, 30, 30, 80% is not more than that; the next larger share is."""
    assert judged(*at) is False
    assert judged(*above) is True


@pytest.mark.parametrize(
    ("judged", "given_"),
    [
        *[(Validator.validate_loss_convergence, (losses,)) for losses in ([], [1.0], [0.0, -1.0], [-1.0, -2.0])],
        *[(Validator.validate_loss_convergence, ([4.0, bad, 1.0],)) for bad in NOT_FINITE],
        (Validator.validate_loss_convergence, ([math.nan, 1.0],)),
        (Validator.validate_model_learning, ([], [], [])),
        (Validator.validate_model_learning, (["a"], ["a", "b"], ["a", "b"])),
        (Validator.validate_model_learning, (["a", "b"], ["a"], ["a", "b"])),
        *[(Validator.validate_memory_efficiency, (bad, 1)) for bad in (*NOT_FINITE, 0, -1)],
        *[(Validator.validate_memory_efficiency, (1, bad)) for bad in (*NOT_FINITE, 0, -1)],
        (Validator.validate_parameter_updates, ({}, {})),
        (Validator.validate_parameter_updates, ({"a": "1"}, {"b": "1"})),
        (Validator.validate_parameter_updates, ({"a": "1", "b": "1"}, {"a": "2"})),
    ],
)
def test_validator_refuses_to_judge_without_evidence(judged: Any, given_: tuple[Any, ...]) -> None:
    """Missing, unequal or impossible figures are an error that says so, never a verdict."""
    with pytest.raises(EvidenceError) as caught:
        judged(*given_)
    assert caught.value.exit_code == 4


def test_validator_no_file_is_no_artifact() -> None:
    """No file at all is not a success."""
    assert Validator.validate_artifacts({}) is False


def test_validator_counts_only_wrong_turned_right() -> None:
    """An answer that was right already, or only changed, is no improvement."""
    before, after = ["right", "wrong", "wrong", "right"], ["right", "other", "right", "wrong"]
    assert Validator.improved_share(before, after, ["right"] * 4) == 0.25


def test_judge_a_healthy_run_holds_throughout() -> None:
    """All 17 verdicts on a healthy run hold, five of them the criteria themselves and twelve their companions."""
    found = verdicts_on(healthy())
    assert {key: verdict.outcome for key, verdict in found.items() if verdict.outcome != "passed"} == {}
    assert len(found) == 17
    assert sorted(verdict.criterion for verdict in found.values() if not verdict.companion) == [1, 2, 3, 4, 5]
    assert overall(tuple(found.values())) == "passed"


def _changed(value: str, *names: str) -> dict[str, str]:
    return {**healthy().parameters.after, **dict.fromkeys(names, value)}


def _gradient(name: str, norm: float) -> Evidence:
    return altered("parameters", first_gradients={**healthy().parameters.first_gradients, name: norm})


B_NAMES = [name for name in ADAPTER if "lora_B" in name]
BREAKS: list[tuple[str, Evidence]] = [
    ("loss-convergence", altered("loss", per_step=(4.0, 1.0, 3.801))),
    ("loss-fixed-batches", altered("loss", fixed_after=4.1 * 0.951)),
    ("loss-start", altered("loss", fixed_before=math.log(512) + 1.001, fixed_after=math.log(512))),
    ("loss-held-out", altered("loss", held_out_after=4.2 * 1.051)),
    ("model-learning", altered("learning", tuned=scores(6))),
    ("learning-signed", altered("learning", base=scores(10), tuned=scores(10))),
    ("learning-control", altered("learning", control=ControlEvidence(scores(5)))),
    ("learning-control", altered("learning", tuned=scores(3), control=ControlEvidence(scores(4)))),
    ("learning-retention", altered("learning", retention_base=scores(18), retention_tuned=scores(8))),
    ("memory-efficiency", altered("memory", lora=measure("lora", 70_000_000, 10_000))),
    ("memory-exact", altered("memory", lora=measure("lora", 50_000_000, 700_000))),
    ("memory-resident", altered("memory", lora=measure("lora", 50_000_000, 1, peak_rss=1_100_000_000))),
    ("parameter-updates", altered("parameters", after=_changed("old", ADAPTER[0], ADAPTER[3]))),
    ("parameter-exactly", altered("parameters", after=_changed("new", FROZEN[2]))),
    ("parameter-first-step", _gradient(ADAPTER[0], 1e-30)),
    ("parameter-first-step", _gradient(B_NAMES[-1], 0.0)),
    ("artifacts", altered("artifacts", files={"adapter/adapter_model.safetensors": 9, "report.html": 0})),
    ("artifacts", altered("artifacts", files={})),
    ("artifacts-no-strays", altered("artifacts", stray=(".run.json.7.part",))),
    ("artifacts-reload", altered("artifacts", reload=Reload(8, 12.0, 1.61e-3, 3.0, 1e-4, 1.6e-3))),
    ("artifacts-reload", altered("artifacts", reload=Reload(8, 12.0, 0.481, 3.0, 0.16, 0.48))),
    ("artifacts-reload", altered("artifacts", reload=Reload(8, 12.0, 0.0, 0.0, 1e-4, 1.6e-3))),
    ("artifacts-reload", altered("artifacts", reload=Reload(8, 12.0, 0.0, 1.4e-6, 1e-4, 1.6e-3))),
    ("artifacts-reload", altered("artifacts", reload=Reload(8, 12.0, 1.61e-3, 1.59e-3, 1e-4, 1.6e-3))),
]


@pytest.mark.parametrize(("key", "evidence"), BREAKS, ids=[f"{n}-{key}" for n, (key, _) in enumerate(BREAKS)])
def test_judge_each_fault_breaks_its_verdict(key: str, evidence: Evidence) -> None:
    """Each fault, just beyond its threshold, breaks the verdict that watches for it, and the run's outcome."""
    assert {key for key, _ in BREAKS} == set(verdicts_on(healthy()))
    found = verdicts_on(evidence)
    assert found[key].outcome == "failed"
    assert overall(tuple(found.values())) == "failed"


def test_judge_a_bad_start_is_inconclusive_only_where_the_end_beats_a_guess() -> None:
    """A base worse than guessing leaves convergence inconclusive when the end beats a guess, and fails it otherwise."""
    guess = math.log(512)
    for end, outcome in ((guess - 1e-9, "inconclusive"), (guess, "failed"), (guess + 0.5, "failed")):
        verdict = verdicts_on(altered("loss", fixed_before=guess + 2, fixed_after=end))["loss-start"]
        assert verdict.outcome == outcome
        assert "uniform guess" in verdict.reason
    assert verdicts_on(altered("loss", fixed_before=guess + 1, fixed_after=guess))["loss-start"].outcome == "passed"


MISSES: list[tuple[str, Outcome, str, Evidence]] = [
    ("loss-convergence", "inconclusive", "", altered("loss", per_step=(4.0,))),
    ("loss-convergence", "inconclusive", "", altered("loss", per_step=())),
    ("loss-held-out", "not applicable", "held_out", altered("loss", held_out_before=None)),
    ("loss-held-out", "not applicable", "held_out", altered("loss", held_out_after=None)),
    ("model-learning", "not applicable", "learning", healthy(learning=None)),
    ("learning-signed", "not applicable", "learning", healthy(learning=None)),
    ("learning-control", "not applicable", "learning", healthy(learning=None)),
    ("learning-retention", "not applicable", "learning", healthy(learning=None)),
    ("learning-control", "inconclusive", "control", altered("learning", control=None)),
    ("learning-retention", "not applicable", "retention", altered("learning", retention_base=None)),
    ("learning-retention", "not applicable", "retention", altered("learning", retention_tuned=None)),
    ("memory-efficiency", "inconclusive", "memory", healthy(memory=None)),
    ("memory-exact", "inconclusive", "memory", healthy(memory=None)),
    ("memory-resident", "inconclusive", "memory", healthy(memory=None)),
    ("memory-efficiency", "not applicable", "memory", healthy(memory=None, unable=frozenset({"memory"}))),
    ("parameter-updates", "inconclusive", "", altered("parameters", steps=1)),
    ("parameter-first-step", "not applicable", "first_gradients", altered("parameters", first_gradients={})),
    ("artifacts-reload", "inconclusive", "reload", altered("artifacts", reload=None)),
    ("artifacts-reload", "inconclusive", "", altered("artifacts", reload=Reload(8, 12.0, 0.0, 0.1, 0.16, 0.48))),
]


@pytest.mark.parametrize(("key", "outcome", "part", "evidence"), MISSES)
def test_judge_what_was_not_measured_never_passes(key: str, outcome: Outcome, part: str, evidence: Evidence) -> None:
    """A verdict without its evidence is inconclusive or does not apply, with the reason given or one of its own."""
    own = verdicts_on(evidence)[key]
    assert own.outcome == outcome
    assert own.reason
    if part:
        told = verdicts_on(dataclasses.replace(evidence, why={part: "the dog ate it"}))[key]
        assert (told.outcome, told.reason) == (outcome, "the dog ate it")


NUMBERS: list[tuple[str, Any, tuple[float, ...]]] = [
    ("loss-convergence", lambda bad: altered("loss", per_step=(4.0, bad, 1.0)), NOT_FINITE),
    ("loss-fixed-batches", lambda bad: altered("loss", fixed_before=bad), NOT_FINITE),
    ("loss-fixed-batches", lambda bad: altered("loss", fixed_after=bad), NOT_FINITE),
    ("loss-start", lambda bad: altered("loss", fixed_before=bad), NOT_FINITE),
    ("loss-held-out", lambda bad: altered("loss", held_out_before=bad), (math.nan,)),
    ("loss-held-out", lambda bad: altered("loss", held_out_after=bad), (math.nan, math.inf)),
    ("parameter-first-step", lambda bad: _gradient(ADAPTER[0], bad), NOT_FINITE),
    ("parameter-first-step", lambda bad: _gradient(B_NAMES[0], bad), NOT_FINITE),
    (
        "artifacts-reload",
        lambda bad: altered("artifacts", reload=Reload(8, 12, bad, 3, 1e-4, 1e-3)),
        (math.nan, math.inf),
    ),
    (
        "artifacts-reload",
        lambda bad: altered("artifacts", reload=Reload(8, 12, 0, bad, 1e-4, 1e-3)),
        (math.nan, -math.inf),
    ),
    ("memory-efficiency", lambda bad: altered("memory", lora=measure("lora", 1, 1, peak_tensors=bad)), NOT_FINITE),
    ("memory-exact", lambda bad: altered("memory", full=measure("full", 1, 1, gradient_bytes=bad)), NOT_FINITE),
]


@pytest.mark.parametrize(("key", "make", "bad"), [(key, make, bad) for key, make, bads in NUMBERS for bad in bads])
def test_judge_a_number_that_is_not_finite_never_passes(key: str, make: Any, bad: float) -> None:
    """NaN or infinity in any of 12 measured numbers is an error or a verdict that does not hold."""
    try:
        outcome = verdicts_on(make(bad))[key].outcome
    except EvidenceError:
        outcome = "inconclusive"
    assert outcome != "passed"


@given(st.integers(1, 40), st.data())
def test_judge_one_more_right_answer_never_lowers_a_verdict(count: int, data: st.DataObject) -> None:
    """When one more answer of the tuned model is right, no verdict gets worse; of the control, none better."""
    marks = {
        name: data.draw(st.lists(st.booleans(), min_size=count, max_size=count), label=name)
        for name in ("base", "tuned", "control", "retention_base", "retention_tuned")
    }
    lucky = data.draw(st.sampled_from(["tuned", "retention_tuned", "control"]))
    wrong = [index for index, mark in enumerate(marks[lucky]) if not mark]
    more = {**marks}
    if wrong:
        more[lucky] = [mark or index == wrong[0] for index, mark in enumerate(marks[lucky])]
    old, new = (
        verdicts_on(
            altered(
                "learning",
                **{
                    name: ControlEvidence(scores(value, count)) if name == "control" else scores(value, count)
                    for name, value in each.items()
                },
            )
        )
        for each in (marks, more)
    )
    for key in ("model-learning", "learning-signed", "learning-control", "learning-retention"):
        change = RANK[new[key].outcome] - RANK[old[key].outcome]
        assert change >= 0 if lucky != "control" else change <= 0


def _passes(key: str, base: int, tuned: int, both: int = 0) -> bool:
    """Whether a verdict passes when `both` of the right answers are the same questions."""
    before = [index < base for index in range(COUNT)]
    after = [base - both <= index < base - both + tuned for index in range(COUNT)]
    return verdicts_on(altered("learning", base=scores(before), tuned=scores(after)))[key].outcome == "passed"


def test_judge_noise_passes_the_literal_criterion_and_not_its_companion() -> None:
    """20 answers that coin flips make better or worse pass 'at least 7 improve' 94% of the time, the signed 2.5%."""
    literal = signed = 0.0
    for better in range(COUNT + 1):
        chance = math.comb(COUNT, better) / 2**COUNT
        literal += chance * _passes("model-learning", COUNT - better, better)
        signed += chance * _passes("learning-signed", COUNT - better, better)
    assert literal == pytest.approx(0.942, abs=0.001)
    assert 0 < signed <= 0.025


@pytest.mark.parametrize("skill", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_judge_two_equally_skilled_models_seldom_differ(skill: float) -> None:
    """Base and tuned, each right at random with the same chance whatever it is, hold at most 2.5% of the time."""
    total = 0.0
    for both in range(COUNT + 1):
        for better in range(COUNT + 1 - both):
            for worse in range(min(better - 6, COUNT + 1 - both - better)):
                ways = (
                    math.comb(COUNT, both) * math.comb(COUNT - both, better) * math.comb(COUNT - both - better, worse)
                )
                rest = COUNT - both - better - worse
                chance = ways * skill ** (2 * both + better + worse) * (1 - skill) ** (2 * rest + better + worse)
                if chance > 1e-5:
                    total += chance * _passes("learning-signed", both + worse, both + better, both)
    assert total <= 0.025


def test_judge_a_control_that_learns_as_much_breaks() -> None:
    """Above 20% right by the shuffled-label control fails, however good the tuned model is; 20% is not above."""
    outcomes = [
        verdicts_on(altered("learning", control=ControlEvidence(scores(right))))["learning-control"].outcome
        for right in range(21)
    ]
    assert outcomes[:5].count("passed") >= 4
    assert outcomes[5:] == ["failed"] * 16


def test_judge_retention_may_lose_ten_points_and_no_more() -> None:
    """10 points lost pass; more are inconclusive while they may be chance, and fail once the whole interval is."""
    for lost, outcome in (
        (0, "passed"),
        (1, "passed"),
        (2, "passed"),
        (3, "inconclusive"),
        (10, "failed"),
        (18, "failed"),
    ):
        assert (
            verdicts_on(altered("learning", retention_tuned=scores(18 - lost)))["learning-retention"].outcome == outcome
        )


@pytest.mark.parametrize(
    "other", [{"batch_size": 5}, {"length": 95}, {"dtype": "bfloat16"}, {"steps": 4}], ids=lambda each: next(iter(each))
)
def test_judge_memory_only_at_equal_sizes(other: dict[str, Any]) -> None:
    """LoRA and full fine-tuning measured at different sizes are never compared."""
    memory = healthy().memory
    assert memory is not None
    with pytest.raises(EvidenceError, match="different sizes"):
        judge(healthy(memory=MemoryEvidence(memory.lora, dataclasses.replace(memory.full, **other))))


def test_judge_resident_memory_too_small_to_tell_does_not_apply() -> None:
    """Below what can be resolved the resident set says nothing, be it larger, equal or below the frameworks alone."""
    for lora, full in ((10, 20), (20, 10), (0, 10), (-5, 10), (-5, -7), (0, 0)):
        small = [
            measure(
                name, 100 - 60 * (name == "lora"), 100 - 90 * (name == "lora"), peak_rss=400_000_000 + above * 10**6
            )
            for name, above in (("lora", lora), ("full", full))
        ]
        found = verdicts_on(healthy(memory=MemoryEvidence(*small)))["memory-resident"]
        assert (found.outcome, bool(found.reason)) == ("not applicable", True)


@pytest.mark.parametrize(
    "change",
    [
        {"declared": ("nowhere",)},
        {"after": {}},
        {"before": {}},
        {"declared": ()},
        {"after": {**healthy().parameters.after, "new.weight": "new"}},
    ],
)
def test_judge_parameters_only_of_the_same_tensors(change: dict[str, Any]) -> None:
    """Fingerprints of other tensors after than before, or of none of the declared ones, are no evidence."""
    with pytest.raises(EvidenceError):
        judge(altered("parameters", **change))


def test_judge_a_base_that_knows_the_answers_cannot_improve() -> None:
    """When the base answers 70% already, too little room is left: inconclusive, and the reason says so."""
    found = verdicts_on(altered("learning", base=scores(14), tuned=scores(20)))["model-learning"]
    assert (found.outcome, "so many already" in found.reason) == ("inconclusive", True)


@given(
    st.lists(st.floats(0.01, 20), min_size=2, max_size=5),
    st.integers(0, COUNT),
    st.integers(0, COUNT),
    st.integers(0, 5),
    st.floats(0, 1),
    st.integers(0, 10),
)
def test_judge_every_verdict_is_told_with_measured_and_allowed(
    losses: list[float], base: int, tuned: int, strays: int, difference: float, steps: int
) -> None:
    """Whatever was measured, each of the 17 verdicts names a measured and an allowed value, and reasons are given."""
    after = dict.fromkeys((*ADAPTER, *FROZEN[:strays]), "new")
    evidence = healthy(
        loss=dataclasses.replace(healthy().loss, per_step=tuple(losses), fixed_after=losses[-1]),
        learning=dataclasses.replace(healthy().learning, base=scores(base), tuned=scores(tuned)),  # type: ignore[type-var]
        artifacts=ArtifactEvidence({"a": strays}, Reload(1, 5.0, difference, 1.0, 1e-5, 1.6e-4)),
        parameters=dataclasses.replace(
            healthy().parameters, after={**healthy().parameters.before, **after}, steps=steps
        ),
    )
    found = verdicts_on(evidence)
    for verdict in found.values():
        assert verdict.measured
        assert verdict.allowed
        assert verdict.title
        assert verdict.reason or verdict.outcome in ("passed", "failed", "inconclusive")
        assert all(math.isfinite(number) for number in verdict.numbers.values())
    assert found["parameter-exactly"].outcome == ("failed" if strays else "passed")
    assert found["parameter-updates"].outcome == ("passed" if steps >= 2 else "inconclusive")


@given(st.lists(st.sampled_from(["passed", "failed", "inconclusive", "not applicable"])))
def test_overall_is_the_worst_that_applies(outcomes: list[Outcome]) -> None:
    """One failure fails the run; else one inconclusive leaves it open; what does not apply does not count."""
    verdicts = tuple(Verdict(str(n), "title", 1, outcome, "1", "2") for n, outcome in enumerate(outcomes))
    expected = min((outcome for outcome in outcomes if outcome in RANK), key=RANK.__getitem__, default="not applicable")
    assert overall(verdicts) == expected
