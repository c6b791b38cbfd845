"""Laws of torch's fast paths: folded adapters, loss by slices, batches without a mask say what the plain ways say."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.sessions import CONTEXT, MODULES, NO_DROPOUT, Bench, batches_of, make_model, make_rows, need

need("torch")
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from finetune.backends.torch import head_loss  # noqa: E402
from finetune.backends.torch.lora_linear import FoldedLinear, fold_adapters  # noqa: E402
from finetune.records import Batch  # noqa: E402
from finetune_strategies.profiles import examples  # noqa: E402

pytestmark = pytest.mark.tier2


def plain_losses(bench: Bench, batches: list[Batch], rate: float) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a loop as anybody would write it with transformers and PEFT."""
    target = bench.target()
    model = transformers.AutoModelForCausalLM.from_pretrained(bench.location.folder)
    torch.manual_seed(0)
    conv = bench.kind == "gpt2"
    config = peft.LoraConfig(
        r=target.rank,
        lora_alpha=target.alpha,
        target_modules=list(MODULES[bench.kind]),
        fan_in_fan_out=conv,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    told = []
    for batch in batches:
        length = max(len(row.ids) for row in batch.rows)
        ids, mask = torch.zeros(len(batch.rows), length, dtype=torch.long), torch.zeros(len(batch.rows), length)
        labels = torch.full_like(ids, -100)
        for index, row in enumerate(batch.rows):
            size = len(row.ids)
            ids[index, :size], mask[index, :size] = torch.tensor(row.ids), 1
            labels[index, :size] = torch.where(torch.tensor(row.trained), ids[index, :size], -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told.append((float(loss.detach()), float(norm)))
    return told


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fifty_steps_are_those_of_a_plain_loop(kind: str, tmp_path: Path) -> None:
    """Loss and gradient norm of each of 50 steps are a hand-written loop's within 1e-5, and do not drift from them."""
    bench = make_model(f"torch-{kind}", tmp_path, **(NO_DROPOUT if kind == "gpt2" else {}))
    batches = batches_of(make_rows(5 * 50, seed=3), 5)
    assert any(len({len(row.ids) for row in batch.rows}) > 1 for batch in batches)
    session = bench.adapted()
    assert sum(isinstance(module, FoldedLinear) for module in session.model.modules()) > 3
    ours = []
    for batch in batches:
        loss = session.accumulate(batch, 1 / batch.target_count) / batch.target_count
        ours.append((loss, session.clip_gradients()))
        session.update(0.002)
    theirs = plain_losses(bench, batches, 0.002)
    assert len(ours) == len(theirs) == 50
    assert [value for step in ours for value in step] == pytest.approx([v for step in theirs for v in step], rel=1e-5)
    drift = sum(mine[0] - other[0] for mine, other in zip(ours, theirs, strict=True)) / 50
    assert abs(drift) < 1e-6 * sum(loss for loss, _ in theirs) / 50


SIZES = st.sampled_from((1, 2, 3, 5, 7, 11))


@given(
    st.tuples(SIZES, SIZES, SIZES, SIZES), st.booleans(), st.booleans(), st.sampled_from((0.0, 0.4)), st.integers(0, 9)
)
def test_folded_layer_is_pefts(
    sizes: tuple[int, int, int, int], turned: bool, biased: bool, dropout: float, seed: int
) -> None:
    """Output and every gradient are those of PEFT's layer, in each shape, both ways round, with dropout and without."""
    inputs, outputs, rank, tokens = sizes
    torch.manual_seed(seed)
    if turned:
        base: Any = transformers.pytorch_utils.Conv1D(outputs, inputs)
        torch.nn.init.normal_(base.bias)
    else:
        base = torch.nn.Linear(inputs, outputs, bias=biased)
    model = torch.nn.ModuleDict({"layer": base}).double().requires_grad_(requires_grad=False)
    config = peft.LoraConfig(
        r=rank, lora_alpha=3, lora_dropout=dropout, target_modules=["layer"], fan_in_fan_out=turned
    )
    peft.inject_adapter_in_model(config, model)
    layer = model["layer"].double()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, tokens, inputs, dtype=torch.float64, requires_grad=True)
    out = torch.randn(2, tokens, outputs, dtype=torch.float64)

    def run() -> list[Any]:
        torch.manual_seed(seed)
        wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        value = layer(x)
        return [value, *torch.autograd.grad(value, wanted, out)]

    theirs = run()
    fold_adapters(model)
    assert type(layer) is FoldedLinear
    for mine, other in zip(run(), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    layer(x.detach()).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None


@pytest.mark.parametrize("how", ["disabled", "merged", "bfloat16", "bfloat16 throughout"])
def test_folded_layer_leaves_to_peft_what_it_does_not_know(how: str, tmp_path: Path) -> None:
    """Without the adapter, merged, or in half precision, a layer says exactly what PEFT's says."""
    bench = make_model("torch-llama", tmp_path)
    session = bench.trained(dtype="bfloat16" if how.startswith("bfloat16") else "float32")
    if how == "bfloat16 throughout":
        session.model.to(torch.bfloat16)
    batch = Batch(make_rows(4))
    folded = [module for module in session.model.modules() if isinstance(module, FoldedLinear)]
    if how == "merged":
        session.model.merge_adapter()
    with session.adapter_disabled() if how == "disabled" else contextlib.nullcontext():
        ours = float(session._loss(batch).detach())
        for module in folded:
            module.__class__ = peft.tuners.lora.layer.Linear
        assert float(session._loss(batch).detach()) == ours
    if how == "disabled":
        assert ours == bench.open().loss(batch)


def test_folded_layer_is_for_training_alone(tmp_path: Path) -> None:
    """Asked without gradients, an adapted model answers with PEFT's own numbers to the last bit."""
    session = make_model("torch-llama", tmp_path).trained()
    batch = Batch(make_rows(4))
    trained, asked = session.accumulate(batch, 1.0), session.loss(batch)
    for module in session.model.modules():
        if isinstance(module, FoldedLinear):
            module.__class__ = peft.tuners.lora.layer.Linear
    assert session.loss(batch) == asked == pytest.approx(trained, rel=1e-5)


@given(SIZES, st.integers(1, 40), SIZES, st.booleans(), st.integers(0, 9))
@examples(1 / 2)
def test_loss_by_slices_is_cross_entropy(width: int, words: int, tokens: int, biased: bool, seed: int) -> None:
    """However the tokens are sliced, the loss and its gradient are those of the whole table of logits."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(width, words, bias=biased).double().requires_grad_(requires_grad=False)
    hidden = (5 * torch.randn(tokens, width, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(words, (tokens,))
    whole = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(3 * whole, hidden)[0]
    for size in (1, 2, tokens + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_loss, "SLICE_BYTES", 8 * words * size)
            loss = head_loss.head_losses(hidden, head, targets)
            assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-12, abs=1e-12)
            torch.testing.assert_close(torch.autograd.grad(3 * loss, hidden)[0], wanted, rtol=1e-10, atol=1e-12)
            with torch.no_grad():
                again = float(head_loss.head_losses(hidden, head, targets))
                assert again == float(loss.detach())


AFTER_THE_HEAD = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
}


@pytest.mark.parametrize("kind", AFTER_THE_HEAD)
def test_logits_that_are_changed_after_the_head_are_not_sliced(kind: str, tmp_path: Path) -> None:
    """A model that caps or scales its logits is trained on what it says, not on what its head says."""
    bench = make_model("torch-llama", tmp_path, model_type=kind, **AFTER_THE_HEAD[kind])
    session = bench.open()
    row = make_rows(2)[1]
    assert head_loss.find_head(session.model) is None
    with torch.no_grad():
        logits = session.model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
    here = torch.tensor(row.trained[1:])
    wanted = torch.nn.functional.cross_entropy(logits[here], torch.tensor(row.ids[1:])[here], reduction="sum")
    assert session.loss(Batch((row,))) == pytest.approx(float(wanted), rel=1e-5)


def test_plain_head_is_sliced_only_while_it_is_frozen(tmp_path: Path) -> None:
    """A head that learns gets its gradient: the loss is taken from a table of logits then."""
    session = make_model("torch-llama", tmp_path / "one").adapted()
    assert session._head is session.model.get_output_embeddings()
    assert head_loss.is_frozen(session._head, session.model)
    session._head.weight.requires_grad_(requires_grad=True)
    assert not head_loss.is_frozen(session._head, session.model)
    batch = Batch(make_rows(3))
    session.accumulate(batch, 1.0)
    assert float(session._head.weight.grad.norm()) > 0
    with torch.no_grad():
        assert head_loss.is_frozen(session._head, session.model)
    adapted_head = make_model("torch-llama", tmp_path / "two").open()
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    adapted_head.model = peft.get_peft_model(adapted_head.model, config)
    assert adapted_head._head is None


# As they say it themselves: what each family calls its sizes, where Llama's names are not known to it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 5},
    "phi3": {},
    "bloom": {"n_head": 4, "n_layer": 2},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24},
    "gpt2": {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT, **NO_DROPOUT},
    "gpt_neox": {},
    "gptj": {"n_embd": 24, "n_head": 4, "n_layer": 2, "rotary_dim": 6},
    "mixtral": {"num_local_experts": 3},
    "olmo2": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 5},
    "mamba": {"state_size": 4},
    "mpt": {"d_model": 24, "n_heads": 4, "n_layers": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 5},
}
SIZED = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_in_a_batch_are_as_alone_in_every_family(family: str, tmp_path: Path) -> None:
    """Rows of unequal lengths have together the loss that they have alone, in 19 families, without a mask."""
    assert len(FAMILIES) == 19
    bench = make_model("torch-llama", tmp_path, model_type=family, **{**SIZED, **FAMILIES[family]})
    session = bench.open()
    rows = make_rows(5)
    assert len({len(row.ids) for row in rows}) == 5
    alone = [session.loss(Batch((row,))) for row in rows]
    assert session.loss(Batch(rows)) == pytest.approx(sum(alone), rel=2e-5)
    assert max(alone) > 2 * min(alone)
