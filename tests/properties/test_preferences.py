"""Laws of preferences: which rows are pairs, that a pair is never parted, what its loss is, and how it is judged."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.chat.encoder import Encoder
from finetune.config import Plan, load_config
from finetune.criteria.evidence import ControlEvidence, Paired, PreferenceEvidence
from finetune.criteria.judge_preference import judge_preference
from finetune.data.batches import epoch_batches, fixed_batches, sides_of
from finetune.data.shape import ShapedRows, shape_rows
from finetune.errors import ConfigError, DataError
from finetune.objectives.preference import Preference, reference_of
from finetune.records import Batch, Conversation, ModelLocation, Row, TokenizedRow
from finetune_strategies.profiles import examples
from finetune_strategies.tokenizers import tokenizer_folder
from support.conversations import FIRST
from support.tiny_llamas import adapted, check_slopes, make_rows

U = {"role": "user", "content": "u"}
GOOD, BAD = ({"role": "assistant", "content": said} for said in "gb")
SPELLINGS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "u", "chosen": "g", "rejected": "b"},
    "lists": {"prompt": [U], "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [U, GOOD], "rejected": [U, BAD]},
    "with the prompt again": {"prompt": "u", "chosen": [U, GOOD], "rejected": [U, BAD], "score_chosen": 8.0},
    "whole conversations in texts": {
        "chosen": "\n\nHuman: u\n\nAssistant: g",
        "rejected": "\n\nHuman: u\n\nAssistant: b",
    },
    "single messages": {
        "conversations": [{"from": "human", "value": "u"}],
        "chosen": {"from": "gpt", "value": "g"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "other names": {"question": "u", "response_j": "g", "response_k": "b"},
    "longer names": {"question": "u", "chosen_response": "g", "rejected_response": "b", "chosen_rating": 5},
}


def paired(*rows: dict[str, Any], **how: Any) -> ShapedRows:
    """The rows read as pairs."""
    return shape_rows([Row(values, f"rows:{number}") for number, values in enumerate(rows, 1)], pairs=True, **how)


@pytest.mark.parametrize("name", SPELLINGS)
def test_pair_is_read_in_every_spelling(name: str) -> None:
    """A prompt and two answers are the same pair, however they are written; without dpo they are refused by name."""
    [pair] = paired(SPELLINGS[name]).examples
    assert isinstance(pair, Conversation)
    assert [(message.role, message.content) for message in pair.messages] == [("user", "u"), ("assistant", "g")]
    assert pair.rejected is not None
    assert (pair.rejected.role, pair.rejected.content) == ("assistant", "b")
    with pytest.raises(DataError) as refused:
        shape_rows([Row(SPELLINGS[name], "rows:1")])
    if name != "other names":
        assert "training.objective=dpo" in refused.value.hint


def test_columns_name_the_sides() -> None:
    """`data.columns` names prompt, chosen and rejected; a field that pairs have none of is refused."""
    row = {"q": "u", "better": "g", "worse": "b"}
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    [pair] = paired(row, columns=columns, named=True).examples
    assert isinstance(pair, Conversation)
    assert pair.answer == "g"
    with pytest.raises(DataError, match=r"data\.columns names completion, and pairs have none"):
        paired(row, columns={"completion": "better"})


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "u", "completion": "g"}, "no column is the chosen answer"),
        ({"chosen": "u g", "rejected": "u b"}, "no column is the prompt"),
        ({"prompt": "u", "chosen": "g", "rejected": "b", "image": "x"}, "'image' is no text"),
        ({"prompt": "u", "chosen_a": "g", "chosen_b": "h", "rejected": "b"}, "which of 'chosen_a' and 'chosen_b'"),
        ({"prompt": "", "chosen": "g", "rejected": "b"}, "a pair without a prompt"),
        ({"prompt": "x", "chosen": [U, GOOD], "rejected": [U, BAD]}, "'prompt' stands in no turn of 'chosen'"),
        ({"chosen": [U, GOOD, U, GOOD], "rejected": [U, BAD, U, GOOD]}, "part before their last turn"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(row: dict[str, Any], told: str) -> None:
    """What makes a row no pair is said of it."""
    with pytest.raises(DataError, match=told):
        paired(row)


def encoded(*rows: dict[str, Any], length: int = 64, truncation: str = "drop") -> Any:
    """The rows as pairs of token rows, and what became of the others."""
    overrides = {"training.objective": "dpo", "tokens.max_length": length, "tokens.truncation": truncation}
    config = load_config(None, environ={}, overrides=overrides, profile=None).config
    encoder = Encoder(ModelLocation("model", tokenizer_folder(FIRST), "local"), "chatml", train_on="last")
    return encoder.encode(paired(*rows), Plan(config, {}))


def test_pair_is_dropped_together_and_counted_by_reason() -> None:
    """Each way for a pair to be unfit is a reason with its count; of no pair one side stays."""
    good = {"prompt": "u", "chosen": "g", "rejected": "b"}
    rows = [good, good, good, {**good, "chosen": " "}, {**good, "rejected": ""}, {**good, "rejected": "g"}]
    rows += [{**good, "rejected": "b" * 99}, {**good, "chosen": "g" * 99}, {**good, "prompt": "u" * 99}]
    found = encoded(*rows)
    assert found.counts.dropped == {
        "empty answer": 2,
        "chosen and rejected are the same": 1,
        "longer than 64 tokens": 3,
    }
    assert (found.counts.read, found.counts.kept, len(found.rows)) == (9, 3, 3)
    assert all(row.rejected is not None and row.rejected.target_count for row in found.rows)
    assert found.counts.tokens == sum(len(side.ids) for row in found.rows for side in sides_of(row))
    with pytest.raises(DataError, match=r"rows:1: \d+ tokens"):
        encoded({**good, "rejected": "b" * 99}, truncation="refuse")


def test_pair_is_cut_alike() -> None:
    """Where the prompt is cut, both sides lose the same words, and both answers stay whole."""
    row = {"prompt": "one two three four five six seven", "chosen": "g", "rejected": "a longer bad answer"}
    [whole] = encoded(row, length=200).rows
    longest = max(len(side.ids) for side in sides_of(whole))
    [cut] = encoded(row, length=longest - 5, truncation="truncate_prompt").rows
    assert [len(side.ids) for side in sides_of(cut)] == [len(side.ids) - 5 for side in sides_of(whole)]
    for side, before in zip(sides_of(cut), sides_of(whole), strict=True):
        assert side.target_count == before.target_count
    prompts = [side.ids[: len(side.ids) - side.target_count - 1] for side in sides_of(cut)]
    assert prompts[0] == prompts[1]


def pairs_of(count: int, seed: int = 0) -> tuple[TokenizedRow, ...]:
    """Pairs of token rows of unequal lengths."""
    rows = make_rows(2 * count, seed=seed)
    return tuple(replace(rows[at], rejected=rows[at + 1]) for at in range(0, len(rows), 2))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.none() | st.integers(20, 80), st.integers(1, 3))
@examples(1 / 3)
def test_pair_is_never_parted(count: int, size: int, epoch: int, length: int | None, shares: int) -> None:
    """In every batch of every process each chosen row is followed by its rejected one, and every pair comes once."""
    pairs = pairs_of(count)
    batches = epoch_batches(pairs, size, seed=1, epoch=epoch, pack_length=length)
    for made in (batches, fixed_batches(pairs, size)):
        dealt = [share for batch in made for share in batch.shard(shares)]
        seen = Counter[TokenizedRow]()
        for batch in dealt:
            assert all(len(sequence) % 2 == 0 for sequence in batch.sequences)
            for chosen, rejected in zip(batch.rows[::2], batch.rows[1::2], strict=True):
                assert chosen.rejected == rejected
                seen[chosen] += 1
        assert seen == Counter(pairs)


@given(st.sampled_from([0.05, 0.1, 1.0]), st.sampled_from([0.0, 0.2]), st.integers(0, 5))
@examples(1 / 5)
def test_preference_is_its_formula(beta: float, flipped: float, seed: int) -> None:
    """The loss is that of the formula on logits, and its gradient that of the loss; at step 0 it is ln 2 a pair."""
    pairs, session = pairs_of(2, seed), adapted()
    objective = Preference(beta, reference_of(session, pairs), flipped)
    batch = Batch(tuple(side for pair in pairs for side in sides_of(pair)), (2, 2))
    assert session.loss(batch, objective) == pytest.approx(2 * math.log(2), rel=1e-12)
    before = {row: _log_p(session, row) for row in batch.rows}
    dice = np.random.default_rng(seed)
    for tensor in session.trainable.values():
        tensor += dice.normal(0, 0.3, tensor.shape)
    now = {row: _log_p(session, row) for row in batch.rows}
    wanted = 0.0
    for chosen, rejected in zip(batch.rows[::2], batch.rows[1::2], strict=True):
        gained = (now[chosen] - before[chosen]) - (now[rejected] - before[rejected])
        right = 1 / (1 + math.exp(-beta * gained))
        wanted -= (1 - flipped) * math.log(right) + flipped * math.log(1 - right)
    assert session.loss(batch, objective) == pytest.approx(wanted, rel=1e-9)
    check_slopes(session, batch, objective)


def _log_p(session: Any, row: TokenizedRow) -> float:
    """The sum of log p over the trained tokens, from the logits themselves."""
    logits = session.logits(row.ids)
    told = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(sum(told[at - 1, row.ids[at]] for at in range(1, len(row.ids)) if row.trained[at]))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"training.objective": "kto"}, "use TRL's KTOTrainer, or pair them up for dpo"),
        ({"training.objective": "grpo"}, "TRL's GRPOTrainer"),
        ({"training.objective": "reward"}, "TRL's RewardTrainer"),
        ({"training.objective": "dpo", "training.dpo_beta": 0}, "dpo_beta must be a number above 0"),
    ],
)
def test_other_objectives_are_refused_with_what_to_use(settings: dict[str, Any], told: str) -> None:
    """An objective that is not here is refused by name, with what has it."""
    with pytest.raises(ConfigError, match=told):
        load_config(None, environ={}, overrides=settings, profile=None)


def outcomes(
    gained: float, share: float = 1.0, *, unseen: int = 20, cost: float = 0.0, control: float | None = None
) -> dict[str, str]:
    """What is said of 40 training pairs and of unseen ones, a share of which gained so much; `control`: there."""

    def gains(count: int) -> tuple[float, ...]:
        return tuple(gained if at < share * count else -gained for at in range(count))

    liked = ((False,) * unseen, (True,) * unseen)
    chosen = Paired((2.0,) * (40 + unseen), (2.0 + cost,) * (40 + unseen))
    evidence = PreferenceEvidence(0.1, gains(40), gains(unseen), liked, chosen, why_no_control="too dear")
    if control is not None:
        evidence = replace(evidence, control=ControlEvidence((control,) * len(evidence.compared)))
    found = judge_preference(evidence)
    counts = {"preference-unseen": unseen >= 16, "preference-control": control is not None}
    assert all(each.counts == counts.get(each.id, True) for each in found)
    assert all(each.reason for each in found if each.outcome == "inconclusive" and not each.counts)
    return {each.id.removeprefix("preference-"): each.outcome for each in found}


def test_preferences_are_judged_by_what_gained() -> None:
    """Gains in most pairs pass, losses and trifles fail, half of them is neither; a collapse of the chosen fails."""
    assert outcomes(3.0) == {"rows": "passed", "unseen": "passed", "control": "inconclusive", "chosen": "passed"}
    assert outcomes(-3.0) == {"rows": "failed", "unseen": "failed", "control": "inconclusive", "chosen": "passed"}
    assert outcomes(0.1)["rows"] == "failed"  # below the floor: nothing moved
    assert outcomes(3.0, 0.5)["rows"] == "inconclusive"
    assert outcomes(3.0, unseen=0)["unseen"] == "inconclusive"
    assert outcomes(3.0, unseen=5)["unseen"] == "inconclusive"
    assert outcomes(3.0, cost=2.0)["chosen"] == "failed"


@pytest.mark.parametrize("unseen", [4, 20])
def test_gains_that_a_control_of_flipped_pairs_has_too_are_no_preference(unseen: int) -> None:
    """What is taught is what the labels say: trained on the same pairs changed round, a model must not gain alike."""
    assert outcomes(3.0, unseen=unseen, control=-3.0)["control"] == "passed"
    assert outcomes(3.0, unseen=unseen, control=0.0)["control"] == "passed"
    assert outcomes(3.0, unseen=unseen, control=2.9)["control"] == "failed"
    assert outcomes(3.0, unseen=unseen, control=9.0)["control"] == "failed"
