"""Laws of the reference backend's arithmetic: its gradients are slopes, and its shortcuts change nothing."""

import gc
import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.backends import importing_libraries
from finetune.backends.reference.model import ReferencePass
from finetune.backends.reference.optimizer import ReferenceAdamW, clip
from finetune.ports import Objective
from finetune.records import AdapterTarget, Batch, Optimization, TokenizedRow
from finetune_strategies.adapters import AdaptedModel, adapted_models
from finetune_strategies.datasets import token_rows
from finetune_strategies.models import llama_configs
from finetune_strategies.profiles import examples
from support.objectives import OBJECTIVES
from support.tiny_llamas import BATCH, DROPPING, LINEAR, ROWS, VOCAB, adapted, check_slopes

FEW = examples(1 / 3)


def configs() -> st.SearchStrategy[dict[str, Any]]:
    """Llamas of awkward shapes that know the words of the rows below."""
    return llama_configs(vocab_size=VOCAB)


def models() -> st.SearchStrategy[AdaptedModel]:
    """The same with an adapter on some layers, by short names or by a whole path."""
    return adapted_models(configs(), paths=True, dropouts=(0.0,))


def close(first: Any, second: Any, tolerance: float = 1e-12) -> bool:
    """Whether the same tensors are there and differ by no more than rounding, as a share of the largest of each."""
    return first.keys() == second.keys() and all(
        np.abs(first[name] - second[name]).max() <= tolerance * (1 + np.abs(first[name]).max()) for name in first
    )


@given(models(), token_rows(1, 3), st.sampled_from(OBJECTIVES))
@FEW
def test_gradient_of_the_adapter_is_the_slope_of_the_loss(
    model: AdaptedModel, rows: tuple[TokenizedRow, ...], objective: Objective
) -> None:
    """The gradient of each A and B, neither of them zero, is the slope of the loss, whatever shape and objective."""
    check_slopes(adapted(model.target, trained=True, config=model.config), Batch(rows), objective)


@given(configs(), token_rows(1, 3), st.sampled_from(OBJECTIVES))
@FEW
def test_gradient_of_every_weight_is_the_slope_of_the_loss(
    config: dict[str, Any], rows: tuple[TokenizedRow, ...], objective: Objective
) -> None:
    """Without an adapter the gradient of every weight is the slope of the loss, tied head and norms included."""
    check_slopes(adapted(None, config=config), Batch(rows), objective)


@given(st.sampled_from([0.5, 3.0, 7.0]), st.sampled_from([2.0, 0.25]))
@examples(0.1)
def test_adapter_acts_in_proportion_to_alpha(alpha: float, factor: float) -> None:
    """On the head the change of the logits grows with alpha; anywhere, `factor` x alpha undoes B / factor."""
    changes = []
    for each in (alpha, factor * alpha):
        session = adapted(AdapterTarget(2, each, 0.0, ("lm_head",)), trained=True)
        tuned = session.logits(ROWS[1].ids)
        with session.adapter_disabled():
            changes.append(tuned - session.logits(ROWS[1].ids))
    assert np.abs(changes[0]).max() > 1e-3
    assert np.allclose(changes[1], factor * changes[0], rtol=0, atol=1e-12 * np.abs(changes[1]).max() + 1e-12)
    first, second = (adapted(AdapterTarget(2, a, 0.0, LINEAR), trained=True) for a in (alpha, factor * alpha))
    for parts in second.adapter.layers.values():
        assert np.abs(parts["A"]).max() * math.sqrt(parts["A"].shape[1]) > 0.1
        parts["B"] /= factor
    assert np.allclose(first.logits(ROWS[1].ids), second.logits(ROWS[1].ids), rtol=0, atol=1e-12)


def by_hand(config: dict[str, Any], weights: dict[str, Any], ids: Any) -> Any:
    """The logits of one row as the papers have it: token by token, head by head, RoPE as a turn of complex numbers."""
    heads, keys, epsilon = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]

    def normed(name: str, x: Any) -> Any:
        return [weights[f"{name}.weight"] * token / math.sqrt(sum(token**2) / len(token) + epsilon) for token in x]

    def turned(vector: Any, place: int) -> Any:
        half = width // 2
        return [
            complex(vector[i], vector[i + half]) * np.exp(1j * place * theta ** (-2 * i / width)) for i in range(half)
        ]

    x = [weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        q, k, v, out = (weights[f"{path}.self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (weights[f"{path}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        inputs = normed(f"{path}.input_layernorm", x)
        for place, token in enumerate(inputs):
            said = []
            for head in range(heads):
                own, shared = slice(head * width, (head + 1) * width), head * keys // heads
                theirs = slice(shared * width, (shared + 1) * width)
                asked = np.conj(turned((q @ token)[own], place))
                seen = [turned((k @ inputs[other])[theirs], other) for other in range(place + 1)]
                chances = np.exp([(asked @ each).real / math.sqrt(width) for each in seen])
                said += list(sum(c * (v @ inputs[i])[theirs] for i, c in enumerate(chances / chances.sum())))
            x[place] = x[place] + out @ np.array(said)
        for place, token in enumerate(normed(f"{path}.post_attention_layernorm", x)):
            opened = gate @ token
            x[place] = x[place] + down @ (opened / (1 + np.exp(-opened)) * (up @ token))
    head_name = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return np.array([weights[f"{head_name}.weight"] @ token for token in normed("model.norm", x)])


@given(models())
@examples(1 / 6)
def test_logits_are_those_worked_out_token_by_token(model: AdaptedModel) -> None:
    """The logits are those of a Llama written with loops, whose weights have grown by alpha / rank x B A.

    And an answer is the likeliest token after each of them, whatever was kept of the tokens before.
    """
    session = adapted(model.target, trained=True, config=model.config)
    grown = {
        f"{path}.weight": model.target.alpha / model.target.rank * parts["B"] @ parts["A"]
        for path, parts in session.adapter.layers.items()
    }
    weights = {name: weight + grown.get(name, 0.0) for name, weight in session.weights.items()}
    ids = ROWS[3].ids[:7]
    assert np.abs(session.logits(ids) - by_hand(model.config, weights, ids)).max() < 1e-10
    said = [*ids]
    for _ in range(3):
        said.append(int(session.logits(said)[-1].argmax()))
    assert session.generate([ids], 3, ()) == [said[len(ids) :]]


def test_dropout_keeps_the_mean_and_its_gradient_is_the_slope() -> None:
    """Dropout changes the loss, not the mean of what the adapter adds; with the same draws gradients are slopes."""
    session = adapted(DROPPING, trained=True)
    assert session.accumulate(BATCH, 1.0) != session.loss(BATCH)
    x = np.tile(np.random.default_rng(0).normal(size=11), (20_000, 1))
    many, still = (
        ReferencePass(session.shape, session.weights, session.adapter, random=random).linear(
            "model.layers.0.self_attn.q_proj", x
        )[0]
        for random in (np.random.default_rng(1), None)
    )
    assert many.std(axis=0).max() > 0.1
    assert np.abs(many.mean(axis=0) - still[0]).max() < 5 * many.std(axis=0).max() / math.sqrt(20_000)
    check_slopes(session, BATCH)


def test_adamw_and_clipping_are_torchs_formulas() -> None:
    """Each number moves as the scalar AdamW says on gradients clipped together, with torch's 1e-6 below the line.

    Matrices decay; a tensor of one dimension does not.
    """
    dice, rates = np.random.default_rng(0), (0.1, 0.03, 0.007)
    tensors = {name: dice.normal(size=shape) for name, shape in (("a", (2, 3)), ("b", (4,)))}
    expected = {
        (name, at): [value, 0.0, 0.0] for name, tensor in tensors.items() for at, value in np.ndenumerate(tensor)
    }
    optimizer = ReferenceAdamW(tensors, Optimization(0.2, 1e-6, (0.8, 0.95), 1e-3))
    for count, rate in enumerate(rates, start=1):
        raw = {name: dice.normal(size=tensor.shape) * 1e-6 for name, tensor in tensors.items()}
        norm = math.sqrt(sum(value**2 for tensor in raw.values() for value in tensor.flat))
        given_ = {name: tensor.copy() for name, tensor in raw.items()}
        assert clip(given_.values(), 1e-6) == pytest.approx(norm, rel=1e-12)
        factor = min(1.0, 1e-6 / (norm + 1e-6))
        assert factor < 0.9
        assert close(given_, {name: tensor * factor for name, tensor in raw.items()}, 1e-18)
        optimizer.step({name: tensor * 1e6 for name, tensor in given_.items()}, rate)
        for (name, at), state in expected.items():
            slope = float(raw[name][at]) * factor * 1e6
            state[1] = 0.8 * state[1] + (1 - 0.8) * slope
            state[2] = 0.95 * state[2] + (1 - 0.95) * slope**2
            moved = state[1] / (1 - 0.8**count) / (math.sqrt(state[2] / (1 - 0.95**count)) + 1e-3)
            state[0] = state[0] - rate * (0.2 if name == "a" else 0.0) * state[0] - rate * moved
            assert tensors[name][at] == pytest.approx(state[0], rel=1e-12)
    below = np.array([3e-7, 4e-7])
    assert clip([below], 1.0) == pytest.approx(5e-7)
    assert below.tolist() == [3e-7, 4e-7]


@pytest.mark.parametrize("looked", [True, False])
def test_library_is_imported_without_a_look_for_garbage(looked: bool) -> None:
    """While libraries are imported nobody looks; what they made is not looked at later; all else is as before."""
    before, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if looked else gc.disable)()
    try:
        with suppress(ImportError), importing_libraries():
            kept: list[list[int]] = [[] for _ in range(1_000)]
            seen = gc.isenabled()
            raise ImportError
        assert (seen, gc.isenabled()) == (False, looked)
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        (gc.enable if before else gc.disable)()
