"""Laws of every kind of adapter: reference, MLX and torch with PEFT compute, train and save the same thing.

LoRA and DoRA, both scalings, layers with ranks and alphas of their own, modules trained whole, and LoRA+.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune.backends import open_backend  # noqa: E402
from finetune.records import Batch, ModelLocation, Optimization, Tokenized  # noqa: E402
from finetune_strategies.adapters import AdaptedModel, varied_models  # noqa: E402
from finetune_strategies.datasets import token_rows  # noqa: E402
from finetune_strategies.models import gpt2_configs, llama_configs  # noqa: E402
from finetune_strategies.profiles import examples  # noqa: E402
from scenarios.tiny_mlx import gradients, logits_of, open_session, set_weights  # noqa: E402
from scenarios.tiny_models import NO_DROPOUT, make_rows  # noqa: E402

pytestmark = pytest.mark.tier2
LLAMAS = varied_models(llama_configs(vocab_size=97), dropouts=(0.0,))
GPT2S = varied_models(
    # What mlx-lm computes: no dropout of its own, a tied head only, an inner size of four times the width only.
    gpt2_configs(vocab_size=97).map(
        lambda config: {**config, **NO_DROPOUT, "tie_word_embeddings": True, "n_inner": None}
    ),
    dropouts=(0.0,),
)
ROWS = make_rows(6)
PROMPT = list(ROWS[1].ids)


def open_all(model: AdaptedModel, folder: Path) -> dict[str, Any]:
    """The model in every backend that computes it, with one adapter on all of them, freshly drawn."""
    llama = model.config["model_type"] == "llama"
    open_backend("reference" if llama else "torch").create(model.config, folder, 3)
    dice = np.random.default_rng(9)
    tensors = load_file(folder / "model.safetensors")
    # A new model's biases are zero and its gains one: nobody could tell what became of them.
    odd = {name: value + dice.normal(0, 0.2, value.shape).astype("f4") if value.ndim == 1 else value
           for name, value in tensors.items()}  # fmt: skip
    save_file(odd, folder / "model.safetensors", metadata={"format": "pt"})
    location = ModelLocation("tiny", folder, "local")
    sessions: dict[str, Any] = {
        "torch": open_backend("torch").open(location, "float32", 0),
        "mlx": open_session(location),
    }
    if llama:
        sessions["reference"] = open_backend("reference").open(location, "float32", 0)
    for session in sessions.values():
        session.attach(model.target, 1)
    spread(sessions, {name: tensor.detach().numpy().copy() for name, tensor in sessions["torch"]._trainable().items()})
    return sessions


def spread(sessions: dict[str, Any], values: dict[str, Any]) -> None:
    """Give the trainable tensors of all sessions these values."""
    with torch.no_grad():
        for name, tensor in sessions["torch"]._trainable().items():
            tensor.copy_(torch.from_numpy(np.asarray(values[name], np.float32)))
    set_weights(sessions["mlx"], values)
    for name, tensor in sessions["reference"].trainable.items() if "reference" in sessions else ():
        tensor[...] = values[name]


def shaken(sessions: dict[str, Any]) -> None:
    """Move every trainable tensor alike, so that no B is zero and no magnitude a length of the base's."""
    dice = np.random.default_rng(4)
    held = {name: tensor.detach().numpy() for name, tensor in sessions["torch"]._trainable().items()}
    spread(
        sessions, {name: value + dice.normal(0, 0.1, value.shape).astype(np.float32) for name, value in held.items()}
    )


def logits(session: Any, prompt: list[int] = PROMPT) -> Any:
    """The logits after each token, whoever computes them."""
    if hasattr(session, "trip"):
        return logits_of(session, [prompt])[0]
    if hasattr(session, "logits"):
        return session.logits(prompt)
    session.model.eval()
    with torch.no_grad():
        return session.model(input_ids=torch.tensor([prompt])).logits[0].double().numpy()


def slopes(session: Any) -> dict[str, Any]:
    """Every gradient, in float64."""
    if hasattr(session, "gradients"):
        return gradients(session)
    return {name: tensor.grad.double().numpy() for name, tensor in session._trainable().items()}


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def check_agreement(model: AdaptedModel, rows: tuple[Tokenized, ...], folder: Path) -> None:
    """Names, loss, first gradients, logits and answers without the adapter are the same everywhere."""
    sessions = open_all(model, folder)
    wanted = sessions.get("reference", sessions["torch"])
    base = open_backend("torch").open(ModelLocation("tiny", folder, "local"), "float32", 0)
    assert all(apart(logits(session), logits(base)) < 1e-5 for session in sessions.values())  # nothing yet, exactly
    shaken(sessions)
    batch = Batch(rows)
    losses = {name: session.accumulate(batch, 0.2) for name, session in sessions.items()}
    found = {name: slopes(session) if batch.target_count else {} for name, session in sessions.items()}
    largest = max((np.abs(value).max() for value in found["torch"].values()), default=0.0)
    for name, session in sessions.items():
        assert set(session.trainable_names()) == set(wanted.trainable_names())
        assert set(session.fingerprints()) == set(wanted.fingerprints())
        assert losses[name] == pytest.approx(losses["torch"], rel=1e-4, abs=1e-5)
        assert apart(logits(session), logits(wanted)) < 1e-4
        assert found[name].keys() == found["torch"].keys()
        off = {
            each: np.abs(found[name][each] - value).max() / (np.abs(value).max() + 1e-2 * largest)
            for each, value in found["torch"].items()
            if largest
        }
        assert {each: share for each, share in off.items() if share > 3e-4} == {}
        with session.adapter_disabled():
            assert apart(logits(session), logits(base)) < 1e-5
        assert apart(logits(session), logits(base)) > 1e-3


@given(LLAMAS, token_rows(1, 4))
@examples(1 / 2)
def test_llamas_agree_in_every_kind(
    tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel, rows: tuple[Tokenized, ...]
) -> None:
    """A fresh adapter of any kind is the base; trained, its loss, gradients and logits agree in all three backends."""
    check_agreement(model, rows, tmp_path_factory.mktemp("model"))


@given(GPT2S, token_rows(1, 4))
@examples(1 / 4)
def test_gpt2s_agree_in_every_kind(
    tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel, rows: tuple[Tokenized, ...]
) -> None:
    """The same in torch and MLX for weights that are stored the other way round."""
    check_agreement(model, rows, tmp_path_factory.mktemp("model"))


@given(LLAMAS)
@examples(1 / 4)
def test_ten_steps_agree_in_every_kind(tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel) -> None:
    """Ten steps from a fresh adapter, B moving four times as fast: loss and gradient norm of each agree."""
    sessions = open_all(model, tmp_path_factory.mktemp("model"))
    told: dict[str, list[float]] = {}
    for name, session in sessions.items():
        session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0, lora_plus_ratio=4.0))
        told[name] = []
        for number in range(10):
            batch = Batch(make_rows(5, seed=number % 3))
            told[name] += [session.accumulate(batch, 1 / batch.target_count), session.clip_gradients()]
            session.update(1e-3)
    assert told["torch"] == pytest.approx(told["reference"], rel=3e-4)
    assert told["mlx"] == pytest.approx(told["reference"], rel=3e-4)


@given(LLAMAS | GPT2S)
@examples(1 / 4)
def test_saved_adapters_load_in_peft(tmp_path_factory: pytest.TempPathFactory, model: AdaptedModel) -> None:
    """An adapter of any kind that any backend saved loads in PEFT itself, and in every other, with the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    sessions = open_all(model, folder)
    shaken(sessions)
    location = ModelLocation("tiny", folder, "local")
    for name, session in sessions.items():
        saved = tmp_path_factory.mktemp("saved")
        session.save_adapter(saved)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(saved)).eval()
        with torch.no_grad():
            alone = plain(input_ids=torch.tensor([PROMPT])).logits[0].double().numpy()
        assert apart(alone, logits(session)) < 1e-4
        for reader in sessions:
            again = open_backend(reader).open(location, "float32", 0)
            again.load_adapter(saved)
            assert apart(logits(again), logits(session)) < 1e-4
            assert again.trainable_names() == []
        if name != "torch":
            whole = tmp_path_factory.mktemp("whole")
            session.save_model(whole)
            merged = open_backend("torch").open(ModelLocation("whole", whole, "local"), "float32", 0)
            assert apart(logits(merged), logits(session)) < 1e-4
