"""Laws of every kind of adapter in torch and MLX: optimizer groups, patterns, resuming and files."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

from finetune.errors import ModelError  # noqa: E402
from finetune.evidence.reload import check_reload  # noqa: E402
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, TokenizedRow  # noqa: E402
from support import tiny_mlx, tiny_models  # noqa: E402
from support.tiny_models import MODULES, batches_of, make_rows, step  # noqa: E402

pytestmark = pytest.mark.tier2
OPENERS: dict[str, Callable[..., Any]] = {"torch": tiny_models.open_session, "mlx": tiny_mlx.open_session}
NORM = {"llama": "model.norm", "gpt2": "transformer.ln_f"}
ROWS = make_rows(7)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def location(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelLocation:
    """A tiny Llama whose head is not tied, and a tiny GPT-2 whose head is."""
    changes = tiny_models.NO_DROPOUT if request.param == "gpt2" else {}
    return tiny_models.make_model(request.param, tmp_path_factory.mktemp(request.param), **changes)


def kinds(location: ModelLocation) -> dict[str, AdapterTarget | None]:
    """One of each kind, with dropout where there is an adapter."""
    plain = AdapterTarget(3, 7.0, 0.3, MODULES[location.name])
    first = MODULES[location.name][0]
    return {
        "lora": replace(plain, scaling="rank_stabilized", rank_pattern={first: 2}, alpha_pattern={".*": 5.0}),
        "dora": replace(plain, kind="dora"),
        "ia3": AdapterTarget(1, 1.0, 0.0, MODULES[location.name], kind="ia3"),
        "saved": replace(plain, kind="dora", saved=(NORM[location.name],)),
        "full": None,
    }


def trained(backend: str, location: ModelLocation, target: AdapterTarget | None) -> Any:
    """A session that has gone a few steps."""
    session = OPENERS[backend](location)
    session.attach(target, 4)
    session.prepare_updates(Optimization(weight_decay=0.05, max_grad_norm=1.0, loraplus_lr_ratio=3.0))
    for number in range(2):
        step(session, batches_of(make_rows(5, seed=number), 2), 0.02)
    return session


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_torch_moves_tensors_as_pefts_lora_plus_does(location: ModelLocation, ratio: float) -> None:
    """Each tensor has the learning rate that PEFT's own LoRA+ optimizer gives it; matrices decay, others do not."""
    from peft.optimizers import create_loraplus_optimizer

    for name, target in kinds(location).items():
        if target is None or target.kind == "ia3":  # LoRA+ is not said of it
            continue
        session = OPENERS["torch"](location)
        session.attach(target, 0)
        session.prepare_updates(Optimization(0.07, 1.0, loraplus_lr_ratio=ratio))
        session.update(0.01)
        theirs = create_loraplus_optimizer(session.model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=ratio)
        rates, wanted = (
            {id(tensor): group["lr"] for group in optimizer.param_groups for tensor in group["params"]}
            for optimizer in (session.optimizer, theirs)
        )
        assert rates.keys() == wanted.keys(), name
        assert rates == pytest.approx(wanted, rel=1e-12), name
        assert len(set(rates.values())) == (1 if ratio == 1.0 else 2)
        decays = {
            tensor.ndim > 1: group["weight_decay"]
            for group in session.optimizer.param_groups
            for tensor in group["params"]
        }
        assert decays == {True: 0.07, **({False: 0.0} if target.kind == "dora" else {})}


def test_order_of_patterns_survives_the_file(location: ModelLocation, tmp_path: Path) -> None:
    """Where two patterns fit one layer, the first counts in the session and in the file, though PEFT sorts by name."""
    first, second = MODULES[location.name][:2]
    patterns = {f"1.*{second}": 1, f".*{second}": 2, f".*{first}": 3}
    assert list(patterns) != sorted(patterns)
    target = AdapterTarget(
        2, 7.0, 0.0, MODULES[location.name], alpha_pattern={key: 4.0 * rank for key, rank in patterns.items()}
    )
    session = trained("torch", location, target)
    session.save_adapter(tmp_path)
    assert list(json.loads((tmp_path / "adapter_config.json").read_text())["alpha_pattern"]) == list(patterns)
    layers = {name: module for name, module in session.model.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) >= 4
    for name, module in layers.items():
        assert module.scaling["default"] == target.scale_of(name.removeprefix("base_model.model.")), name
    assert len({module.scaling["default"] for module in layers.values()}) >= 3
    for backend, opener in OPENERS.items():
        again = opener(location)
        again.load_adapter(tmp_path)
        assert again.loss(Batch(ROWS)) == pytest.approx(session.loss(Batch(ROWS)), rel=1e-5), backend


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "saved", "full"])
@pytest.mark.parametrize("backend", list(OPENERS))
def test_resume_of_every_kind_is_the_same_run(location: ModelLocation, backend: str, kind: str, tmp_path: Path) -> None:
    """P-RESUME: stopped and continued in a fresh session, all of the state is the same to the byte."""
    session = trained(backend, location, kinds(location)[kind])
    (tmp_path / "half").mkdir()
    session.save_state(tmp_path / "half")
    # One after the other: torch's random state belongs to the process.
    step(session, batches_of(ROWS, 3), 0.02)
    (tmp_path / "0").mkdir()
    session.save_state(tmp_path / "0")
    other = trained(backend, location, kinds(location)[kind])
    step(other, batches_of(ROWS, 3), 0.5)
    other.load_state(tmp_path / "half")
    step(other, batches_of(ROWS, 3), 0.02)
    (tmp_path / "1").mkdir()
    other.save_state(tmp_path / "1")
    files = [{path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()} for number in (0, 1)]
    assert files[0] == files[1]
    assert session.fingerprints() == other.fingerprints()


@pytest.mark.parametrize("kind", ["dora", "ia3", "saved", "full"])
@pytest.mark.parametrize("backend", list(OPENERS))
def test_what_was_saved_works_in_a_fresh_process(
    location: ModelLocation, backend: str, kind: str, tmp_path: Path
) -> None:
    """P-ART: a fresh process without our loading code finds the same logits, and not the base's."""
    session = trained(backend, location, kinds(location)[kind])
    session.check_saving()
    session.save_model(tmp_path) if kind == "full" else session.save_adapter(tmp_path)
    found = check_reload(backend, session, location, tmp_path, prompts=[ROWS[1].ids, ROWS[3].ids], dtype="float32")
    assert found.difference <= 1e-4 * found.largest_logit
    assert found.difference_from_base > 1e-3 * found.largest_logit
    if kind == "full":
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        theirs = tiny_models.open_session(ModelLocation("whole", tmp_path, "local"))
        assert theirs.loss(Batch(ROWS)) == pytest.approx(session.loss(Batch(ROWS)), rel=1e-5)
        assert sum(tensor.numel() for tensor in plain.parameters()) > 1000


@pytest.mark.parametrize("backend", list(OPENERS))
def test_full_training_moves_every_weight_that_has_a_gradient(location: ModelLocation, backend: str) -> None:
    """Each tensor has a gradient and changes, and nothing else is there to stay."""
    session = OPENERS[backend](location)
    session.attach(None, 0)
    session.prepare_updates(Optimization(0.0, 1.0))
    before = copy.copy(session.fingerprints())
    session.accumulate(Batch(ROWS), 0.1)
    assert all(norm > 0 for norm in session.gradient_norms().values())
    session.update(0.01)
    after = session.fingerprints()
    assert before.keys() == after.keys() == set(session.trainable_names())
    assert all(after[name] != before[name] for name in before)


def test_adapter_that_mlx_lms_format_has_no_place_for_is_refused(location: ModelLocation, tmp_path: Path) -> None:
    """mlx-lm's format knows one rank and one scale; DoRA and rsLoRA fit into it, and mlx-lm loads them."""
    from mlx_lm.tuner.utils import load_adapters

    from finetune.backends.mlx.adapter import write_mlx_adapter

    blocks = 2
    for kind in ("lora", "saved", "ia3"):
        with pytest.raises(ModelError, match="no place for"):
            write_mlx_adapter(trained("mlx", location, kinds(location)[kind]).adapter, "base", blocks, tmp_path)
    plain = replace(kinds(location)["dora"], scaling="rank_stabilized", dropout=0.0)  # type: ignore[type-var]
    session = trained("mlx", location, plain)
    write_mlx_adapter(session.adapter, "base", blocks, tmp_path)
    alone = tiny_mlx.open_session(location)
    load_adapters(alone.loaded.model, str(tmp_path)).eval()
    again = tiny_mlx.open_session(location)
    again.load_adapter(tmp_path)
    prompts = [list(row.ids) for row in ROWS]
    assert tiny_mlx.furthest(tiny_mlx.logits_of(alone, prompts), tiny_mlx.logits_of(session, prompts)) < 1e-4
    assert tiny_mlx.equal(tiny_mlx.logits_of(again, prompts), tiny_mlx.logits_of(session, prompts))


def test_word_that_pads_is_trained_where_rows_hold_it(location: ModelLocation) -> None:
    """The padding word of a row's own, such as one that ends answers too, has a gradient; as padding it has none."""
    session = OPENERS["torch"](location)
    session.attach(None, 0)
    table = session.model.get_input_embeddings().weight
    found = []
    for first in (0, 5):
        session.model.zero_grad()
        rows = [TokenizedRow((first, 7), (False, True), "short"), TokenizedRow((8, 9, 10, 11), (True,) * 4, "long")]
        session.accumulate(Batch(tuple(rows)), 1.0)
        found.append(table.grad[0].abs().max().item())
    tied = session.model.get_output_embeddings().weight is table  # a head's gradient reaches every word
    assert found[0] > (2 * found[1] if tied else 0)
    assert tied or found[1] == 0
