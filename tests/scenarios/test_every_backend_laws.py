"""Laws that each backend keeps by itself, told once: epochs, rates, knobs, merging, looks and checkpoints."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from finetune.backends import open_backend
from finetune.data.batches import epoch_batches
from finetune.events import StepDone
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization
from finetune.run.checkpoints import CheckpointStore, Owner
from finetune.training.loop import LoopPlan, train
from support.side_by_side import logits, torch, weights
from support.tiny_models import MODULES, NO_DROPOUT, make_model, make_rows, step
from support.tolerances import apart

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
PROMPT = list(ROWS[1].ids)
WHOLE = {
    "llama": ("model.norm", "model.layers.0.mlp.up_proj"),
    "gpt2": ("transformer.ln_f", "transformer.h.0.mlp.c_fc"),
}
"""Modules to train whole: gains, and a matrix, which GPT-2 stores the other way round."""
UNCLIPPED = Optimization(0.0, 1e9)


class Place(NamedTuple):
    """A model and the backend that it is opened in."""

    backend: str
    location: ModelLocation

    def open(self, dtype: str = "float32") -> Any:
        """The model as it is."""
        return open_backend(self.backend).open(self.location, dtype, 0)

    def target(self, **changes: Any) -> AdapterTarget:
        """An adapter whose scale is neither one nor whole."""
        return replace(AdapterTarget(3, 7.0, 0.0, MODULES[self.location.name][:2]), **changes)

    def adapted(self, target: AdapterTarget | None = None, optimization: Optimization = UNCLIPPED) -> Any:
        """A session with a fresh adapter, ready to be trained."""
        session = self.open()
        session.attach(target or self.target(), 4)
        session.prepare_updates(optimization)
        return session

    def trained(self, target: AdapterTarget | None = None) -> Any:
        """A session that has gone a few steps."""
        session = self.adapted(target, Optimization(0.05, 1.0))
        for _ in range(3):
            step(session, [Batch(ROWS[:3]), Batch(ROWS[3:])], 0.05)
        return session


PLACES = ("torch-llama", "torch-gpt2", "mlx-llama", "mlx-gpt2", "reference-llama")


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Each backend with each kind of model that it computes."""
    backend, kind = request.param.split("-")
    changes = NO_DROPOUT if kind == "gpt2" else {}
    return Place(backend, make_model(kind, tmp_path_factory.mktemp(request.param), **changes))


def kinds(place: Place) -> dict[str, AdapterTarget]:
    """One adapter of each kind."""
    return {
        "lora": place.target(scaling="rank_stabilized", rank_pattern={MODULES[place.location.name][0]: 2}),
        "dora": place.target(kind="dora"),
        "saved": place.target(saved=WHOLE[place.location.name]),
    }


def one_run(place: Place, seed: int) -> list[StepDone]:
    """Two epochs at a rate of zero, so that each step is told of the same weights; neither size divides the rows."""

    def batches(epoch: int) -> list[Batch]:
        return epoch_batches(ROWS, 2, seed=seed, epoch=epoch)

    events = train(place.adapted(), batches, (), LoopPlan(4, 3, 0.0, 0, "constant", 99))
    return [event for event in events if isinstance(event, StepDone)]


def test_epoch_learns_every_row_once(place: Place) -> None:
    """P-COVER, P-ACCUM: an epoch's steps together have the loss of all rows; each has the gradient of its own rows."""
    steps, fresh = one_run(place, 0), place.adapted()
    assert len(steps) == 4
    for epoch in (0, 1):
        own = steps[2 * epoch : 2 * epoch + 2]
        assert sum(each.trained_tokens for each in own) == Batch(ROWS).target_count
        assert sum(each.loss * each.trained_tokens for each in own) == pytest.approx(fresh.loss(Batch(ROWS)), rel=1e-5)
        order = epoch_batches(ROWS, 2, seed=0, epoch=epoch)
        assert [len(batch.rows) for batch in order].count(1) == 1
        for told, window in zip(own, (order[:3], order[3:]), strict=True):
            rows = Batch(tuple(row for batch in window for row in batch.rows))
            alone = place.adapted()
            alone.accumulate(rows, 1 / rows.target_count)
            assert told.grad_norm == pytest.approx(math.hypot(*alone.gradient_norms().values()), rel=1e-4)


def test_epoch_has_an_order_of_its_own_that_the_seed_decides(place: Place) -> None:
    """P-ORDER: the next epoch has another order, the same seed the same to the bit, another seed another."""
    losses = [[each.loss for each in one_run(place, seed)] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][:2] != pytest.approx(losses[0][2:], rel=1e-6)


def test_rate_that_moves_the_weights_is_the_closed_form(place: Place) -> None:
    """P-LR: where the gradient stays the same, AdamW moves by the rate itself, which counts steps and not batches."""
    session = place.adapted(optimization=Optimization(0.0, 1e9, epsilon=1e-12))
    peak, held, moves = 1e-6, weights(session), []
    for event in train(session, lambda epoch: [Batch(ROWS)] * 2, (), LoopPlan(5, 2, peak, 2, "linear", 99)):
        if isinstance(event, StepDone):
            now = weights(session)
            # B begins at zero, where float32 has room for so small a step.
            moves.append(max(np.abs(now[name] - held[name]).max() for name in now if ".lora_B." in name))
            held = now
    assert moves == pytest.approx([0.5 * peak, peak, 0.75 * peak, 0.5 * peak, 0.25 * peak], rel=1e-2)


KNOBS: dict[str, Callable[[Place], Any]] = {
    "rank": lambda place: 2,
    "alpha": lambda place: 5.0,
    "dropout": lambda place: 0.3,
    "modules": lambda place: MODULES[place.location.name][:1],
    "kind": lambda place: "dora",
    "scaling": lambda place: "rank_stabilized",
    "rank_pattern": lambda place: {MODULES[place.location.name][0]: 1},
    "alpha_pattern": lambda place: {MODULES[place.location.name][0]: 3.0},
    "saved": lambda place: WHOLE[place.location.name],
    "weight_decay": lambda place: 0.5,
    "max_grad_norm": lambda place: 0.01,
    "betas": lambda place: (0.5, 0.9),
    "epsilon": lambda place: 1e-1,
    "loraplus_lr_ratio": lambda place: 4.0,
}


def test_every_knob_of_adapter_and_optimizer_is_wired(place: Place) -> None:
    """P-KNOB: each of 14 settings, changed alone, ends in another loss; nothing changed ends in the same."""
    owners = {each.name: AdapterTarget for each in fields(AdapterTarget)}
    owners |= {each.name: Optimization for each in fields(Optimization)}
    assert owners.keys() == KNOBS.keys()
    assert len(KNOBS) == 14

    def end(changed: str | None) -> float:
        # Without so large an epsilon AdamW moves as far after clipping as before.
        target, optimization = place.target(), Optimization(0.05, 1.0, epsilon=1e-3)
        change = {changed: KNOBS[changed](place)} if changed else {}
        if changed and owners[changed] is AdapterTarget:
            target = replace(target, **change)
        elif changed:
            optimization = replace(optimization, **change)
        session = place.adapted(target, optimization)
        for _ in range(3):
            step(session, [Batch(ROWS)], 0.05)
        return float(session.loss(Batch(ROWS)))

    usual = end(None)
    assert end(None) == usual
    ends = {knob: end(knob) for knob in KNOBS}
    assert [knob for knob, loss in ends.items() if abs(loss - usual) < 1e-4 * usual] == []
    assert len(set(ends.values())) == len(ends)


def test_fresh_adapter_of_every_kind_is_the_base(place: Place) -> None:
    """P-GRAD: before the first step nothing has changed, whatever an adapter is made of; after one step it has."""
    base = logits(place.open(), PROMPT)
    for kind, target in kinds(place).items():
        session = place.adapted(target)
        assert apart(logits(session, PROMPT), base) < 1e-6, kind
        step(session, [Batch(ROWS)], 0.05)
        assert apart(logits(session, PROMPT), base) > 1e-3, kind


@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
def test_model_saved_is_the_adapted_one_and_the_session_stays(place: Place, kind: str, tmp_path: Path) -> None:
    """P-MERGE: read by transformers alone it computes the same, which the base does not; who wrote it is as before."""
    session = place.trained(kinds(place)[kind])
    tuned, marks, loss = logits(session, PROMPT), session.fingerprints(), session.loss(Batch(ROWS))
    session.save_model(tmp_path)
    assert session.fingerprints() == marks
    assert np.array_equal(logits(session, PROMPT), tuned)
    assert session.loss(Batch(ROWS)) == loss
    merged = Place("torch", ModelLocation("merged", tmp_path, "local")).open()
    assert (
        merged.fingerprints().keys() == open_backend("torch").open(place.location, "float32", 0).fingerprints().keys()
    )
    assert apart(logits(merged, PROMPT), tuned) < 1e-4
    assert apart(logits(place.open(), PROMPT), tuned) > 1e-2
    assert (tmp_path / "config.json").exists()
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
def test_adapter_saved_is_the_adapter_here_and_in_peft(place: Place, kind: str, tmp_path: Path) -> None:
    """P-ART: a new session, of the backend that wrote it or of torch with PEFT, computes what was trained."""
    session = place.trained(kinds(place)[kind])
    session.save_adapter(tmp_path)
    for backend in {place.backend, "torch"}:
        again = Place(backend, place.location).open()
        again.load_adapter(tmp_path)
        assert apart(logits(again, PROMPT), logits(session, PROMPT)) < 1e-5
        assert again.trainable_names() == []


@pytest.mark.parametrize("place", [name for name in PLACES if not name.startswith("reference")], indirect=True)
def test_merged_in_half_precision_is_rounded_once(place: Place, tmp_path: Path) -> None:
    """P-MERGE: of a bfloat16 base and a float32 adapter the sum is made in float32: half a step of bfloat16 off.

    The reference computes in float64, whatever the model's dtype.
    """
    from safetensors.torch import load_file

    session = place.open("bfloat16")
    session.attach(place.target(), 4)
    session.prepare_updates(Optimization(0.05, 1.0))
    for _ in range(3):
        step(session, [Batch(ROWS)], 0.05)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "model").mkdir()
    session.save_adapter(tmp_path / "adapter")
    session.save_model(tmp_path / "model")
    base = {
        name: tensor.bfloat16().double()
        for name, tensor in load_file(place.location.folder / "model.safetensors").items()
    }
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = load_file(tmp_path / "model" / "model.safetensors")
    downs = [name for name in adapter if ".lora_A." in name]
    assert len(downs) >= 4
    for name in downs:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        growth = 7.0 / 3.0 * adapter[name.replace("lora_A", "lora_B")].double() @ adapter[name].double()
        exact = base[f"{path}.weight"] + (growth.t() if place.location.name == "gpt2" else growth)
        found = merged[f"{path}.weight"]
        assert found.dtype == torch.bfloat16
        assert ((found.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 1e-7).all(), name
        assert not torch.equal(found.double(), base[f"{path}.weight"]), name


def test_run_that_is_looked_at_is_the_same_run(place: Place, tmp_path: Path) -> None:
    """P-EVAL: what is taken between steps is taken without dropout, and changes nothing to come, dropout and all."""
    ends = []
    for looked in (False, True):
        session = place.adapted(place.target(dropout=0.4), Optimization(0.05, 1.0))
        for number in range(3):
            losses = [session.accumulate(batch, 0.1) for batch in (Batch(ROWS[:4]), Batch(ROWS[4:]))]
            if looked:
                seen = [look(session, tmp_path / f"{number}-{again}") for again in (0, 1)]
                assert seen[0] == seen[1]
            session.clip_gradients()
            session.update(0.05)
        ends.append((losses, session.fingerprints()))
    assert ends[0] == ends[1]
    # Only now: in torch the random state belongs to the process, and a new adapter draws from it.
    still = place.open()
    still.load_adapter(tmp_path / "2-0" / "adapter")
    assert still.loss(Batch(ROWS)) == pytest.approx(seen[0][1][0], rel=1e-5)


def look(session: Any, folder: Path) -> Any:
    """Everything that can be taken from a session without training it."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "model").mkdir()
    session.save_adapter(folder / "adapter")
    session.save_model(folder / "model")
    session.save_logits([PROMPT], folder / "logits")
    with session.adapter_disabled():
        base = session.loss(Batch(ROWS))
    told = session.loss(Batch(ROWS)), session.generate([[5, 6, 7], [8, 9]], 4, [2]), session.gradient_norms()
    return base, told, (folder / "logits").read_bytes()


def test_state_before_the_first_step_is_gone_on_from(place: Place, tmp_path: Path) -> None:
    """P-RESUME: a run that was stopped before it took a step is, begun again from its state, the same run."""
    ends = []
    for resumed in (False, True):
        session = place.open()
        session.attach(place.target(dropout=0.4), 9 if resumed else 4)
        session.prepare_updates(Optimization(0.05, 1.0))
        session.load_state(tmp_path) if resumed else session.save_state(tmp_path)
        for _ in range(2):
            step(session, [Batch(ROWS)], 0.05)
        ends.append(session.fingerprints())
    assert ends[0] == ends[1]


def test_checkpoint_that_is_kept_is_the_state_of_its_step(place: Place, tmp_path: Path) -> None:
    """P-KEEP, P-CRASH: the newest, the best and none whose writing died; from each a run goes on to the same end."""
    store, owner = CheckpointStore(tmp_path / "checkpoints", keep=1), Owner({}, {})
    session, marks = place.adapted(place.target(dropout=0.4), Optimization(0.05, 1.0)), {}

    def die(folder: Path) -> None:
        session.save_state(folder)
        raise KeyboardInterrupt

    for number in range(8, 12):
        step(session, [Batch(ROWS[: number - 5])], 0.05)
        marks[number] = session.fingerprints()
        if number < 11:
            store.save(number, session.save_state, owner, best=8)
    with pytest.raises(KeyboardInterrupt):
        store.save(11, die, owner, best=8)
    assert store.steps() == [8, 10]
    for kept in store.steps():
        again = place.adapted(place.target(dropout=0.4), Optimization(0.05, 1.0))
        step(again, [Batch(ROWS)], 0.5)
        again.load_state(store.open(kept, {}))
        assert again.fingerprints() == marks[kept]
        for number in range(kept + 1, 12):
            step(again, [Batch(ROWS[: number - 5])], 0.05)
        assert again.fingerprints() == marks[11]
