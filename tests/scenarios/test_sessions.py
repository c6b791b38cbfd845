"""What every backend's session keeps to while it trains: updates, dtypes, looks that leave no trace, and errors."""

import copy
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import NonFiniteError, OutOfMemoryError, TrainingError
from finetune.evidence.answering import ask_session, rows_of
from finetune.evidence.drift import InferenceRequest, measure, problems
from finetune.evidence.rounding import measure_rounding
from finetune.records import AdapterTarget, Batch, Optimization, TokenizedRow
from finetune.training.loop import LoopPlan, train
from support.sessions import (
    BENCHES,
    FRAMEWORKS,
    MODULES,
    NO_DROPOUT,
    VOCAB,
    WHOLE,
    Bench,
    batches_of,
    break_forward,
    dtypes,
    gradients,
    make_model,
    make_rows,
    modes,
    poison,
    put,
    random_state,
    shake,
    step,
    weights,
)

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
frameworks = pytest.mark.parametrize("bench", FRAMEWORKS, indirect=True)
mlx_only = pytest.mark.parametrize("bench", ["mlx-llama", "mlx-gpt2"], indirect=True)
torch_only = pytest.mark.parametrize("bench", ["torch-llama", "torch-gpt2"], indirect=True)


@pytest.fixture(scope="module", params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Each kind of model in each backend that computes it, without dropout of its own."""
    changes = NO_DROPOUT if request.param.endswith("gpt2") else {}
    return make_model(request.param, tmp_path_factory.mktemp(request.param), **changes)


@pytest.fixture
def noisy(bench: Bench, tmp_path: Path) -> Bench:
    """The same, with dropout of its own where the backend computes that."""
    noisy_one = (bench.backend, bench.kind) == ("torch", "gpt2")
    return make_model("torch-gpt2", tmp_path / "noisy") if noisy_one else bench


def test_update_is_adamw_on_clipped_gradients(bench: Bench) -> None:
    """Updates move every tensor as AdamW's formula says, at the given rates; gradients are clipped together."""
    rates, limit = (0.03, 0.007, 0.02), 0.3
    session = bench.adapted(optimization=Optimization(0.2, 1e6, (0.8, 0.95), 1e-6))
    shake(session)
    session.accumulate(Batch(ROWS), 0.01)
    below = gradients(session)
    session.clip_gradients()
    assert all(np.array_equal(below[name], after) for name, after in gradients(session).items())
    session = bench.adapted(optimization=Optimization(0.2, limit, (0.8, 0.95), 1e-6))
    shake(session)
    expected = weights(session)
    first = {name: np.zeros_like(value) for name, value in expected.items()}
    second = copy.deepcopy(first)
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
    found = weights(session)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 5e-6 * np.abs(value).max() + 1e-7, name


@torch_only
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_torch_moves_tensors_as_pefts_lora_plus_does(bench: Bench, ratio: float) -> None:
    """Each tensor has the learning rate that PEFT's own LoRA+ optimizer gives it; matrices decay, others do not."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    for name in ("lora", "dora", "saved"):
        session = bench.adapted(bench.kinds()[name], optimization=Optimization(0.07, 1.0, loraplus_lr_ratio=ratio))
        session.update(0.01)
        theirs = create_loraplus_optimizer(session.model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=ratio)
        rates, wanted = (
            {id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]}
            for optimizer in (session.optimizer, theirs)
        )
        assert rates == pytest.approx(wanted, rel=1e-12), name
        assert len(set(rates.values())) == (1 if ratio == 1.0 else 2)
        groups = session.optimizer.param_groups
        decays = {tensor.ndim > 1: group["weight_decay"] for group in groups for tensor in group["params"]}
        assert decays == {True: 0.07, **({False: 0.0} if name != "lora" else {})}


TABLES = {"llama": ("embed_tokens", "lm_head"), "gpt2": ("wte",)}
KNOBS: dict[str, Any] = {
    "rank": 2,
    "alpha": 5.0,
    "dropout": 0.3,
    "modules": lambda kind: MODULES[kind][:1],
    "kind": "dora",
    "scaling": "rank_stabilized",
    "rank_pattern": lambda kind: {MODULES[kind][0]: 1},
    "alpha_pattern": lambda kind: {MODULES[kind][0]: 3.0},
    "saved": lambda kind: WHOLE[kind],
    "rows": lambda kind: dict.fromkeys(TABLES[kind], tuple(range(3, 13))),
    "weight_decay": 0.5,
    "max_grad_norm": 0.05,
    "betas": (0.5, 0.9),
    "epsilon": 1e-1,
    "loraplus_lr_ratio": 4.0,
}


def test_every_knob_of_adapter_and_optimizer_is_wired(bench: Bench) -> None:
    """Each setting, changed alone, ends in another loss; nothing changed ends in the same."""
    of_adapter, of_optimizer = ({each.name for each in fields(kind)} for kind in (AdapterTarget, Optimization))
    # That blocks are computed again changes no loss: a law of its own.
    of_optimizer.remove("gradient_checkpointing")
    assert of_adapter | of_optimizer == KNOBS.keys()

    def end(knob: str = "") -> float:
        value: Any = KNOBS[knob](bench.kind) if callable(KNOBS.get(knob)) else KNOBS.get(knob)
        target = bench.target(**({knob: value} if knob in of_adapter else {}))
        # Without so large an epsilon AdamW moves as far after clipping as before.
        optimization = Optimization(0.05, 1.0, epsilon=1e-3)
        change: dict[str, Any] = {knob: value} if knob in of_optimizer else {}
        session = bench.adapted(target, seed=4, optimization=replace(optimization, **change))
        for _ in range(3):
            step(session, [Batch(ROWS)], 0.05)
        return float(session.loss(Batch(ROWS)))

    usual = end()
    assert end() == usual
    ends = {knob: end(knob) for knob in KNOBS}
    assert [knob for knob, loss in ends.items() if abs(loss - usual) < 1e-4 * usual] == []
    assert len(set(ends.values())) == len(ends)


def test_adapter_is_drawn_evenly_within_its_bound(bench: Bench) -> None:
    """A is uniform within 1 / sqrt(inputs), each layer its own; B is zero."""
    drawn = []
    for name, value in weights(bench.adapted()).items():
        bound = 1 / math.sqrt(value.shape[1])
        assert (np.abs(value).max() == 0) == (".lora_B." in name)
        if ".lora_A." in name:
            assert 0.75 * bound < np.abs(value).max() <= bound
            drawn.append(value / bound)
    everything = np.concatenate([value.ravel() for value in drawn])
    assert len(np.unique(everything)) == len(everything)
    assert everything.std() == pytest.approx(1 / math.sqrt(3), rel=0.15)


def test_full_training_moves_every_weight_that_has_a_gradient(bench: Bench) -> None:
    """Without an adapter each number with a gradient moves, no tensor is without one, and nothing else is there."""
    session = bench.adapted(None, optimization=Optimization(0.0, 1e9))
    before, values = dict(session.fingerprints()), weights(session)
    session.accumulate(Batch(ROWS), 0.1)
    slopes = gradients(session)
    assert slopes.keys() == values.keys()
    session.update(0.01)
    for name, value in weights(session).items():
        assert np.array_equal(value != values[name], slopes[name] != 0), name
        assert (slopes[name] != 0).mean() > 0.3
    after = session.fingerprints()
    assert list(before) == list(after) == session.trainable_names()
    assert [name for name in before if after[name] == before[name]] == []


@torch_only
def test_word_that_pads_is_trained_where_rows_hold_it(bench: Bench) -> None:
    """The padding word of a row's own, such as one that ends answers too, has a gradient; as padding it has none."""
    session = bench.adapted(None)
    table = session.model.get_input_embeddings().weight
    found = []
    for first in (0, 5):
        session.model.zero_grad()
        rows = TokenizedRow((first, 7), (False, True), "short"), TokenizedRow((8, 9, 10, 11), (True,) * 4, "long")
        session.accumulate(Batch(rows), 1.0)
        found.append(table.grad[0].abs().max().item())
    tied = session.model.get_output_embeddings().weight is table  # a head's gradient reaches every word
    assert found[0] > (2 * found[1] if tied else 0)
    assert tied or found[1] == 0


def test_batch_of_nothing_to_learn_costs_nothing(bench: Bench) -> None:
    """The first token of a row follows none: a row whose other tokens are not trained has no loss."""
    nothing = Batch((TokenizedRow((3, 4, 5), (True, False, False), "x"),))
    session = bench.adapted()
    assert session.loss(nothing) == session.accumulate(nothing, 1.0) == 0.0


def test_loss_does_not_depend_on_batch_size(bench: Bench) -> None:
    """The total loss over all rows is the same in batches of any size and any order."""
    session = bench.trained()
    whole = session.loss(Batch(ROWS))
    for size in range(1, 7):
        assert sum(session.loss(batch) for batch in batches_of(ROWS, size)) == pytest.approx(whole, rel=1e-5)
    assert session.loss(Batch(ROWS[::-1])) == pytest.approx(whole, rel=1e-5)


@mlx_only
def test_dropout_keeps_the_mean(bench: Bench) -> None:
    """What an adapter adds under dropout is, on average, what it adds without."""
    import mlx.core as mx

    session = bench.trained(bench.target(dropout=0.5))
    layer = next(iter(session.adapter.layers.values()))
    x = mx.broadcast_to(mx.random.normal((layer.A.shape[1],), key=mx.random.key(0)), (20_000, layer.A.shape[1]))
    at_rest = np.array(layer(x[:1]))
    with session.adapter.learning(mx.random.key(1)):
        many = np.array(layer(x))
    assert many.std(axis=0).max() > 0.1
    assert np.abs(many.mean(axis=0) - at_rest[0]).max() < 5 * many.std(axis=0).max() / math.sqrt(20_000)


def test_other_precision_is_the_same_but_for_rounding(bench: Bench, tmp_path: Path) -> None:
    """In the other precision logits differ by rounding alone, and the session is afterwards what it was."""
    session = bench.trained(bench.target(dropout=0.5))
    before, prompts = weights(session), [[5, 6, 7, 8, 9, 3, 4, 5, 6], [8, 9]]
    session.save_logits(prompts, tmp_path / "before")
    other = session.logits_in_other_precision(prompts)
    session.save_logits(prompts, tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    assert all(np.array_equal(before[name], after) for name, after in weights(session).items())
    own = load_file(tmp_path / "before")
    for number, found in enumerate(other):
        assert found.dtype == np.float64
        off = np.abs(own[str(number)] - found).max() / np.abs(found).max()
        assert 1e-9 < off < 1e-5
    assert measure_rounding(session, prompts).places == 11


def test_rounding_passes_another_order_and_sees_a_thousandth_of_a_tensor(bench: Bench, tmp_path: Path) -> None:
    """The bound lies far above what rounding does and below what one part in a thousand of one matrix does."""
    session = bench.open()
    rounding = measure_rounding(session, [[5, 6, 7, 8, 9, 3, 4, 5, 6], [8, 9]])
    changed = load_file(bench.location.folder / "model.safetensors")
    name = next(name for name in sorted(changed) if name.endswith(("up_proj.weight", "c_fc.weight")))
    folder = tmp_path / "changed"
    shutil.copytree(bench.location.folder, folder)
    save_file(changed | {name: changed[name] * np.float32(1.001)}, folder / "model.safetensors", {"format": "pt"})
    path = (5, 6, 7, 8, 9, 3)
    asked = InferenceRequest((path[:2],), (4,), (), (path[2:],), tuple((0, token) for token in range(4)))
    own = rows_of(session, asked)
    same = measure(asked, own, ask_session(bench.open(), asked), lambda number, token: own[token])
    assert problems(same, rounding.bound()) == []
    off = measure(asked, own, ask_session(bench.at(folder).open(), asked), lambda number, token: own[token])
    assert [words for words in problems(off, rounding.bound()) if "log-prob error" in words]


def look(session: Any, folder: Path) -> Any:
    """Everything that can be taken from a session without training it."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "model").mkdir()
    session.save_adapter(folder / "adapter")
    session.save_model(folder / "model")
    session.save_logits([[5, 6, 7]], folder / "logits")
    with session.adapter_disabled():
        base = session.loss(Batch(ROWS))
    return (
        base,
        session.loss(Batch(ROWS)),
        session.generate([[5, 6, 7], [8, 9]], 4, [2]),
        (folder / "logits").read_bytes(),
    )


def test_looking_leaves_no_trace(noisy: Bench, tmp_path: Path) -> None:
    """Whatever is taken is taken without dropout, and leaves modes, random state, gradients and weights alone."""
    session = noisy.trained(noisy.target(dropout=0.5))
    session.accumulate(Batch(ROWS), 0.1)
    still = noisy.adapted()
    put(still, weights(session))
    expected = look(still, tmp_path / "still")
    if noisy.backend == "torch":
        for index, module in enumerate(session.model.modules()):
            module.training = index % 3 > 0 or "Dropout" in type(module).__name__
        assert set(modes(session).values()) == {False, True}

    def traces() -> list[Any]:
        slopes = {name: value.tolist() for name, value in gradients(session).items()}
        return [copy.deepcopy(random_state(session)), modes(session), slopes, session.fingerprints()]

    before = traces()
    assert [look(session, tmp_path / name) for name in ("once", "twice")] == [expected, expected]
    assert traces() == before


def test_run_that_is_looked_at_is_the_same_run(noisy: Bench, tmp_path: Path) -> None:
    """What is taken between steps changes nothing to come, dropout and all."""
    ends = []
    for looked in (False, True):
        session = noisy.adapted(noisy.target(dropout=0.4), seed=4)
        for number in range(3):
            losses = [session.accumulate(batch, 0.1) for batch in (Batch(ROWS[:4]), Batch(ROWS[4:]))]
            if looked:
                look(session, tmp_path / str(number))
            session.clip_gradients()
            session.update(0.05)
        ends.append((losses, session.fingerprints()))
    assert ends[0] == ends[1]


@frameworks
def test_failing_midway_leaves_no_trace(noisy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while a loss or its gradients are worked out leaves weights, gradients and modes as they were."""
    session = noisy.trained(noisy.target(dropout=0.5))
    before = session.loss(Batch(ROWS)), session.fingerprints(), modes(session)
    with monkeypatch.context() as patch:
        break_forward(session, patch, ZeroDivisionError())
        for verb in (session.loss, lambda batch: session.accumulate(batch, 1.0)):
            with pytest.raises(ZeroDivisionError):
                verb(Batch(ROWS))
    assert (session.loss(Batch(ROWS)), session.fingerprints(), modes(session)) == before
    assert gradients(session) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_stop_the_run(bench: Bench, bad: float) -> None:
    """A poisoned embedding ends training with an error that names step and row, and changes no weight."""
    session = bench.adapted()
    poison(session, ROWS[1].ids[3], bad)
    before = session.fingerprints()
    with pytest.raises(NonFiniteError, match=r"step 1 \(rows row 0, row 1"):
        list(train(session, lambda epoch: batches_of(ROWS, 2), (), LoopPlan(3, 1, 0.05, 0, "linear", 99)))
    assert session.fingerprints() == before


BFLOAT16 = [*((bench, "usual") for bench in FRAMEWORKS), ("mlx-llama", None), ("mlx-gpt2", None)]
"""Torch trains a whole bfloat16 model with gradients and moments in bfloat16."""


@pytest.mark.parametrize(("bench", "kind"), BFLOAT16, indirect=["bench"])
def test_bfloat16_base_keeps_gradients_and_moments_in_float32(bench: Bench, kind: Any) -> None:
    """On a bfloat16 base the adapter is float32, the base stays as it is, and the loss falls; so with MLX in full."""
    session = bench.adapted(kind, dtype="bfloat16")
    before, start = session.fingerprints(), session.loss(Batch(ROWS))
    for _ in range(8):
        step(session, batches_of(ROWS, 3), 0.05 if kind else 0.01)
    session.accumulate(Batch(ROWS), 0.01)
    assert all(map(math.isfinite, session.gradient_norms().values()))
    found = dtypes(session)
    assert found["gradients"] == found["moments"] == {"float32"}
    assert (found["trained"], found["rest"]) == (({"float32"}, {"bfloat16"}) if kind else ({"bfloat16"}, set()))
    changed = {name for name, mark in session.fingerprints().items() if mark != before[name]}
    assert changed == set(session.trainable_names())
    assert session.loss(Batch(ROWS)) < 0.95 * start


@frameworks
def test_out_of_memory_names_the_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory is an error that names the batch and what to lower; any other error stays what it is."""
    session = bench.adapted()
    said = {"torch": "DefaultCPUAllocator: can't allocate memory: you", "mlx": "[malloc_or_wait] Unable to allocate"}
    break_forward(session, monkeypatch, RuntimeError(said[bench.backend] + " tried 123 bytes.\nmore"))
    with pytest.raises(OutOfMemoryError, match="out of memory with 7 rows of up to 23 tokens") as caught:
        session.accumulate(Batch(ROWS), 1.0)
    assert "training.batch_size" in caught.value.hint
    if bench.backend == "torch":
        with pytest.raises(OutOfMemoryError, match="out of memory: Default"):
            session.loss(Batch(ROWS))
    break_forward(session, monkeypatch, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        session.accumulate(Batch(ROWS), 1.0)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        session.loss(Batch(ROWS))


@mlx_only
def test_words_and_lengths_that_the_model_does_not_know_are_refused(bench: Bench) -> None:
    """MLX would read beyond its tables in silence: a strange word or a long row is named, and nothing is changed."""
    session = bench.trained(bench.target(dropout=0.5))
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


def test_update_before_an_optimizer_is_an_error(bench: Bench) -> None:
    """An update without an optimizer is an error that says what is missing."""
    session = bench.open()
    session.attach(bench.target(), 0)
    with pytest.raises(TrainingError, match="prepare_updates"):
        session.update(0.1)
    if bench.backend == "mlx":
        with pytest.raises(TrainingError, match="no adapter"):
            bench.open().adapter_disabled()


def test_experts_at_once_are_computed_in_float64() -> None:
    """Rows through experts, which torch computes at once in float32 alone, are float64's own products."""
    torch = pytest.importorskip("torch")
    from finetune.backends.torch.float64 import Float64

    generator = torch.Generator().manual_seed(0)
    rows, experts = torch.randn(7, 16, generator=generator), torch.randn(3, 16, 8, generator=generator)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    with Float64():
        found = torch.nn.functional.grouped_mm(rows, experts, offs=ends)
    right = torch.cat([rows[:2].double() @ experts[0].double(), rows[2:6].double() @ experts[2].double()])
    assert found.dtype == torch.float64
    assert torch.equal(found[:6], right)
    assert not found[6:].any()
