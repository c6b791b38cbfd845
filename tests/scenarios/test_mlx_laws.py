"""Laws of training with MLX: the loss is the loss, the split is no matter, a resumed run is the same run."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches import epoch_batches
from finetune.errors import NonFiniteError, TrainingError
from finetune.events import StepDone
from finetune.records import Batch, ModelLocation, Optimization, TokenizedRow
from finetune.training.loop import LoopPlan, train
from finetune_strategies.profiles import examples
from support.tiny_mlx import (
    accumulated,
    adapted,
    close,
    gradients,
    make_model,
    mx,
    open_session,
    set_weights,
    shake,
    weights,
)
from support.tiny_models import VOCAB, adapter_bytes, batches_of, make_rows, step, target_of, train_a_little

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
KINDS = ("llama", "gpt2")


@pytest.fixture(scope="module", params=KINDS)
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """Each kind of model."""
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(location: ModelLocation) -> Any:
    """A session whose adapter has been trained a little; laws that use it leave its weights as they were."""
    session = adapted(location)
    train_a_little(session)
    return session


def surprise(session: Any, row: TokenizedRow) -> float:
    """Minus the summed log-probability of each trained token that has one before it, from the logits."""
    total = 0.0
    for place, logits in enumerate(np.array(session.forward_pass.logits(row.ids)).astype(np.float64)[:-1]):
        if row.trained[place + 1]:
            total += math.log(np.exp(logits).sum()) - logits[row.ids[place + 1]]
    return total


def test_loss_is_the_surprise_of_the_trained_tokens(location: ModelLocation) -> None:
    """P-MASK: the summed loss of a padded batch is that of the trained tokens that follow one, and of no other."""
    session = open_session(location)
    expected = [surprise(session, row) for row in ROWS]
    assert len(expected) == 7
    assert min(expected) > 0
    assert session.loss(Batch(ROWS)) == pytest.approx(sum(expected), rel=1e-5)
    for row, alone in zip(ROWS, expected, strict=True):
        assert session.loss(Batch((row,))) == pytest.approx(alone, rel=1e-5)
    nothing = Batch((TokenizedRow((3, 4, 5), (True, False, False), "x"),))
    assert session.loss(nothing) == session.accumulate(nothing, 1.0) == 0.0


@given(st.sets(st.integers(0, 6), min_size=1), st.sampled_from([0, 1, 50, VOCAB - 1, VOCAB, -1]))
@examples(1 / 6)
def test_padding_and_batch_mates_do_not_matter(trained: Any, mates: set[int], pad_id: int) -> None:
    """P-PAD: loss and gradients of rows are the sums of those of each row alone, whatever id they are padded with."""
    rows = [ROWS[index] for index in sorted(mates)]
    padded = adapted(trained.location, pad_id=pad_id)
    set_weights(padded, weights(trained))
    together, alone = accumulated(padded, Batch(tuple(rows))), accumulated(trained, *(Batch((row,)) for row in rows))
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    assert close(together[1], alone[1])


@pytest.mark.parametrize("split", [(1, 1, 1, 1, 1, 1, 1), (3, 4), (6, 1), (2, 2, 2, 1)])
def test_accumulation_split_does_not_matter(location: ModelLocation, split: tuple[int, ...]) -> None:
    """P-ACCUM: one batch or many of very unequal lengths: same loss, same gradients, same weights after two steps."""
    results = []
    for sizes in ((7,), split):
        ends = list(itertools.accumulate(sizes, initial=0))
        batches = [Batch(ROWS[start:end]) for start, end in itertools.pairwise(ends)]
        session = adapted(location, seed=3)
        # Far above the gradients' rounding errors, which AdamW would otherwise blow up to full steps.
        session.prepare_updates(Optimization(0.05, 1.0, epsilon=1e-3))
        events: list[Any] = list(
            train(session, lambda epoch, b=batches: b, (), LoopPlan(2, len(batches), 0.05, 0, "constant", 99))  # type: ignore[misc]
        )
        norms = list(events[0].norms.values())
        results.append(([n for event in events[1:] for n in (event.loss, event.grad_norm)] + norms, weights(session)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-6)
    assert close(results[0][1], results[1][1])


def test_update_is_adamw_on_clipped_gradients(location: ModelLocation) -> None:
    """Three updates move every tensor as AdamW's formula says, at the given rates, gradients clipped together."""
    session, rates, limit = adapted(location), (0.03, 0.007, 0.02), 0.3
    shake(session)
    session.prepare_updates(Optimization(0.2, limit, (0.8, 0.95), 1e-6))
    expected = weights(session)
    first = {name: np.zeros_like(value) for name, value in expected.items()}
    second = {name: np.zeros_like(value) for name, value in expected.items()}
    for count, rate in enumerate(rates, start=1):
        batch = Batch(ROWS[count : count + 3])
        session.accumulate(batch, 1 / batch.target_count)
        raw = gradients(session)
        norm = math.sqrt(sum(float((value**2).sum()) for value in raw.values()))
        assert norm > limit
        assert session.clip_gradients() == pytest.approx(norm, rel=1e-5)
        assert math.hypot(*session.gradient_norms().values()) == pytest.approx(limit, rel=1e-4)
        session.update(rate)
        assert set(session.gradient_norms().values()) == {0.0}
        for name in expected:
            gradient = raw[name] * limit / (norm + 1e-6)
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            moved = first[name] / (1 - 0.8**count) / (np.sqrt(second[name] / (1 - 0.95**count)) + 1e-6)
            expected[name] = expected[name] * (1 - rate * 0.2) - rate * moved
    assert close(weights(session), expected, 2e-6)
    session.update(0.1)
    assert close(weights(session), expected, 2e-6)


def test_gradients_below_the_limit_are_left_alone(location: ModelLocation) -> None:
    """Clipping changes nothing below the limit."""
    session = adapted(location)
    session.prepare_updates(Optimization(0.0, 1e6))
    session.accumulate(Batch(ROWS), 0.01)
    before = gradients(session)
    session.clip_gradients()
    assert all(np.array_equal(before[name], after) for name, after in gradients(session).items())


def test_gradient_is_the_slope_of_the_loss(trained: Any) -> None:
    """The gradient of each A and B, followed a little, changes the summed loss as `weight` and its length say."""
    batch = Batch(ROWS[:4])
    held = weights(trained)
    _, found = accumulated(trained, batch)
    assert len(found) >= 8
    for name, value in held.items():
        direction = 0.01 * found[name] / np.linalg.norm(found[name])
        ends = []
        for sign in (1, -1):
            set_weights(trained, {name: value + sign * direction})
            ends.append(trained.loss(batch))
        set_weights(trained, {name: value})
        slope, claimed = 0.1 * (ends[0] - ends[1]) / 2, float((found[name] * direction).sum())
        assert slope == pytest.approx(claimed, rel=0.02), name


def test_first_steps_change_exactly_the_adapter(location: ModelLocation) -> None:
    """P-GRAD: at step 1 every B has a gradient and no A; after two steps all of the adapter changed, nothing else."""
    session = adapted(location)
    before = session.fingerprints()
    declared = session.trainable_names()
    assert len(declared) == 2 * len([name for name in before if name.endswith("lora_A.default.weight")]) >= 8
    assert all(".lora_" in name for name in declared)
    events: Any = train(session, lambda epoch: batches_of(ROWS, 3), (), LoopPlan(2, 2, 0.05, 0, "constant", 99))
    norms = next(events).norms
    assert sorted(norms) == sorted(declared)
    assert {name for name, norm in norms.items() if norm == 0} == {name for name in declared if ".lora_A." in name}
    assert session.fingerprints() == before
    assert len(list(events)) == 2
    after = session.fingerprints()
    assert {name for name in before if before[name] != after[name]} == set(declared)
    assert session.trainable_names() == declared


def test_full_fine_tuning_changes_every_weight(location: ModelLocation) -> None:
    """Without an adapter every weight is trained."""
    session = open_session(location)
    session.attach(None, 0)
    session.prepare_updates(Optimization(0.0, 1.0))
    before = session.fingerprints()
    for _ in range(2):
        step(session, batches_of(ROWS, 3))
    after = session.fingerprints()
    assert session.trainable_names() == list(before)
    assert [name for name in before if before[name] == after[name]] == []


def test_seed_decides_everything(location: ModelLocation, tmp_path: Path) -> None:
    """P-SEED: one seed, one adapter file, byte for byte, whatever random state it found; another seed, another."""
    files = []
    for number, seed in enumerate((0, 0, 1, 2**32 - 1)):
        mx.random.seed(1000 + number)
        session = adapted(location, seed=seed, dropout=0.3)
        fresh = adapter_bytes(session, tmp_path / f"fresh-{number}")
        train_a_little(session)
        files.append((fresh, adapter_bytes(session, tmp_path / f"trained-{number}")))
    assert files[0] == files[1]
    assert len({fresh for fresh, _ in files}) == len({tuned for _, tuned in files}) == 3


def test_adapter_is_drawn_evenly_within_its_bound(location: ModelLocation) -> None:
    """A is uniform within 1 / sqrt(inputs), each layer its own; B is zero."""
    session = adapted(location)
    drawn = []
    for name, value in weights(session).items():
        bound = 1 / math.sqrt(value.shape[1])
        assert (np.abs(value).max() == 0) == (".lora_B." in name)
        if ".lora_A." in name:
            assert 0.75 * bound < np.abs(value).max() <= bound
            drawn.append(value / bound)
    everything = np.concatenate([value.ravel() for value in drawn])
    assert len(np.unique(everything)) == len(everything)
    assert everything.std() == pytest.approx(1 / math.sqrt(3), rel=0.15)


def test_dropout_differs_from_step_to_step_and_keeps_the_mean(location: ModelLocation) -> None:
    """Steps on the same rows draw different masks, none where dropout is zero; what the adapter adds keeps its mean."""
    session = adapted(location, dropout=0.5)
    train_a_little(session)
    assert len({session.accumulate(Batch(ROWS), 0.0) for _ in range(3)}) == 3
    still = adapted(location)
    train_a_little(still)
    same = {still.accumulate(Batch(ROWS), 0.0) for _ in range(3)}
    assert len(same) == 1
    assert same.pop() == pytest.approx(still.loss(Batch(ROWS)), rel=1e-6)
    layer = next(iter(session.adapter.layers.values()))
    x = mx.broadcast_to(mx.random.normal((layer.A.shape[1],), key=mx.random.key(0)), (20_000, layer.A.shape[1]))
    at_rest = np.array(layer(x[:1]))
    with session.adapter.learning(mx.random.key(1)):
        many = np.array(layer(x))
    assert many.std(axis=0).max() > 0.1
    assert np.abs(many.mean(axis=0) - at_rest[0]).max() < 5 * many.std(axis=0).max() / math.sqrt(20_000)


def _trained_through(location: ModelLocation, folder: Path, stops: list[int], total: int) -> bytes:
    """The state file of a run of `total` steps that was stopped and continued in a fresh session at each of `stops`."""
    plan = LoopPlan(total, 2, 0.05, 2, "cosine", 99)
    done = 0
    for stop in [*stops, total]:
        session = adapted(location, seed=4, dropout=0.3)
        if done:
            session._key = mx.random.key(12345)
            session.load_state(folder / str(done))
        for event in train(
            session, lambda epoch: epoch_batches(ROWS, 2, seed=9, epoch=epoch), (), plan, done_steps=done
        ):
            if isinstance(event, StepDone) and event.step == stop:
                break
        done = stop
        (folder / str(stop)).mkdir(parents=True, exist_ok=True)
        session.save_state(folder / str(stop))
    return (folder / str(total) / "state.safetensors").read_bytes()


@pytest.mark.parametrize("stops", [[1], [2], [3], [1, 4]])
def test_resume_is_the_same_run(location: ModelLocation, stops: list[int], tmp_path: Path) -> None:
    """P-RESUME: stopped anywhere and continued in a fresh session, all of the state is the same to the byte."""
    whole = _trained_through(location, tmp_path / "whole", [], 5)
    parts = _trained_through(location, tmp_path / "parts", stops, 5)
    assert whole == parts


def _look(session: Any, folder: Path, what: str) -> Any:
    if what == "loss":
        return session.loss(Batch(ROWS))
    if what == "generate":
        return session.generate([[5, 6, 7], [8, 9]], 4, [2])
    session.save_logits([[5, 6, 7]], folder / "logits")
    return (folder / "logits").read_bytes()


@pytest.mark.parametrize("what", ["loss", "generate", "save_logits"])
def test_looking_leaves_no_trace(location: ModelLocation, what: str, tmp_path: Path) -> None:
    """P-EVAL: loss, answers and logits are taken without dropout, and leave random state, gradients and weights."""
    session = adapted(location, dropout=0.5)
    train_a_little(session)
    session.accumulate(Batch(ROWS), 0.1)
    still = adapted(location)
    set_weights(still, weights(session))
    expected = _look(still, tmp_path, what)
    key, marks, slopes = np.array(session._key), session.fingerprints(), gradients(session)
    mx.random.seed(99)
    own = np.array(mx.random.state[0])
    assert [_look(session, tmp_path, what) for _ in range(2)] == [expected, expected]
    assert np.array_equal(np.array(session._key), key)
    assert np.array_equal(np.array(mx.random.state[0]), own)
    assert session.fingerprints() == marks
    assert all(np.array_equal(value, slopes[name]) for name, value in gradients(session).items())


def test_words_and_lengths_that_the_model_does_not_know_are_refused(location: ModelLocation) -> None:
    """MLX would read beyond its tables in silence: a strange word or a long row is named, and nothing is changed."""
    session = adapted(location, dropout=0.5)
    train_a_little(session)
    before = session.loss(Batch(ROWS)), session.fingerprints()
    for ids, words in (((1, VOCAB), "token 97"), ((1, -1), "token -1"), ((5,) * 41, "41 tokens")):
        row = TokenizedRow(ids, (True,) * len(ids), "row 9")
        for verb in (session.loss, lambda batch: session.accumulate(batch, 1.0)):
            with pytest.raises(TrainingError, match=f"row 9 .*{words}"):
                verb(Batch((ROWS[0], row)))
        if len(ids) < 41:
            with pytest.raises(TrainingError, match=words):
                session.generate([[4, 5], list(ids)], 3, [])
    assert (session.loss(Batch(ROWS)), session.fingerprints()) == before


def test_failing_midway_leaves_no_trace(location: ModelLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while gradients are worked out leaves weights and mode as they were."""
    session = adapted(location, dropout=0.5)
    train_a_little(session)
    before = session.loss(Batch(ROWS)), session.fingerprints()
    with monkeypatch.context() as patch:
        patch.setattr(type(session.forward_pass), "loss", lambda self, *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.accumulate(Batch(ROWS), 1.0)
    assert (session.loss(Batch(ROWS)), session.fingerprints()) == before
    assert session.gradients == {}


@given(st.integers(1, 7))
@examples(1 / 9)
def test_loss_does_not_depend_on_batch_size(trained: Any, size: int) -> None:
    """The total loss over all rows is the same in batches of any size and any order."""
    whole = trained.loss(Batch(ROWS))
    assert sum(trained.loss(batch) for batch in batches_of(ROWS, size)) == pytest.approx(whole, rel=1e-5)
    assert trained.loss(Batch(ROWS[::-1])) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_stop_the_run(location: ModelLocation, bad: float) -> None:
    """P-FINITE: a poisoned embedding ends training with an error that names step and row, and changes no weight."""
    session = adapted(location)
    table = next(name for name in session._tensors() if name.endswith(("embed_tokens.weight", "wte.weight")))
    poisoned = np.array(session._tensors()[table])
    poisoned[ROWS[1].ids[3]] = bad
    session.loaded.model.load_weights([(table, mx.array(poisoned))], strict=False)
    before = session.fingerprints()
    with pytest.raises(NonFiniteError, match=r"step 1 \(rows row 0, row 1"):
        list(train(session, lambda epoch: batches_of(ROWS, 2), (), LoopPlan(3, 1, 0.05, 0, "linear", 99)))
    assert session.fingerprints() == before


def test_bfloat16_base_trains_a_float32_adapter(location: ModelLocation) -> None:
    """On a bfloat16 base the adapter, its gradients and its moments are float32, the base stays, and the loss falls."""
    session = adapted(location, dtype="bfloat16")
    before, start = session.fingerprints(), session.loss(Batch(ROWS))
    for _ in range(8):
        step(session, batches_of(ROWS, 3), 0.05)
    session.accumulate(Batch(ROWS), 0.01)
    optimizer = session.optimizer
    for tensors in (session._trainable(), session.gradients, optimizer.first, optimizer.second):
        assert {value.dtype for value in tensors.values()} == {mx.float32}
    places = set(session.adapter.tensors(session.loaded.names).values())
    assert {value.dtype for place, value in session._tensors().items() if place not in places} == {mx.bfloat16}
    changed = {name for name, mark in session.fingerprints().items() if mark != before[name]}
    assert changed == set(session.trainable_names())
    assert session.loss(Batch(ROWS)) < 0.95 * start


def test_bfloat16_model_trained_whole_stays_bfloat16(location: ModelLocation) -> None:
    """Full fine-tuning in bfloat16 keeps gradients and moments in float32 and the weights in bfloat16."""
    session = open_session(location, dtype="bfloat16")
    session.attach(None, 0)
    session.prepare_updates(Optimization(0.0, 1.0))
    start = session.loss(Batch(ROWS))
    for _ in range(3):
        step(session, batches_of(ROWS, 3), 0.01)
    assert {value.dtype for value in session._tensors().values()} == {mx.bfloat16}
    assert {value.dtype for value in session.optimizer.second.values()} == {mx.float32}
    assert session.loss(Batch(ROWS)) < 0.95 * start


def test_update_before_an_optimizer_is_an_error(location: ModelLocation) -> None:
    """An update without an optimizer is an error that says what is missing; so is disabling an adapter not there."""
    session = open_session(location)
    with pytest.raises(TrainingError, match="no adapter"):
        session.adapter_disabled()
    session.attach(target_of(location.name), 0)
    with pytest.raises(TrainingError, match="prepare_updates"):
        session.update(0.1)
