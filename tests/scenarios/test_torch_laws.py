"""Laws of training with torch: the loss is the loss, the split is no matter, a resumed run is the same run."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
transformers = pytest.importorskip("transformers", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune.adapters.choose import choose_layers  # noqa: E402
from finetune.data.batches import epoch_batches  # noqa: E402
from finetune.errors import NonFiniteError, OutOfMemoryError, TrainingError  # noqa: E402
from finetune.events import StepDone  # noqa: E402
from finetune.memory.estimate import estimate_memory  # noqa: E402
from finetune.models.shape import read_shape  # noqa: E402
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, TokenizedRow  # noqa: E402
from finetune.training.loop import LoopPlan, train  # noqa: E402
from finetune_strategies.profiles import examples  # noqa: E402
from support.tiny_models import (  # noqa: E402
    NO_DROPOUT,
    VOCAB,
    adapted,
    adapter_bytes,
    batches_of,
    make_model,
    make_rows,
    open_session,
    step,
    target_of,
    train_a_little,
)

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
KINDS = ("llama", "gpt2")


@pytest.fixture(scope="module", params=KINDS)
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """Each kind of model without dropout of its own."""
    changes = NO_DROPOUT if request.param == "gpt2" else {}
    return make_model(request.param, tmp_path_factory.mktemp(request.param), **changes)


@pytest.fixture(scope="module", params=KINDS)
def noisy_location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """Each kind of model, GPT-2 with its own dropout."""
    return make_model(request.param, tmp_path_factory.mktemp(f"noisy-{request.param}"))


@pytest.fixture(scope="module")
def trained(location: ModelLocation) -> Any:
    """A session whose adapter has been trained a little; laws that use it leave it as it was."""
    session = adapted(location)
    train_a_little(session)
    return session


def gradients(session: Any) -> dict[str, Any]:
    """A copy of every gradient there is."""
    return {name: value.grad.clone() for name, value in session.model.named_parameters() if value.grad is not None}


def weights(session: Any, names: list[str]) -> dict[str, Any]:
    """A copy of the tensors of these names."""
    return {name: value.detach().clone() for name, value in session.model.named_parameters() if name in names}


def close(first: dict[str, Any], second: dict[str, Any], tolerance: float = 2e-6) -> bool:
    """Whether two sets of tensors have the same names and nearly the same values."""
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=1e-4, atol=tolerance) for name in first
    )


def plain_loss(location: ModelLocation, row: TokenizedRow) -> float:
    """The summed loss of one row as transformers computes it from labels, without batch, padding or our code."""
    model = transformers.AutoModelForCausalLM.from_pretrained(location.folder).eval()
    labels = [token if trained else -100 for token, trained in zip(row.ids, row.trained, strict=True)]
    with torch.no_grad():
        mean = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels])).loss
    return float(mean) * sum(label != -100 for label in labels[1:])


def test_loss_is_that_of_plain_transformers(location: ModelLocation) -> None:
    """The summed loss of a padded batch is the sum of what transformers says of each row alone with masked labels."""
    session = open_session(location)
    expected = [plain_loss(location, row) for row in ROWS]
    assert len(expected) == 7
    assert min(expected) > 0
    assert session.loss(Batch(ROWS)) == pytest.approx(sum(expected), rel=1e-5)
    for row, alone in zip(ROWS, expected, strict=True):
        assert session.loss(Batch((row,))) == pytest.approx(alone, rel=1e-5)


@given(st.sets(st.integers(0, 6), min_size=1), st.sampled_from([0, 1, 50, VOCAB - 1]))
@examples(1 / 6)
def test_padding_and_batch_mates_do_not_matter(location: ModelLocation, mates: set[int], pad_id: int) -> None:
    """Loss and gradients of rows are the sums of those of each row alone, whatever id they are padded with."""
    rows = [ROWS[index] for index in sorted(mates)]
    together, alone = adapted(location, pad_id=pad_id), adapted(location)
    assert together.accumulate(Batch(tuple(rows)), 0.1) == pytest.approx(
        sum(alone.accumulate(Batch((row,)), 0.1) for row in rows), rel=1e-5
    )
    assert close(gradients(together), gradients(alone))


@pytest.mark.parametrize("split", [(1, 1, 1, 1, 1, 1, 1), (3, 4), (6, 1), (2, 2, 2, 1)])
def test_accumulation_split_does_not_matter(location: ModelLocation, split: tuple[int, ...]) -> None:
    """One batch or many small ones of very unequal lengths: same loss, same gradients, same weights after two steps."""
    results = []
    for sizes in ((7,), split):
        ends = list(itertools.accumulate(sizes, initial=0))
        batches = [Batch(ROWS[start:end]) for start, end in itertools.pairwise(ends)]
        session = adapted(location, seed=3)
        # Far above the gradients' rounding errors, which AdamW would otherwise blow up to full steps.
        session.prepare_updates(Optimization(0.05, 1.0, epsilon=1e-3))
        plan = LoopPlan(2, len(batches), 0.05, 0, "constant", 99)
        events = list(train(session, lambda epoch, batches=batches: batches, (), plan))  # type: ignore[misc]
        norms = list(events[0].norms.values())  # type: ignore[union-attr]
        numbers = [number for event in events[1:] for number in (event.loss, event.grad_norm)]  # type: ignore[union-attr]
        results.append(([*numbers, *norms], weights(session, session.trainable_names())))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-6)
    assert close(results[0][1], results[1][1], 1e-5)


def test_update_is_adamw_on_clipped_gradients(location: ModelLocation) -> None:
    """Two updates move every tensor as AdamW's formula says, at the given rates, the gradients clipped together."""
    session, rates, limit = adapted(location), (0.03, 0.007), 0.3
    session.prepare_updates(Optimization(weight_decay=0.2, max_grad_norm=limit))
    names = session.trainable_names()
    expected = {name: value.double() for name, value in weights(session, names).items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for count, rate in enumerate(rates, start=1):
        batch = Batch(ROWS[count : count + 3])
        session.accumulate(batch, 1 / batch.target_count)
        raw = {name: value.double() for name, value in gradients(session).items()}
        norm = math.sqrt(sum(float((value**2).sum()) for value in raw.values()))
        assert norm > limit
        assert session.clip_gradients() == pytest.approx(norm, rel=1e-5)
        assert math.hypot(*session.gradient_norms().values()) == pytest.approx(limit, rel=1e-4)
        session.update(rate)
        assert set(session.gradient_norms().values()) == {0.0}
        for name in names:
            gradient = raw[name] * limit / norm
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            moved = first[name] / (1 - 0.9**count) / ((second[name] / (1 - 0.999**count)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - rate * 0.2) - rate * moved
    found = {name: value.double() for name, value in weights(session, names).items()}
    assert close(found, expected, 1e-5)


def test_gradients_below_the_limit_are_left_alone(location: ModelLocation) -> None:
    """Clipping changes nothing below the limit."""
    session = adapted(location)
    session.prepare_updates(Optimization(0.0, 1e6))
    session.accumulate(Batch(ROWS), 0.01)
    before = gradients(session)
    session.clip_gradients()
    assert all(torch.equal(before[name], after) for name, after in gradients(session).items())


def test_first_steps_change_exactly_the_adapter(location: ModelLocation) -> None:
    """At step 1 every B has a gradient and no A; after two steps every adapter tensor has changed and nothing else."""
    session = adapted(location)
    before = session.fingerprints()
    declared = session.trainable_names()
    expected = 2 * len([name for name in before if name.endswith("lora_A.default.weight")])
    assert len(declared) == expected >= 8
    assert all(".lora_" in name for name in declared)
    plan = LoopPlan(2, 2, 0.05, 0, "constant", 99)
    events = train(session, lambda epoch: batches_of(ROWS, 3), (), plan)
    norms = next(events).norms  # type: ignore[union-attr]
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


def test_seed_decides_everything(noisy_location: ModelLocation, tmp_path: Path) -> None:
    """One seed gives one adapter file, byte for byte, whatever random state it found; each other seed another."""
    files = []
    for number, seed in enumerate((0, 0, 1, 2**32 - 1)):
        torch.manual_seed(1000 + number)
        session = adapted(noisy_location, seed=seed, dropout=0.3)
        fresh = adapter_bytes(session, tmp_path / f"fresh-{number}")
        train_a_little(session)
        files.append((fresh, adapter_bytes(session, tmp_path / f"trained-{number}")))
    assert files[0] == files[1]
    assert len({fresh for fresh, _ in files}) == len({tuned for _, tuned in files}) == 3


def test_dropout_differs_from_step_to_step(noisy_location: ModelLocation) -> None:
    """Two steps on the same rows and weights draw different dropout masks, and none at all where dropout is zero."""
    session = adapted(noisy_location, dropout=0.5)
    train_a_little(session)
    assert len({session.accumulate(Batch(ROWS), 0.0) for _ in range(3)}) == 3
    if noisy_location.name == "llama":
        session = adapted(noisy_location)
        train_a_little(session)
        assert len({session.accumulate(Batch(ROWS), 0.0) for _ in range(3)}) == 1


def _trained_through(location: ModelLocation, folder: Path, stops: list[int], total: int) -> bytes:
    """The state file of a run of `total` steps that was stopped and continued in a fresh session at each of `stops`."""
    plan = LoopPlan(total, 2, 0.05, 2, "cosine", 99)
    done = 0
    for stop in [*stops, total]:
        session = adapted(location, seed=4, dropout=0.3)
        if done:
            torch.manual_seed(12345)
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
def test_resume_is_the_same_run(noisy_location: ModelLocation, stops: list[int], tmp_path: Path) -> None:
    """Stopped anywhere and continued in a fresh session: weights, moments and random state are the same to the byte."""
    whole = _trained_through(noisy_location, tmp_path / "whole", [], 5)
    parts = _trained_through(noisy_location, tmp_path / "parts", stops, 5)
    assert whole == parts


def _modes(session: Any) -> dict[str, bool]:
    return {name: module.training for name, module in session.model.named_modules()}


def _look(session: Any, folder: Path, what: str) -> Any:
    if what == "loss":
        return session.loss(Batch(ROWS))
    if what == "generate":
        return session.generate([[5, 6, 7], [8, 9]], 4, [2])
    session.save_logits([[5, 6, 7]], folder / "logits")
    return (folder / "logits").read_bytes()


@pytest.mark.parametrize("what", ["loss", "generate", "save_logits"])
def test_looking_leaves_no_trace(noisy_location: ModelLocation, what: str, tmp_path: Path) -> None:
    """Loss, answers and logits are taken without dropout, and leave mode, random state, gradients and weights alone."""
    session = adapted(noisy_location, dropout=0.5)
    train_a_little(session)
    session.accumulate(Batch(ROWS), 0.1)
    session.model.eval()
    expected = _look(session, tmp_path, what)
    for index, module in enumerate(session.model.modules()):
        module.training = index % 3 > 0 or isinstance(module, torch.nn.Dropout)
    modes, state, marks = _modes(session), torch.get_rng_state(), (gradients(session), session.fingerprints())
    assert len(set(modes.values())) == 2
    assert [_look(session, tmp_path, what) for _ in range(2)] == [expected, expected]
    assert _modes(session) == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert close(gradients(session), marks[0], 0.0)
    assert session.fingerprints() == marks[1]
    assert torch.is_grad_enabled()


def test_looking_leaves_no_trace_when_it_fails(noisy_location: ModelLocation) -> None:
    """An error while the loss is taken leaves the mode as it was, too."""
    session = adapted(noisy_location)
    session.model.train()
    with pytest.raises(IndexError):
        session.loss(Batch((TokenizedRow((1, VOCAB + 5), (True, True), "row"),)))
    assert set(_modes(session).values()) == {True}


@given(st.integers(1, 7))
@examples(1 / 8)
def test_loss_does_not_depend_on_batch_size(trained: Any, size: int) -> None:
    """The total loss over all rows is the same in batches of any size and any order."""
    whole = trained.loss(Batch(ROWS))
    assert sum(trained.loss(batch) for batch in batches_of(ROWS, size)) == pytest.approx(whole, rel=1e-5)
    assert trained.loss(Batch(ROWS[::-1])) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_stop_the_run(location: ModelLocation, bad: float) -> None:
    """A poisoned embedding ends training with an error that names step and row, and changes no weight."""
    session = adapted(location)
    with torch.no_grad():
        session.model.get_input_embeddings().weight[ROWS[1].ids[3]] = bad
    before = session.fingerprints()
    with pytest.raises(NonFiniteError, match=r"step 1 \(rows row 0, row 1"):
        list(train(session, lambda epoch: batches_of(ROWS, 2), (), LoopPlan(3, 1, 0.05, 0, "linear", 99)))
    assert session.fingerprints() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_memory_is_as_estimated(location: ModelLocation, dtype: str, method: str) -> None:
    """Bytes of weights, adapter, gradients and moments of a real step are those of the estimate, to the byte."""
    shape = read_shape(location.folder)
    target = AdapterTarget(3, 7.0, 0.0, choose_layers(shape, "all-linear"))
    expected = estimate_memory(shape, target if method == "lora" else None, dtype)
    session = open_session(location, dtype=dtype)
    weight_bytes = sum(value.nbytes for value in session.model.parameters())
    session.attach(target if method == "lora" else None, 0)
    session.prepare_updates(Optimization(0.0, 1.0))
    session.accumulate(Batch(ROWS), 0.01)
    gradient_bytes = sum(value.nbytes for value in gradients(session).values())
    session.update(0.01)
    moments = [value for state in session.optimizer.state.values() for key, value in state.items() if key != "step"]
    assert (weight_bytes, gradient_bytes) == (expected.weights, expected.gradients)
    assert sum(value.nbytes for value in moments) == expected.optimizer
    assert sum(value.nbytes for value in session.model.parameters()) == expected.weights + expected.adapter
    trainable = weights(session, session.trainable_names())
    assert sum(value.numel() for value in trainable.values()) == expected.trainable_parameters


def test_bfloat16_base_trains_a_float32_adapter(location: ModelLocation) -> None:
    """On a bfloat16 base the adapter, its gradients and its moments are float32, the base stays, and the loss falls."""
    session = adapted(location, dtype="bfloat16")
    before, start = session.fingerprints(), session.loss(Batch(ROWS))
    for _ in range(8):
        step(session, batches_of(ROWS, 3), 0.05)
        assert all(math.isfinite(norm) for norm in session.gradient_norms().values())
    adapter = weights(session, session.trainable_names())
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    moments = [state["exp_avg"] for state in session.optimizer.state.values()]
    assert {value.dtype for value in moments} == {torch.float32}
    rest = {value.dtype for name, value in session.model.named_parameters() if name not in adapter}
    assert rest == {torch.bfloat16}
    changed = {name for name, mark in session.fingerprints().items() if mark != before[name]}
    assert changed == set(adapter)
    assert session.loss(Batch(ROWS)) < 0.95 * start


def _fails_with(words: str) -> Any:
    def fail(*given: Any) -> Any:
        raise RuntimeError(words)

    return fail


def test_out_of_memory_names_the_batch(location: ModelLocation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory is an error that names the batch and what to lower; any other error stays what it is."""
    session = adapted(location)
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes.\nmore"
    monkeypatch.setattr(session, "_loss", _fails_with(words))
    with pytest.raises(OutOfMemoryError, match="out of memory with 7 rows of up to 23 tokens") as caught:
        session.accumulate(Batch(ROWS), 1.0)
    assert "training.batch_size" in caught.value.hint
    with pytest.raises(OutOfMemoryError, match="out of memory: Default"):
        session.loss(Batch(ROWS))
    monkeypatch.setattr(session, "_loss", _fails_with("shape mismatch"))
    for ask in (lambda: session.accumulate(Batch(ROWS), 1.0), lambda: session.loss(Batch(ROWS))):
        with pytest.raises(RuntimeError, match="shape mismatch"):
            ask()


def test_out_of_memory_while_loading_is_no_fault_of_the_files(
    location: ModelLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory runs out as the weights are loaded, that is said, and not that the model is broken."""

    def fail(*given: Any, **named: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(OutOfMemoryError, match="out of memory while model"):
        open_session(location)


def test_update_before_an_optimizer_is_an_error(location: ModelLocation) -> None:
    """An update without an optimizer is an error that says what is missing."""
    session = open_session(location)
    session.attach(target_of(location.name), 0)
    with pytest.raises(TrainingError, match="prepare_updates"):
        session.update(0.1)
