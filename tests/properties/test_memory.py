"""Laws of the exact parts: each is a hand count of what is certain, and grows with whatever makes a run larger."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.memory.estimate import adapter_parameters, estimate_memory
from finetune.records import AdapterTarget, LinearLayer, ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
PARTS = ("weights", "adapter", "gradients", "optimizer", "total")


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Models of a few blocks; matrices are not square, and the blocks not alike."""
    layers = tuple(
        LinearLayer(f"model.layers.{block}.{name}", (draw(st.integers(3, 90)), draw(st.integers(3, 90))))
        for block in range(draw(st.integers(1, 3)))
        for name in ("attn.q_proj", "attn.kv_proj", "mlp.q_proj_up")
    )
    rest = draw(st.integers(1, 10_000))
    numbers = sum(layer.shape[0] * layer.shape[1] for layer in layers) + rest
    return ModelShape("TestForCausalLM", numbers, 97, 20, 2, 40, layers)


def targets() -> st.SearchStrategy[AdapterTarget]:
    """Adapters on one, some or all of the layers."""
    modules = st.lists(st.sampled_from(["q_proj", "kv_proj", "q_proj_up"]), min_size=1, unique=True).map(tuple)
    return st.builds(AdapterTarget, st.integers(1, 9), st.just(16.0), st.just(0.0), modules)


def dtypes() -> st.SearchStrategy[str]:
    """The types a base can have."""
    return st.sampled_from(sorted(BYTES))


@given(shapes(), dtypes())
def test_estimate_full_is_a_hand_count(shape: ModelShape, dtype: str) -> None:
    """Every number of the model with its gradient and two moments, all in the model's own type, and no adapter."""
    found = estimate_memory(shape, None, dtype)
    size = shape.parameters * BYTES[dtype]
    assert (found.weights, found.adapter, found.gradients, found.optimizer) == (size, 0, size, 2 * size)
    assert found.trainable_parameters == shape.parameters


@given(shapes(), targets(), dtypes())
def test_estimate_total_is_the_sum_of_its_parts(shape: ModelShape, target: AdapterTarget, dtype: str) -> None:
    """The total is what the parts add up to."""
    for found in (estimate_memory(shape, target, dtype), estimate_memory(shape, None, dtype)):
        assert found.total == sum(getattr(found, part) for part in PARTS if part != "total")


@given(shapes(), targets(), dtypes(), st.floats(0.5, 99), st.floats(0, 0.9))
def test_estimate_alpha_and_dropout_cost_nothing(
    shape: ModelShape, target: AdapterTarget, dtype: str, alpha: float, dropout: float
) -> None:
    """Scale and dropout are not tensors."""
    other = dataclasses.replace(target, alpha=alpha, dropout=dropout)
    assert estimate_memory(shape, other, dtype) == estimate_memory(shape, target, dtype)


@given(shapes(), targets(), dtypes())
def test_estimate_lora_trains_less_when_it_is_smaller(shape: ModelShape, target: AdapterTarget, dtype: str) -> None:
    """LoRA needs less than full fine-tuning exactly when the adapter with its four copies is below the base's three."""
    lora, full = estimate_memory(shape, target, dtype), estimate_memory(shape, None, dtype)
    adapter = 4 * max(4, BYTES[dtype]) * lora.trainable_parameters
    assert (lora.total < full.total) == (adapter < 3 * BYTES[dtype] * shape.parameters)


def test_estimate_a_name_within_a_name_is_not_hit() -> None:
    """A target is a whole name: `q_proj` adapts neither `q_proj_up` nor a folder called so."""
    layers = (LinearLayer("a.q_proj_up", (3, 5)), LinearLayer("q_proj.other", (3, 5)), LinearLayer("b.q_proj", (7, 2)))
    shape = ModelShape("Test", 1000, 97, 20, 1, 40, layers)
    assert adapter_parameters(shape, AdapterTarget(2, 4.0, 0.0, ("q_proj",))) == 2 * (7 + 2)


@pytest.mark.parametrize("dtype", ["float16", "int8", ""])
def test_estimate_guesses_no_unknown_type(dtype: str) -> None:
    """A type whose size is not known has no estimate."""
    with pytest.raises(KeyError):
        estimate_memory(ModelShape("Test", 1, 1, 1, 1, 1, ()), None, dtype)
