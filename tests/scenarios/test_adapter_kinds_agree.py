"""Laws of every kind of adapter: reference, MLX and torch with PEFT compute, train and save the same thing.

LoRA and DoRA, both scalings, layers with ranks and alphas of their own, modules trained whole, and LoRA+.
"""

from pathlib import Path

import pytest
from hypothesis import given

from finetune.backends import open_backend
from finetune.records import Batch, ModelLocation, Optimization, TokenizedRow
from finetune_strategies.adapters import AdaptedModel
from finetune_strategies.datasets import token_rows
from finetune_strategies.profiles import examples
from support.side_by_side import (
    GPT2S,
    LLAMAS,
    in_float64,
    logits,
    open_all,
    open_bare,
    shaken,
    slopes,
    torch,
    write_model,
)
from support.tiny_models import make_rows
from support.tolerances import apart, check_gradients

pytestmark = pytest.mark.tier2
PROMPT = list(make_rows(6)[1].ids)


def check_agreement(model: AdaptedModel, rows: tuple[TokenizedRow, ...], folder: Path) -> None:
    """Names, loss, first gradients, logits and answers without the adapter are those of a session in float64."""
    location = write_model(model, folder)
    sessions = open_all(model, location)
    exact = sessions.get("reference") or in_float64(model, location)
    base = logits(open_bare(model, location)["torch"], PROMPT)
    assert all(apart(logits(session, PROMPT), base) < 1e-5 for session in sessions.values())  # nothing yet, exactly
    shaken({**sessions, "float64": exact})
    batch = Batch(rows)
    loss, wanted = exact.accumulate(batch, 0.2), slopes(exact)
    for session in sessions.values():
        assert set(session.trainable_names()) == set(exact.trainable_names())
        assert set(session.fingerprints()) == set(exact.fingerprints())
        if session is not exact:
            assert session.accumulate(batch, 0.2) == pytest.approx(loss, rel=1e-4, abs=1e-5)
            check_gradients(slopes(session), wanted)
        assert apart(logits(session, PROMPT), logits(exact, PROMPT)) < 1e-4
        with session.adapter_disabled():
            assert apart(logits(session, PROMPT), base) < 1e-5
        assert apart(logits(session, PROMPT), base) > 1e-3


@given(LLAMAS, token_rows(1, 4))
@examples(1 / 2)
def test_llamas_agree_in_every_kind(
    tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel, rows: tuple[TokenizedRow, ...]
) -> None:
    """A fresh adapter of any kind is the base; trained, its loss, gradients and logits agree in all three backends."""
    check_agreement(model, rows, tmp_path_factory.mktemp("model"))


@given(GPT2S, token_rows(1, 4))
@examples(1 / 4)
def test_gpt2s_agree_in_every_kind(
    tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel, rows: tuple[TokenizedRow, ...]
) -> None:
    """The same in torch and MLX for weights that are stored the other way round."""
    check_agreement(model, rows, tmp_path_factory.mktemp("model"))


@given(LLAMAS | GPT2S)
@examples(1 / 4)
def test_twenty_steps_agree_in_every_kind(tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel) -> None:
    """Twenty steps from a fresh adapter, B moving four times as fast: loss and gradient norm of each agree."""
    sessions = open_all(model, write_model(model, tmp_path_factory.mktemp("model")))
    told: list[list[float]] = []
    for session in sessions.values():
        session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0, loraplus_lr_ratio=4.0))
        told.append([])
        for number in range(20):
            batch = Batch(make_rows(5, seed=number % 3))
            told[-1] += [session.accumulate(batch, 1 / batch.target_count), session.clip_gradients()]
            session.update(1e-3)
    for numbers in told[1:]:
        assert numbers == pytest.approx(told[0], rel=3e-4)


@given(LLAMAS | GPT2S)
@examples(1 / 4)
def test_saved_adapters_load_in_peft(tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel) -> None:
    """An adapter of any kind that any backend saved loads in PEFT itself, and in every other, with the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    location = write_model(model, tmp_path_factory.mktemp("model"))
    sessions = open_all(model, location)
    shaken(sessions)
    for name, session in sessions.items():
        saved = tmp_path_factory.mktemp("saved")
        session.save_adapter(saved)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(location.folder), str(saved)).eval()
        with torch.no_grad():
            alone = plain(input_ids=torch.tensor([PROMPT])).logits[0].double().numpy()
        assert apart(alone, logits(session, PROMPT)) < 1e-4
        for reader in sessions:
            again = open_backend(reader).open(location, "float32", 0)
            again.load_adapter(saved)
            assert apart(logits(again, PROMPT), logits(session, PROMPT)) < 1e-4
            assert again.trainable_names() == []
        if name != "torch":
            whole = tmp_path_factory.mktemp("whole")
            session.save_model(whole)
            merged = open_backend("torch").open(ModelLocation("whole", whole, "local"), "float32", 0)
            assert apart(logits(merged, PROMPT), logits(session, PROMPT)) < 1e-4
