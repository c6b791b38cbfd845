"""Laws of two backends: MLX computes, trains and saves what torch with transformers and PEFT does."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("transformers", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune.adapters.choose import choose_layers  # noqa: E402
from finetune.backends import open_backend  # noqa: E402
from finetune.models.locate import locate_model  # noqa: E402
from finetune.models.shape import read_shape  # noqa: E402
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization  # noqa: E402
from support.tiny_mlx import IDS, gradients, logits_of, open_session, set_weights  # noqa: E402
from support.tiny_models import CONFIGS, NO_DROPOUT, batches_of, make_rows  # noqa: E402
from support.tolerances import apart  # noqa: E402

pytestmark = pytest.mark.tier2
ROWS = make_rows(7)
SIZES: dict[str, Any] = {
    **IDS,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# How far the logits may be apart, as a share of the largest. mlx-lm computes Gemma's and StarCoder's GELU by another
# formula than transformers does, and rounds the scale of Gemma 3's embeddings to bfloat16.
ARCHITECTURES: dict[str, tuple[dict[str, Any], float]] = {
    "llama": ({"rope_parameters": LLAMA3}, 1e-5),
    "mistral": ({"sliding_window": 6}, 1e-5),
    "qwen2": ({"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, 1e-5),
    "qwen3": ({}, 1e-5),
    "gemma": ({}, 3e-4),
    "gemma2": ({"sliding_window": 7}, 1e-5),
    "gemma3_text": (
        {
            "head_dim": 6,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
        3e-3,
    ),
    "phi3": ({}, 1e-5),
    "phi": ({"hidden_size": 32}, 1e-5),
    "granite": ({"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}, 1e-5),
    "cohere": ({"logit_scale": 0.3}, 1e-5),
    "cohere2": ({"num_hidden_layers": 4, "sliding_window": 5}, 1e-5),
    "olmo2": ({}, 1e-5),
    "smollm3": ({}, 1e-5),
    "glm4": ({}, 1e-5),
    "starcoder2": ({}, 5e-4),
    "stablelm": ({"hidden_size": 64}, 1e-5),
    "nemotron": ({"hidden_size": 32}, 1e-5),
    "ernie4_5": ({}, 1e-5),
    "seed_oss": ({}, 1e-5),
}


@pytest.fixture(scope="module", params=["gpt2", "reference-gpt2", "llama"])
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """A tiny GPT-2 and a tiny Llama that torch made, and the shipped GPT-2."""
    if request.param == "reference-gpt2":
        return locate_model(request.param)
    folder = tmp_path_factory.mktemp("model")
    config = {**IDS, **CONFIGS[request.param], **(NO_DROPOUT if request.param == "gpt2" else {})}
    open_backend("torch").create(config, folder, 5)
    return ModelLocation(request.param, folder, "local")


def open_both(location: ModelLocation) -> tuple[Any, Any]:
    """The model in torch and in MLX."""
    return open_backend("torch").open(location, "float32", 0), open_session(location)


def attach_both(theirs: Any, session: Any, *, trained: bool = True) -> None:
    """The same adapter on both, B zero or not."""
    target = AdapterTarget(3, 7.0, 0.0, choose_layers(read_shape(session.location.folder), "all-linear"))
    theirs.attach(target, 0)
    session.attach(target, 1)
    dice = np.random.default_rng(4)
    named = {name: value for name, value in theirs.model.named_parameters() if value.requires_grad}
    assert set(named) == set(session.trainable_names())
    with torch.no_grad():
        for value in named.values() if trained else ():
            value += torch.from_numpy(dice.normal(0, 0.1, value.shape).astype(np.float32))
    set_weights(session, {name: value.detach().numpy() for name, value in named.items()})


def torch_logits(session: Any, ids: tuple[int, ...]) -> Any:
    """The logits after each token, in torch."""
    session.model.eval()
    with torch.no_grad():
        return session.model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures_agree(kind: str, tmp_path: Path) -> None:
    """What opens computes what transformers computes, scales, caps and windows included, under the same names."""
    assert len(ARCHITECTURES) == 20
    changes, tolerance = ARCHITECTURES[kind]
    open_backend("torch").create(copy.deepcopy({**SIZES, "model_type": kind, **changes}), tmp_path, 5)
    theirs, session = open_both(ModelLocation(kind, tmp_path, "local"))
    context = session.forward_pass.sizes.context
    assert context == (changes["sliding_window"] if kind in ("mistral", "qwen2", "gemma2") else 40)
    ids = ROWS[3].ids[:context]
    assert apart(logits_of(session, [ids])[0], torch_logits(theirs, ids)) < tolerance
    assert session.fingerprints().keys() == theirs.fingerprints().keys()
    rows = Batch(tuple(row for row in ROWS if len(row.ids) <= context))
    assert session.loss(rows) == pytest.approx(theirs.loss(rows), rel=max(2e-5, tolerance))


def test_logits_losses_and_gradients_agree(location: ModelLocation) -> None:
    """Logits, loss on padded batches and the gradient of each LoRA tensor are torch's; so with every weight free."""
    for full in (False, True):
        theirs, session = open_both(location)
        if full:
            theirs.attach(None, 0), session.attach(None, 0)
        else:
            attach_both(theirs, session)
        assert apart(logits_of(session, [ROWS[1].ids])[0], torch_logits(theirs, ROWS[1].ids)) < 1e-5
        for batch in batches_of(ROWS, 3):
            assert session.accumulate(batch, 0.2) == pytest.approx(theirs.accumulate(batch, 0.2), rel=1e-5)
        wanted = {name: value.grad.numpy() for name, value in theirs.model.named_parameters() if value.grad is not None}
        found = gradients(session)
        assert found.keys() == wanted.keys()
        assert session.gradient_norms() == pytest.approx(theirs.gradient_norms(), rel=1e-4)
        turned = {name: found[name] if found[name].shape == wanted[name].shape else found[name].T for name in wanted}
        square = {name for name in wanted if full and location.name != "llama" and name.endswith("attn.c_proj.weight")}
        differences = {name: apart(turned[name].T if name in square else turned[name], wanted[name]) for name in wanted}
        assert {name: share for name, share in differences.items() if share > 1e-4} == {}


def test_training_goes_the_same_way(location: ModelLocation) -> None:
    """Twenty steps from one adapter: the loss and gradient norm of each agree."""
    told: list[list[float]] = []
    both = open_both(location)
    attach_both(*both, trained=False)
    for session in both:
        session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0))
        told.append([])
        for number in range(20):
            batch = Batch(make_rows(6, seed=number % 4))
            told[-1] += [session.accumulate(batch, 1 / batch.target_count), session.clip_gradients()]
            session.update(0.003)
    assert told[1] == pytest.approx(told[0], rel=3e-4)
    assert told[0][-2] < 0.9 * told[0][8]


def test_greedy_answers_agree(location: ModelLocation) -> None:
    """Both say the same words after the same prompts."""
    theirs, session = open_both(location)
    attach_both(theirs, session)
    prompts = [list(row.ids) for row in ROWS]
    assert session.generate(prompts, 8, [2]) == theirs.generate(prompts, 8, [2])


def test_adapters_are_exchanged_through_disk(location: ModelLocation, tmp_path: Path) -> None:
    """PEFT loads what MLX saved and MLX what PEFT saved, with the same logits."""
    theirs, session = open_both(location)
    attach_both(theirs, session)
    for name, writer in {"torch": theirs, "mlx": session}.items():
        (tmp_path / name).mkdir()
        writer.save_adapter(tmp_path / name)
        fresh = open_both(location)
        for reader in fresh:
            reader.load_adapter(tmp_path / name)
        wanted = torch_logits(theirs, ROWS[1].ids)
        assert apart(torch_logits(fresh[0], ROWS[1].ids), wanted) < 1e-5
        assert apart(logits_of(fresh[1], [ROWS[1].ids])[0], wanted) < 1e-5


def test_models_are_exchanged_through_disk(location: ModelLocation, tmp_path: Path) -> None:
    """A model that MLX saved with the adapter merged, or made itself, transformers opens: the same logits."""
    theirs, session = open_both(location)
    attach_both(theirs, session)
    session.save_model(tmp_path)
    merged = open_backend("torch").open(ModelLocation("merged", tmp_path, "local"), "float32", 0)
    assert apart(torch_logits(merged, ROWS[1].ids), torch_logits(theirs, ROWS[1].ids)) < 1e-5
    if location.name != "reference-gpt2":
        (tmp_path / "made").mkdir()
        open_backend("mlx").create({**IDS, **CONFIGS[location.name], **NO_DROPOUT}, tmp_path / "made", 3)
        made = open_both(ModelLocation("made", tmp_path / "made", "local"))
        assert apart(logits_of(made[1], [ROWS[1].ids])[0], torch_logits(made[0], ROWS[1].ids)) < 1e-5
