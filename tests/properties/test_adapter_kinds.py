"""Laws of every kind of adapter by the specification itself: the float64 reference, and what its settings mean."""

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.adapters.choose import check_patterns, check_rank, choose_saved
from finetune.adapters.kinds.dora import DoRA
from finetune.errors import ModelError
from finetune.memory.estimate import adapter_parameters, estimate_memory
from finetune.records import AdapterTarget, ModelShape, Optimization, fits
from finetune_strategies.adapters import AdaptedModel, adapted_layers, layer_names, varied_models, varied_targets
from finetune_strategies.models import llama_configs, model_shapes
from finetune_strategies.profiles import examples
from properties.test_reference_backend import check_slopes
from support.tiny_llamas import BATCH, ROWS, VOCAB, adapted, step, tiny

MODELS = varied_models(llama_configs(vocab_size=VOCAB), dropouts=(0.0, 0.4))
FEW = examples(1 / 3)


@given(MODELS)
@examples(1 / 6)
def test_gradient_of_any_kind_is_the_slope_of_the_loss(model: AdaptedModel) -> None:
    """Each gradient is the slope of the loss: A, B, magnitudes and whole modules; of DoRA with the lengths held."""
    session = adapted(model.target, trained=True, config=model.config)
    lengths, held = DoRA.lengths, {}

    def at_first(kind: DoRA, xp: Any, parts: Any, scale: float, weight: Any) -> Any:
        if id(weight) not in held:
            held[id(weight)] = lengths(kind, xp, parts, scale, weight)
        return held[id(weight)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DoRA, "lengths", at_first)
        check_slopes(session, BATCH)


@given(MODELS)
@FEW
def test_merged_adapter_of_any_kind_computes_the_same(model: AdaptedModel) -> None:
    """A model without an adapter, of the merged weights, has the same logits; DoRA's rows have its lengths."""
    session = adapted(model.target, trained=True, config=model.config)
    merged, wanted = session.merged_weights(), session.logits(ROWS[1].ids)
    for path, parts in session.adapter.layers.items():
        if "m" in parts:
            assert np.allclose(np.linalg.norm(merged[f"{path}.weight"], axis=1), np.abs(parts["m"]), rtol=1e-12)
    session.attach(None, 0)
    session.weights.update(merged)
    assert np.allclose(session.logits(ROWS[1].ids), wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())


@given(model_shapes().flatmap(lambda shape: st.tuples(st.just(shape), varied_targets(shape))))
def test_patterns_give_each_layer_what_the_first_that_fits_says(drawn: tuple[ModelShape, AdapterTarget]) -> None:
    """Rank and alpha of a layer are those of the first pattern that fits all of its path's end, or the common ones."""
    shape, target = drawn
    check_patterns(shape, target)
    check_rank(shape, target)
    for layer in adapted_layers(shape, target):
        rank = target.rank_of(layer.name)
        divisor = math.sqrt(rank) if target.scaling == "rank_stabilized" else rank
        assert target.scale_of(layer.name) == target.alpha_of(layer.name) / divisor
        ends = [layer.name[at:] for at in (0, *(m.end() for m in re.finditer(r"\.", layer.name)))]
        for patterns, common, found in (
            (target.rank_pattern, target.rank, target.rank_of(layer.name)),
            (target.alpha_pattern, target.alpha, target.alpha_of(layer.name)),
        ):
            hit = [value for key, value in patterns.items() if any(re.fullmatch(key, end) for end in ends)]
            assert found == (hit[0] if hit else common)


@given(model_shapes().flatmap(lambda shape: st.tuples(st.just(shape), varied_targets(shape))), st.data())
def test_pattern_that_changes_nothing_is_refused(drawn: tuple[ModelShape, AdapterTarget], data: st.DataObject) -> None:
    """A pattern that fits no layer, only layers without adapter, or none that is left to it, is refused with names."""
    shape, target = drawn
    adapted_names = {layer.name for layer in adapted_layers(shape, target)}
    outside = [layer.name for layer in shape.linear_layers if layer.name not in adapted_names]
    last = next(reversed(target.rank_pattern), None)
    wrong = {"q_prj": "linear layer of", "(": "regular expression", "lm_head": "linear layer of"}
    wrong |= {re.escape(outside[0]): "only others"} if outside else {}
    wrong |= {f"(?:{last})": "never counts"} if last else {}
    pattern = data.draw(st.sampled_from(sorted(wrong)))
    setting = (
        data.draw(st.sampled_from(["rank_pattern", "alpha_pattern"]))
        if wrong[pattern] != "never counts"
        else "rank_pattern"
    )
    bad = replace(target, **{setting: {**getattr(target, setting), pattern: 1}})
    with pytest.raises(ModelError, match=re.escape(wrong[pattern])) as caught:
        check_patterns(shape, bad)
    assert f"adapter.{setting}: {pattern!r}" in caught.value.message
    assert caught.value.hint
    if "fits no" in caught.value.message:
        assert all(name.rsplit(".", 1)[-1] in caught.value.hint for name in adapted_names)


@given(model_shapes(), st.integers(1, 4))
def test_rank_of_a_pattern_above_a_layer_is_refused(shape: ModelShape, more: int) -> None:
    """A rank that is too high for one layer is refused, whichever setting gives it, and that layer is named."""
    layer = min(shape.linear_layers, key=lambda layer: min(layer.shape))
    target = AdapterTarget(
        1, 7.0, 0.0, layer_names(shape), rank_pattern={re.escape(layer.name): min(layer.shape) + more}
    )
    with pytest.raises(ModelError, match=rf"rank_pattern: rank {min(layer.shape) + more} .* {re.escape(layer.name)} "):
        check_rank(shape, target)


@given(model_shapes())
def test_modules_to_save_are_found_by_the_end_of_their_path_or_refused(shape: ModelShape) -> None:
    """A name means whole parts of a path; what nothing has, what gets an adapter or is tied is refused."""
    modules = layer_names(shape)
    norm, inner = (
        ("model.norm", "input_layernorm") if "model.norm.weight" in shape.weights else ("transformer.ln_f", "ln_1")
    )
    assert choose_saved(shape, [norm.rsplit(".", 1)[-1]], modules) == (norm,)
    assert len(choose_saved(shape, [inner], modules)) == shape.layers
    table = "embed_tokens" if norm == "model.norm" else "wte"
    for name, word in (
        (modules[0], "gets an adapter"),
        ("nrm", "matches no module"),
        ("layernorm", "matches no module"),
    ):
        with pytest.raises(ModelError, match=word) as caught:
            choose_saved(shape, [norm, name], modules)
        assert repr(name) in caught.value.message
        assert norm.rsplit(".", 1)[-1] in caught.value.hint or "adapter.target_modules" in caught.value.hint
    for name in (table, "lm_head"):
        if shape.tied_head:
            with pytest.raises(ModelError, match="come apart") as caught:
                choose_saved(shape, [name], modules)
            assert caught.value.hint
        else:
            assert [path.rsplit(".", 1)[-1] for path in choose_saved(shape, [name], modules)] == [name]


@given(model_shapes().flatmap(lambda shape: st.tuples(st.just(shape), varied_targets(shape))))
def test_estimate_counts_every_kind_by_hand(drawn: tuple[ModelShape, AdapterTarget]) -> None:
    """A and B of each layer's own rank, DoRA's outputs, IA3's one side, and whole modules in the format of the base."""
    shape, target = drawn
    turned = shape.architecture == "GPT2LMHeadModel"
    numbers = 0
    for layer in adapted_layers(shape, target):
        outputs, inputs = layer.shape[::-1] if turned else layer.shape
        pair = target.rank_of(layer.name) * (outputs + inputs)
        factors = inputs if layer.name.endswith("down_proj") else outputs
        numbers += {"lora": pair, "dora": pair + outputs, "ia3": factors}[target.kind]
    whole = sum(math.prod(size) for name, size in shape.weights.items() if name.rpartition(".")[0] in target.saved)
    assert adapter_parameters(shape, target) == numbers + whole
    told = estimate_memory(shape, target, "bfloat16")
    assert told.weights == 2 * shape.parameters
    assert (told.adapter, told.gradients, told.optimizer) == tuple(
        each * (4 * numbers + 2 * whole) for each in (1, 1, 2)
    )


@given(MODELS, st.sampled_from([1.0, 4.0, 0.25]))
@FEW
def test_lora_plus_moves_b_by_the_ratio(model: AdaptedModel, ratio: float) -> None:
    """LoRA+: at each step B and what has one dimension move `ratio` times as far as they would, everything else as far.

    AdamW's first step is as long as the learning rate, whatever the gradient: the ratio shows to all digits.
    """
    moves = []
    for each in (1.0, ratio):
        session = tiny(model.config)
        session.attach(replace(model.target, dropout=0.0), 3)
        session.prepare_updates(Optimization(0.0, 1.0, loraplus_lr_ratio=each))
        before = {name: tensor.copy() for name, tensor in session.trainable.items()}
        step(session)
        moves.append({name: tensor - before[name] for name, tensor in session.trainable.items()})
    for name, plain in moves[0].items():
        fast = ".lora_B." in name or plain.ndim == 1
        assert np.allclose(moves[1][name], (ratio if fast else 1.0) * plain, rtol=1e-9, atol=1e-15), name
        assert np.abs(plain).max() > 0 or ".lora_A." in name


def test_fits_is_the_end_of_a_path_from_a_dot_on() -> None:
    """`proj` is not the end of `q_proj`, nor is `layers.1` that of `layers.11`; alternatives count as one pattern."""
    assert fits("q_proj", "model.layers.1.self_attn.q_proj")
    assert not fits("proj", "model.layers.1.self_attn.q_proj")
    assert not fits("1.self_attn.q_proj", "model.layers.11.self_attn.q_proj")
    assert fits("q_proj|v_proj", "a.v_proj")
    assert not fits("self_attn", "a.self_attn.v_proj")
