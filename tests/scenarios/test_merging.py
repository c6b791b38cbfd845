"""Merged models are what was trained, for any program that reads them; where one is not, nothing of it stays."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from finetune.backends import open_backend
from finetune.errors import ExportError
from finetune.evidence.answering import following_of
from finetune.evidence.baseline import Baseline, compute_baseline
from finetune.evidence.drift import InferenceResponse, problems
from finetune.export import merge as merging
from finetune.export.merge import merge
from finetune.export.merged_folder import merged_problems, plan_weights, write_merged, written_weights
from finetune.export.model_files import ModelFiles
from finetune.export.result import Result, open_result
from finetune.export.rounded import RoundingBounds
from support.processes import ft
from support.tiny_runs import KINDS, tiny_model, tiny_run

pytestmark = [pytest.mark.tier2, pytest.mark.usefixtures("warm_children")]
FAMILIES = [kind for kind in KINDS if kind not in ("rank-stabilized", "dora on llama")]
"""Kinds of runs, each on another model where it can be."""


def truth_of(result: Result) -> Baseline:
    """What the trainer answers to the run's questions and to plain text."""
    return compute_baseline(result.open(), result.prompts(), 6, result.encoder.stop_ids, 128)


def bounds_of(result: Result, baseline: Baseline) -> RoundingBounds:
    """How far another computation may be off."""
    return result.bounds(baseline.session, baseline.sequences)


def through_transformers(folder: Path, baseline: Baseline) -> InferenceResponse:
    """What plain transformers makes of a folder, its own settings deciding where answers end."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked, ids, rows = baseline.request, [], []
    with torch.no_grad():
        for prompt, steps in zip(asked.prompts, asked.steps, strict=True):
            asked_for = {"max_new_tokens": steps, "do_sample": False}
            told = model.generate(torch.tensor([prompt]), **asked_for)[0, len(prompt) :].tolist() if steps else []
            ids.append(told)
        for place in asked.places:
            rows.append(model(input_ids=torch.tensor([asked.sequence(place)])).logits[0, -1].numpy())
    return InferenceResponse(asked.cut(ids), following_of(rows))


def write(result: Result, folder: Path, dtype: Any = None) -> ModelFiles:
    """The run's result as a folder, not yet examined."""
    folder.mkdir()
    weights = plan_weights(result, dtype)
    write_merged(result, weights, folder)
    return weights


def spoil_one_weight(path: Path) -> None:
    """Add a little to one number."""
    weights = load_file(path)
    name = next(name for name in sorted(weights) if name.endswith("down_proj.weight"))
    weights[name][0, 0] += 0.5
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("kind", FAMILIES)
def test_merged_model_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    """Of each of 8 kinds, plain transformers says the same from disk, and not what the base says.

    The tokenizer gives the ids of the run's, untouched weights keep their bytes, and nothing of the sources moves.
    """
    assert len(FAMILIES) == 8
    result = open_result(tiny_run(tmp_path, kind), open_backend)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    weights = write(result, tmp_path / "merged")
    baseline = truth_of(result)
    drift = baseline.drift(through_transformers(tmp_path / "merged", baseline))
    assert problems(drift, bounds_of(result, baseline).floor.bound()) == []
    assert drift.mismatches == ()
    assert drift.places > 10
    base = baseline.drift(through_transformers(tmp_path / "model", baseline))
    assert any("log-prob error" in words for words in problems(base, bounds_of(result, baseline).floor.bound()))
    assert list(merged_problems(result, weights, tmp_path / "merged")) == []
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
    assert tokenizer.encode("1 and 12", add_special_tokens=False) == result.encoder.tokenizer.encode_content("1 and 12")
    assert tokenizer.chat_template == result.encoder.source.jinja
    if kind.startswith("gpt2"):  # llama.cpp's converter and mlx-lm ask for the older of two names
        config = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert config["n_ctx"] == config["n_positions"] == 128
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("kind", ["lora", "rank-stabilized, by patterns", "tied head", "far rotations"])
def test_merged_model_is_what_was_trained_for_mlx_lm_too(kind: str, tmp_path: Path) -> None:
    """Programs that read older names of settings, as mlx-lm does, compute the same from the folder alone."""
    pytest.importorskip("mlx_lm", reason="needs the mlx extra: pip install 'finetune-suite[mlx]'")
    from finetune.backends.mlx import load_fast_blas

    load_fast_blas()
    import mlx.core as mx
    from mlx_lm.utils import load_model

    if kind == "far rotations":
        tiny_model(tmp_path / "model", "llama, linear rope")
    result = open_result(tiny_run(tmp_path, "lora" if kind == "far rotations" else kind), open_backend)
    write(result, tmp_path / "merged")
    baseline = truth_of(result)
    model, _ = load_model(tmp_path / "merged")
    rows = [np.array(model(mx.array([baseline.request.sequence(place)]))[0, -1]) for place in baseline.request.places]
    drift = baseline.drift(InferenceResponse(baseline.request.baseline, following_of(rows)))
    assert problems(drift, bounds_of(result, baseline).floor.bound()) == []
    assert drift.places > 10


@pytest.mark.parametrize(("stored", "dtype"), [(torch.bfloat16, None), (torch.float32, "float16")])
def test_merged_model_in_fewer_bits_is_within_its_rounding(stored: Any, dtype: Any, tmp_path: Path) -> None:
    """The base's type is kept, or the one asked for is taken; the drift is that of the type and no more, and is told.

    The base has two files, and so has what is made of it.
    """
    run = tiny_run_of_shards(tmp_path, stored)
    result = open_result(run, open_backend)
    weights = write(result, tmp_path / "merged", dtype)
    kinds = {str(tensor.dtype) for file in weights_in(tmp_path / "merged") for tensor in load_file(file).values()}
    assert kinds == {"torch.bfloat16" if dtype is None else "torch.float16"}
    assert len(weights_in(tmp_path / "merged")) == 2
    baseline = truth_of(result)
    drift = baseline.drift(through_transformers(tmp_path / "merged", baseline))
    bound = bounds_of(result, baseline).of(weights.rounding, weights.storages)
    assert weights.rounding == ("bf16" if dtype is None else "f16")
    assert problems(drift, bound) == []
    assert problems(drift, bounds_of(result, baseline).floor.bound()) != []
    again = written_weights(result, tmp_path / "merged")
    assert list(merged_problems(result, again, tmp_path / "merged")) == []


def weights_in(folder: Path) -> list[Path]:
    """The weights files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def tiny_run_of_shards(place: Path, stored: Any) -> Path:
    """A run on a base of two files, its weights stored in this type."""
    from support.tiny_runs import tiny_model

    folder = tiny_model(place / "model", "llama")
    weights = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tiny_run(place, "lora")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return tiny_run(tmp_path_factory.mktemp("merge"), "lora")


FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a weight off by little": ("file", lambda folder: spoil_one_weight(folder / "model.safetensors")),
    "another epsilon": ("fresh process", lambda folder: _set(folder, "rms_norm_eps", 0.5)),
    "no weights": ("", lambda folder: (folder / "model.safetensors").unlink()),
}


def _set(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config[key] != value
    (folder / "config.json").write_text(json.dumps(config | {key: value}))


@pytest.mark.parametrize("fault", FAULTS)
def test_merged_model_that_is_not_what_was_trained_is_kept_as_refused(
    fault: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 3 faults is told at the stage where it shows; the folder is kept as refused, its report beside it."""
    stage, change = FAULTS[fault]
    written = merging.write_merged
    monkeypatch.setattr(merging, "write_merged", lambda *given: (written(*given), change(given[-1])))
    with pytest.raises(Exception, match=f"at the stage '{stage}'" if stage else "holds no .safetensors") as caught:
        merge(run, output=tmp_path / "out" / "merged", dtype=None)
    assert isinstance(caught.value, ExportError) == bool(stage)
    kept = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert kept == (["merged.refused", "merged.refused.json"] if stage else [])


def test_merge_of_a_run(run: Path, tmp_path: Path) -> None:
    """`ft merge RUN` writes a folder beside the run's own files once; its card says base, run and scores."""
    place = tmp_path / "place"
    shutil.copytree(run, place / "run")
    done = ft("merge", "run", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["folder"] == "run/merged"
    assert [check["stage"] for check in told["checks"]] == ["file", "fresh process"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= {
        file["path"] for file in told["files"]
    }
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    card = (place / "run" / "merged" / "README.md").read_text(encoding="utf-8")
    right = manifest["scores"]["learning"]["tuned"]
    assert manifest["id"] in card
    assert f"| {right['right']} of {right['count']} |" in card
    assert "names no licence" in card
    again = ft("merge", "run", cwd=place)
    assert (again.returncode, "exists already" in again.stderr) == (3, True)
    assert sorted(path.name for path in (place / "run").iterdir() if path.name.startswith(".")) == []


def test_merge_refuses_before_it_writes(run: Path, tmp_path: Path) -> None:
    """Each of 5 mistakes ends with its exit code and its name, and no folder."""
    shutil.copytree(run, tmp_path / "changed")
    (tmp_path / "changed" / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    shutil.copytree(run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "run.json").unlink()
    (tmp_path / "link").symlink_to("nowhere")
    cases = {
        ("merge", str(run), "--dtype", "int8"): (2, "float32, float16, bfloat16"),
        ("merge", "changed"): (3, "is not the one that was trained"),
        ("merge", "unfinished"): (3, "no finished run"),
        ("merge", str(run), "--output", "changed"): (3, "exists already"),
        ("merge", str(run), "--output", "link"): (3, "exists already"),
    }
    for arguments, (code, words) in cases.items():
        done = ft(*arguments, cwd=tmp_path)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("merged*"))
    assert not (run / "merged").exists()


def test_merge_on_a_full_disk_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """Where the weights find no room, the error says so with exit code 1, and no part of them is left."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = ft("merge", str(run), "--output", "out/merged", cwd=tmp_path, limit=limit)
    assert done.returncode == 1, done.stderr
    assert "cannot write out/merged" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["tokenizer_config.json", "model.safetensors"])
def test_merge_takes_nothing_from_outside_the_base(name: str, tmp_path: Path) -> None:
    """A file of the base that became a link out of its folder since training is refused by name; nothing is written."""
    run = tiny_run(tmp_path, "lora")
    shutil.move(tmp_path / "model" / name, tmp_path / name)
    (tmp_path / "model" / name).symlink_to(tmp_path / name)
    os.remove(run / "adapter" / "tokenizer_config.json") if name.startswith("tok") else None
    done = ft("merge", str(run), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert name in done.stderr
    assert not (run / "merged").exists()
