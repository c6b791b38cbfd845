"""A story told to every backend at once: whatever is done to a model, each of them has done the same afterwards.

The float64 reference (torch, for a GPT-2), torch with PEFT and MLX get one generated model and one adapter, and then
the same rules in any order: batches padded or packed, steps, checkpoints, merging, exports, answers. Random numbers
are each framework's own, so nothing is dropped out, and the first values of an adapter are handed from one to the
others.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune.backends import open_backend
from finetune.data.batches import epoch_batches
from finetune.events import Event, FirstGradients, StepDone
from finetune.ports import Objective
from finetune.records import Batch, ModelLocation, Optimization, TokenizedRow
from finetune.training.loop import LoopPlan, train
from finetune.training.schedule import Schedule
from finetune_strategies.adapters import AdaptedModel
from finetune_strategies.datasets import Dealing, dealings, token_rows
from finetune_strategies.profiles import examples
from support import side_by_side
from support.objectives import OBJECTIVES
from support.sessions import gradients, logits, weights
from support.side_by_side import GPT2S, LLAMAS, labels, labels_by_hand, training_events
from support.tolerances import apart, check_gradients

pytestmark = pytest.mark.tier2
CLOSE = 1e-4
"""How far losses and logits may be apart, as a share of the largest: float32 next to float64."""
WORN = 1e-3
"""The same for trained tensors, whose differences each step carries on."""
CONTEXT = 24
PROBE = [5, 90, 3, 44, 7, 12]
RATES = st.sampled_from([0.01, 0.003, 0.03])


class AgreementMachine(RuleBasedStateMachine):
    """One model, one adapter, every backend."""

    @initialize(
        model=LLAMAS | GPT2S,
        pad_id=st.sampled_from([0, 1, 96]),
        fresh=st.booleans(),
        limit=st.sampled_from([1.0, 0.05, 1e6]),
        ratio=st.sampled_from([1.0, 4.0]),
    )
    def begin(self, model: AdaptedModel, pad_id: int, fresh: bool, limit: float, ratio: float) -> None:
        """The model is opened and adapted; its adapter is new, or has been trained already."""
        self.root = Path(tempfile.mkdtemp())
        self.model, self.pad_id = model, pad_id
        # Far above the gradients' rounding errors, which AdamW would otherwise blow up to full steps.
        self.optimization = Optimization(0.05, limit, epsilon=1e-3, loraplus_lr_ratio=ratio)
        self.location = side_by_side.write_model(model, self.folder())
        self.base = logits(open_backend("torch").open(self.location, "float32", 0), PROBE)
        self.sessions = side_by_side.open_all(model, self.location, pad_id)
        self.exact = next(iter(self.sessions))
        if not fresh:
            side_by_side.shaken(self.sessions)
        for session in self.sessions.values():
            session.prepare_updates(self.optimization)
        self.steps = 0
        self.pending = False
        self.kept: tuple[int, dict[str, tuple[Path, dict[str, str]]]] | None = None
        self.frozen = {name: self.untrained(session) for name, session in self.sessions.items()}

    def teardown(self) -> None:
        """Leave nothing."""
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def folder(self) -> Path:
        """A new empty folder."""
        return Path(tempfile.mkdtemp(dir=self.root))

    def untrained(self, session: Any) -> dict[str, str]:
        """The marks of what must never change."""
        trained = set(session.trainable_names())
        return {name: mark for name, mark in session.fingerprints().items() if name not in trained}

    def restarted(self, name: str, folder: Path) -> Any:
        """A new session, its adapter and random state from another seed, that goes on from the state in a folder."""
        session: Any = open_backend(name).open(self.location, "float32", self.pad_id)
        session.attach(self.model.target, 77)
        session.prepare_updates(self.optimization)
        session.load_state(folder)
        return session

    def save_states(self) -> dict[str, tuple[Path, dict[str, str]]]:
        """Each backend's state in a folder, and the marks of all of its tensors."""
        saved = {}
        for name, session in self.sessions.items():
            saved[name] = self.folder(), session.fingerprints()
            session.save_state(saved[name][0])
        return saved

    def batches(self, rows: Sequence[TokenizedRow], dealing: Dealing, *, packed: bool) -> list[Batch]:
        """The rows as the product deals them out; mlx-lm lets nobody give a GPT-2 the positions of packed rows."""
        length = CONTEXT if packed and self.model.config["model_type"] == "llama" else None
        return epoch_batches(rows, dealing.batch_size, seed=dealing.rows, epoch=0, pack_length=length)

    def close(self, found: Any, wanted: Any, share: float = CLOSE) -> None:
        """Both are the same but for rounding."""
        assert found == pytest.approx(wanted, rel=share, abs=1e-5)

    @rule(rows=token_rows(1, 4), dealing=dealings(most_rows=4), packed=st.booleans())
    def evaluate(self, rows: tuple[TokenizedRow, ...], dealing: Dealing, packed: bool) -> None:
        """The same tokens are predicted at the same places, and cost the same; without the adapter all are the base."""
        for batch in self.batches(rows, dealing, packed=packed):
            by_hand = labels_by_hand(batch)
            assert len(by_hand) == batch.target_count
            assert labels(batch) == by_hand
            losses = {name: session.loss(batch) for name, session in self.sessions.items()}
            for loss in losses.values():
                self.close(loss, losses[self.exact])

        for name, session in self.sessions.items():
            before = logits(session, PROBE)
            with session.adapter_disabled():
                assert apart(logits(session, PROBE), self.base) < CLOSE, name
            assert np.array_equal(logits(session, PROBE), before), name

    @rule(
        rows=token_rows(1, 4),
        dealing=dealings(most_rows=4),
        packed=st.booleans(),
        objective=st.sampled_from(OBJECTIVES),
    )
    def accumulate(self, rows: tuple[TokenizedRow, ...], dealing: Dealing, packed: bool, objective: Objective) -> None:
        """The gradients of each batch are added to those that are there, whatever is minimised."""
        targets = sum(row.target_count for row in rows)
        for batch in self.batches(rows, dealing, packed=packed):
            losses = {each: self.sessions[each].accumulate(batch, 1 / targets, objective) for each in self.sessions}
            for loss in losses.values():
                self.close(loss, losses[self.exact])
        self.pending = True
        exact = gradients(self.sessions[self.exact])
        for session in self.sessions.values():
            check_gradients(gradients(session), exact, WORN)

    @precondition(lambda self: self.pending)
    @rule(rate=RATES)
    def update(self, rate: float) -> None:
        """What has been accumulated is clipped to the same length and moves the same tensors."""
        norms = {name: session.clip_gradients() for name, session in self.sessions.items()}
        for session in self.sessions.values():
            session.update(rate)
            assert set(session.gradient_norms().values()) == {0.0}
        for norm in norms.values():
            self.close(norm, norms[self.exact], WORN)
        self.steps += 1
        self.pending = False

    def finish(self) -> None:
        """Take the step whose gradients are waiting."""
        if self.pending:
            self.update(0.01)

    @rule(
        rows=token_rows(2, 5),
        dealing=dealings(most_rows=5),
        packed=st.booleans(),
        rate=RATES,
        schedule=st.sampled_from(["cosine", "constant"]),
        steps=st.integers(1, 3),
    )
    def train(
        self,
        rows: tuple[TokenizedRow, ...],
        dealing: Dealing,
        packed: bool,
        rate: float,
        schedule: Schedule,
        steps: int,
    ) -> None:
        """The loop itself goes a few steps: it tells the same losses, rates, norms and first gradients."""
        self.finish()
        plan = LoopPlan(steps, dealing.accumulation, rate, 1, schedule, 1)
        batches = self.batches(rows, dealing, packed=packed)
        told = {
            name: list(train(session, lambda epoch: batches, batches[:1], plan))
            for name, session in self.sessions.items()
        }
        wanted = [_numbers(event) for event in told[self.exact]]
        for events in told.values():
            for event, numbers in zip(events, wanted, strict=True):
                self.close(_numbers(event), numbers, WORN)
        self.steps += steps

    @rule(who=st.sets(st.sampled_from(["reference", "torch", "mlx"]), min_size=1))
    def restart(self, who: set[str]) -> None:
        """Some of them save their state and go on in a new session; the others never notice."""
        self.finish()
        saved = self.save_states()
        for name in who & set(self.sessions):
            self.sessions[name] = self.restarted(name, saved[name][0])
            assert self.sessions[name].fingerprints() == saved[name][1], name

    @rule()
    def keep(self) -> None:
        """A checkpoint of all of them."""
        self.finish()
        self.kept = (self.steps, self.save_states())

    @precondition(lambda self: self.kept is not None)
    @rule()
    def go_back(self) -> None:
        """All go on from the checkpoint, which each of them finds to the bit; gradients that waited are gone."""
        assert self.kept is not None
        self.steps, saved = self.kept
        self.pending = False
        for name, (folder, marks) in saved.items():
            self.sessions[name] = self.restarted(name, folder)
            assert self.sessions[name].fingerprints() == marks, name

    def written(self, writer: int, verb: str) -> Path:
        """The folder into which one of them has saved something."""
        folder = self.folder()
        getattr(list(self.sessions.values())[writer % len(self.sessions)], verb)(folder)
        return folder

    @rule(writer=st.integers(0, 2))
    def merge(self, writer: int) -> None:
        """The model that one of them saves is the adapted one in all of them, without an adapter."""
        folder = self.written(writer, "save_model")
        wanted = logits(self.sessions[self.exact], PROBE)
        merged = side_by_side.open_bare(self.model, ModelLocation("merged", folder, "local"), self.pad_id)
        for name, session in merged.items():
            assert not any("lora" in tensor for tensor in session.fingerprints()), name
            assert apart(logits(session, PROBE), wanted) < WORN, name

    @rule(writer=st.integers(0, 2))
    def export(self, writer: int) -> None:
        """The adapter that one of them saves is, in all of them, the adapter, and frozen."""
        folder = self.written(writer, "save_adapter")
        for name, session in side_by_side.open_bare(self.model, self.location, self.pad_id).items():
            session.load_adapter(folder)
            assert session.trainable_names() == []
            wanted = logits(self.sessions[name], PROBE)
            assert apart(logits(session, PROBE), wanted) < WORN, name

    @rule(prompts=token_rows(1, 3), most=st.integers(0, 6), stop=st.integers(0, 96))
    def answer(self, prompts: tuple[TokenizedRow, ...], most: int, stop: int) -> None:
        """All give the same answers."""
        asked = [row.ids for row in prompts]
        said = {name: session.generate(asked, most, [stop]) for name, session in self.sessions.items()}
        for name, answers in said.items():
            for prompt, ours, theirs in zip(asked, answers, said[self.exact], strict=True):
                self.same_words(name, prompt, [*ours, stop], [*theirs, stop])

    def same_words(self, name: str, prompt: Sequence[int], ours: list[int], theirs: list[int]) -> None:
        """Two answers are the same, or part where two words are equally likely but for rounding."""
        parted = next((at for at, both in enumerate(zip(ours, theirs, strict=False)) if both[0] != both[1]), None)
        if parted is None:
            assert ours == theirs, name
            return
        scores = logits(self.sessions[self.exact], [*prompt, *theirs[:parted]])[-1]
        assert abs(scores[ours[parted]] - scores[theirs[parted]]) < WORN * np.abs(scores).max(), name

    @invariant()
    def agree(self) -> None:
        """Names, shapes, numbers and step counts are the same in all; what is not trained has not changed."""
        if not hasattr(self, "kept"):
            return
        wanted = weights(self.sessions[self.exact])
        for name, session in self.sessions.items():
            assert set(session.trainable_names()) == set(wanted) != set(), name
            assert training_events(session) == self.steps, name
            assert self.untrained(session) == self.frozen[name], name
            found = weights(session)
            assert {each: value.shape for each, value in found.items()} == {
                each: value.shape for each, value in wanted.items()
            }
            off = {each: apart(value, wanted[each]) for each, value in found.items() if np.abs(wanted[each]).max() > 0}
            assert {each: share for each, share in off.items() if share > WORN} == {}, name
            assert not any(found[each].any() for each in set(wanted) - set(off)), name


def _numbers(event: Event) -> dict[str, float]:
    """What an event tells of training, without what a clock says."""
    if isinstance(event, FirstGradients):
        return dict(event.norms)
    if isinstance(event, StepDone):
        return {
            "step": event.step,
            "loss": event.loss,
            "rate": event.learning_rate,
            "norm": event.grad_norm,
            "tokens": event.tokens,
            "trained": event.trained_tokens,
        }
    return {"held out": event.loss, "tokens": event.tokens}  # type: ignore[attr-defined]


AgreementMachine.TestCase.settings = examples(2 / 3)
test_backends_agree_after_every_rule = AgreementMachine.TestCase
