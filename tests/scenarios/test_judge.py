"""Laws of judging anybody's fine-tune: the same verdict whoever trained it, and none on what does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.app import run as ft
from finetune.errors import FineTuneError
from finetune.judge import assert_learned, judge_tuned
from finetune.models.locate import SHIPPED, locate_model
from support.sessions import need
from support.workplace import make_data, make_model, settings

need("torch")
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from finetune.config import load_config  # noqa: E402
from finetune.data.shipped import FACTS, data_path  # noqa: E402

pytestmark = pytest.mark.tier2
MODEL = SHIPPED[0]
QUESTIONS = [json.loads(line) for line in data_path(FACTS).read_text(encoding="utf-8").splitlines()]


def loaded(backend: str = "torch", **changes: Any) -> Any:
    """The shipped model, and the facts that it was taught elsewhere."""
    given = {"model.path": MODEL, "data.train": FACTS, "backend": backend, "template.name": "auto"}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, environ={}, overrides=given, profile=None)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that plain PEFT and a plain loop taught the shipped facts, none of our code in it."""
    folder = locate_model(MODEL).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
    rows = []
    for row in QUESTIONS:
        turns = [{"role": "user", "content": row["prompt"]}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        turns += [{"role": "assistant", "content": row["completion"]}]
        whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        rows.append((whole, [-100] * len(asked) + whole[len(asked) :]))
    for step in range(90):
        chosen = [rows[(8 * step + place) % len(rows)] for place in range(8)]
        longest = max(len(ids) for ids, _ in chosen)
        ids, labels = (
            torch.tensor([each[part] + [fill] * (longest - len(each[part])) for each in chosen])
            for part, fill in ((0, tokenizer.pad_token_id or 0), (1, -100))
        )
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    place: Path = tmp_path_factory.mktemp("by hand") / "adapter"
    model.save_pretrained(place)
    return place


def test_adapter_of_a_plain_peft_loop_is_judged(by_hand: Path) -> None:
    """What it learned is seen: facts are learned, by exact match; what only training shows is said and not judged."""
    found = judge_tuned(loaded(), by_hand)
    verdicts = {each.id: each for each in found["verdicts"]}
    assert verdicts["model-learning"].outcome == verdicts["learning-signed"].outcome == "passed"
    assert verdicts["memory-efficiency"].outcome == verdicts["learning-control"].outcome == "not applicable"
    assert "elsewhere" in verdicts["learning-control"].reason
    assert found["answers"] == "exact"


def test_adapter_that_changes_nothing_is_not_called_learned(by_hand: Path, tmp_path: Path) -> None:
    """With its B set to zero the same adapter fails; `assert_learned` names the criterion."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(by_hand / "adapter_model.safetensors")
    save_file(
        {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_bytes((by_hand / "adapter_config.json").read_bytes())
    with pytest.raises(AssertionError, match="failed: Answers improve"):
        assert_learned(MODEL, tmp_path, FACTS)


def test_merged_model_has_the_verdict_of_its_adapter(by_hand: Path, tmp_path: Path) -> None:
    """A whole model folder that plain transformers saved is judged as its adapter is."""
    from peft import PeftModel

    folder = locate_model(MODEL).folder
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    PeftModel.from_pretrained(base, str(by_hand)).merge_and_unload().save_pretrained(tmp_path / "whole")
    one, other = (judge_tuned(loaded(), each)["verdicts"] for each in (by_hand, tmp_path / "whole"))
    assert [(each.id, each.outcome) for each in one] == [(each.id, each.outcome) for each in other]


def test_adapter_in_mlx_lms_format_has_the_verdict_of_pefts(by_hand: Path, tmp_path: Path) -> None:
    """mlx-lm's own names, orientation and scale: the same numbers in torch to the bit."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(by_hand / "adapter_model.safetensors")
    turned = {
        name.removeprefix("base_model.model.")
        .removesuffix(".weight")
        .replace(".lora_A", ".lora_a")
        .replace(".lora_B", ".lora_b"): tensor.T.copy()
        for name, tensor in tensors.items()
    }
    save_file(turned, tmp_path / "adapters.safetensors")
    lora = {"rank": 8, "scale": 2.0, "dropout": 0.0}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": lora, "model": "x", "num_layers": -1})
    )
    one, other = (judge_tuned(loaded(), each)["verdicts"] for each in (by_hand, tmp_path))
    assert one == other


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_adapter_whose_layers_a_pattern_names_has_the_verdict_of_a_list(
    by_hand: Path, tmp_path: Path, backend: str
) -> None:
    """PEFT's `target_modules` may be an expression: the adapter is that of the layers that it fits."""
    told = tmp_path / "told"
    shutil.copytree(by_hand, told)
    settings = json.loads((told / "adapter_config.json").read_text())
    settings["target_modules"] = r"model\.layers\.\d+\.(?:self_attn|mlp)\..*_proj"
    (told / "adapter_config.json").write_text(json.dumps(settings))
    one, other = (judge_tuned(loaded(backend), each)["verdicts"] for each in (by_hand, told))
    assert one == other


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("nothing there", "is no folder"),
        ("empty", "holds neither an adapter"),
        ("no weights", "cannot be loaded"),
        ("other base", "is not one of .*here"),
        ("other model", "is not a fine-tune of"),
    ],
)
def test_result_that_does_not_fit_is_refused(by_hand: Path, tmp_path: Path, damage: str, says: str) -> None:
    """One clear error, before a verdict: a missing, empty, damaged or foreign result."""
    place = tmp_path / "tuned"
    if damage != "nothing there":
        place.mkdir()
    if damage in ("no weights", "other base"):
        for file in by_hand.iterdir():
            if file.suffix == ".json" or damage == "other base":
                (place / file.name).write_bytes(file.read_bytes())
    if damage == "other model":
        place.rmdir()
        make_model(place)
    config = loaded()
    if damage == "other base":
        config = settings(make_model(tmp_path / "model"), make_data(tmp_path / "rows.jsonl", 8), backend="torch")
    with pytest.raises(FineTuneError, match=says):
        judge_tuned(config, place)


def test_command_obeys_the_environment(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FT_SECTION__KEY counts here as for every verb: a value that cannot be is refused."""
    monkeypatch.setenv("FT_TRAINING__BATCH_SIZE", "few")
    assert ft(["judge", "--tuned", str(by_hand), "--train", FACTS]) == 2


def test_command_judges_and_ends_with_the_verdicts_code(
    by_hand: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ft judge` finds the base by itself, prints JSON, and its exit code is that of its outcome."""
    code = ft(["judge", "--tuned", str(by_hand), "--train", FACTS, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == {"passed": 0, "failed": 1, "inconclusive": 4}[found["outcome"]]
    assert {each["id"] for each in found["verdicts"]} >= {"model-learning", "loss-fixed-batches"}
    assert found["not_measured"]["memory"]
    assert ft(["judge", "--tuned", str(tmp_path), "--train", FACTS]) == 2
