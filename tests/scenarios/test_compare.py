"""Every path to compute a run is held to its trainer: what is the same passes, what is not is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
pytest.importorskip("mlx_lm", reason="needs the mlx extra: pip install 'finetune-suite[mlx]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

import gguf

from finetune.backends import open_backend
from finetune.chat.tokenizer import FileTokenizer
from finetune.cli.app import run as ft
from finetune.compare.comparison import PATHS, SERVER, Comparison, PathResult, compare_paths
from finetune.compare.paths import CallablePath
from finetune.errors import EvidenceError, UsageError
from finetune.evidence.answering import ask_mlx_lm, ask_peft, ask_session
from finetune.evidence.drift import InferenceRequest, InferenceResponse
from finetune.export.blueprint import Blueprint
from finetune.export.gguf import export, plan_lora
from finetune.export.merged_folder import plan_weights, write_merged
from finetune.export.result import open_result
from finetune.records import ModelLocation
from finetune.run.folder import RunFolder
from finetune.serve.llama_server import LlamaServer
from finetune.serve.messages import Messages
from support.tiny_runs import tiny_run

pytestmark = [pytest.mark.tier2, pytest.mark.usefixtures("warm_children")]
EXACT = ("peft", "merged", "mlx-lm", "mlx", "reference", "gguf-lora", "gguf-f32")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of torch."""
    return tiny_run(tmp_path_factory.mktemp("compare"), "lora")


def row_of(found: Comparison, path: str) -> PathResult:
    """The one row of a path."""
    [row] = [row for row in found.rows if row.path == path]
    return row


def test_every_way_computes_what_was_trained(run: Path) -> None:
    """The run's questions through all paths: equal where weights are in float32, within the bound where not.

    The trainer scores as the run did, and nothing that the run wrote is another.
    """
    before = {path: path.read_bytes() for path in sorted(run.parent.rglob("*")) if path.is_file()}
    found = compare_paths(run)
    assert found.outcome == "passed"
    assert found.tokens >= 8
    assert [row.path for row in found.rows] == [name for name in PATHS if name != "torch"]
    for row in found.rows[1:]:
        assert (row.outcome, row.reason) == ("passed", ""), row
        assert row.drift is not None
        # A chat API tells answers, and of distributions too little.
        assert row.drift.places == (0 if row.path == SERVER else found.tokens)
        assert row.drift.questions == found.asked["learning"] >= 8
        if row.path in EXACT:
            assert row.drift.mismatches == ()
            assert row.bound == found.rows[1].bound
            assert row.right == found.rows[0].right
    allowed = [row.bound.distance for row in found.rows if row.path.startswith("gguf") and row.bound]
    assert allowed[0] == min(allowed) < 1e-3
    assert all(row.sees for row in found.rows[1:] if row.path != SERVER)
    coarse = row_of(found, "gguf-q8_0").drift
    assert coarse is not None
    assert coarse.mean_kl is not None
    assert coarse.mean_kl > 1e-7
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert found.rows[0].right["learning"] == manifest["scores"]["learning"]["tuned"]["right"]
    told = json.loads((run / "equivalence.json").read_text(encoding="utf-8"))
    assert (told["outcome"], len(told["paths"])) == ("passed", len(PATHS) - 1)
    after = {path: path.read_bytes() for path in sorted(run.parent.rglob("*")) if path.is_file()}
    assert after.pop(run / "equivalence.json")
    assert after == before
    files = {file["path"]: file["sha256"] for file in RunFolder(run).describe()}
    assert all(files[file["path"]] == file["sha256"] for file in manifest["artifacts"])


def answers(change: Callable[[InferenceResponse], InferenceResponse], folder: Path, run: Path) -> CallablePath:
    """A path that computes a model folder with torch, and changes what it tells."""

    def ask(asked: InferenceRequest) -> InferenceResponse:
        session = open_backend("torch").open(ModelLocation("x", folder, "local"), "float32", 0)
        if folder != run:
            session.load_adapter(run / "adapter")
        return change(ask_session(session, asked))

    return CallablePath("other", None, "another server", ask)


def _other_token(told: InferenceResponse) -> InferenceResponse:
    first = (*told.ids[0][:1], (told.ids[0][1] + 1) % 640 if len(told.ids[0]) > 1 else 9)
    return InferenceResponse((first, *told.ids[1:]), told.following)


def _shorter(told: InferenceResponse) -> InferenceResponse:
    return InferenceResponse((told.ids[0][:-1], *told.ids[1:]), None)


CHANGES: dict[str, tuple[Callable[[InferenceResponse], InferenceResponse], str]] = {
    "nothing": (lambda told: told, ""),
    "answers alone": (lambda told: InferenceResponse(told.ids, None), ""),
    "another token": (_other_token, "question 0, token 1"),
    "an answer ends early": (_shorter, "the end instead of token"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_way_is_held_to_the_trainer(change: str, run: Path) -> None:
    """A server of somebody's own is judged as our paths are: by ids and, where it tells them, by distributions."""
    tell, said = CHANGES[change]
    found = compare_paths(run, (), more=[answers(tell, run.parent / "model", run)])
    row = row_of(found, "other")
    assert (row.outcome, said in row.reason) == ("failed" if said else "passed", True), row
    assert found.outcome == ("failed" if said else "passed")


def test_server_that_renders_otherwise_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that makes other ids of a question at serving time is found, with both lengths."""
    rendered = LlamaServer.rendered_ids
    monkeypatch.setattr(LlamaServer, "rendered_ids", lambda self, messages: (*rendered(self, messages), 0))
    row = row_of(compare_paths(run, [SERVER]), SERVER)
    assert row.outcome == "failed"
    assert "the server makes" in row.reason
    monkeypatch.undo()
    ids = LlamaServer.chat_ids
    monkeypatch.setattr(LlamaServer, "chat_ids", lambda self, messages, most: ids(self, messages, most=most)[:-2])
    row = row_of(compare_paths(run, [SERVER]), SERVER)
    assert row.outcome == "failed"
    assert row.drift is not None
    assert row.drift.mismatches


def test_answer_that_ends_within_a_character_is_compared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of half a character, which a server has no text of, are among the ids that are compared."""
    told: list[tuple[int, ...]] = []
    ids = LlamaServer.chat_ids

    def kept(self: LlamaServer, messages: Messages, *, most: int) -> tuple[int, ...]:
        told.append(ids(self, messages, most=most))
        return told[-1]

    monkeypatch.setattr(LlamaServer, "chat_ids", kept)
    run = tiny_run(tmp_path, "lora", step=2)
    row = row_of(compare_paths(run, [SERVER]), SERVER)
    tokenizer = FileTokenizer(tmp_path / "model")
    assert sum(tokenizer.decode(each).endswith("\ufffd") for each in told) > 0
    assert (row.outcome, row.reason) == ("passed", "")


def test_the_base_is_not_taken_for_what_was_trained(run: Path) -> None:
    """A200: where the adapter was left out, distributions say so."""
    base = run.parent / "model"

    def ask(asked: InferenceRequest) -> InferenceResponse:
        return ask_session(open_backend("torch").open(ModelLocation("x", base, "local"), "float32", 0), asked)

    found = compare_paths(run, (), more=[CallablePath("base", None, "the base", ask)])
    assert "max log-prob error" in row_of(found, "base").reason


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with what `ft merge` and `ft export` make of it."""
    place = tmp_path_factory.mktemp("written")
    shutil.copytree(run.parent, place / "all")
    made = place / "all" / "run"
    result = open_result(made, open_backend)
    made.joinpath("merged").mkdir()
    write_merged(result, plan_weights(result, None), made / "merged")
    export(str(made), outtype="f16", adapter_only=False, output=None, backend="torch", tell=lambda words: None)
    return made


def test_what_was_written_is_what_is_compared(written: Path) -> None:
    """Where a merged folder and a GGUF file lie in the run, those are asked, and hold."""
    found = compare_paths(written, ("merged", "gguf-f16"))
    assert [(row.outcome, row.what) for row in found.rows[1:]] == [
        ("passed", "the model folder merged"),
        ("passed", "llama.cpp on gguf/run-f16.gguf"),
    ]


def info_of(path: Path, number: int) -> tuple[int, int]:
    """Where a tensor's description in a GGUF file has its first side and its offset."""
    field = gguf.GGUFReader(path).tensors[number].field
    name, sides = 8 + int(field.parts[0][0]), int(field.parts[2][0])
    return field.offset + name + 4, field.offset + name + 4 + 8 * sides + 4


def _at(place: Callable[[Path], int], value: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content, at = bytearray(path.read_bytes()), place(path)
        content[at : at + 8] = value.to_bytes(8, "little")
        path.write_bytes(content)

    return change


def _flip(path: Path) -> None:
    place = int(gguf.GGUFReader(path).tensors[5].data_offset) + 9
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def _json_flip(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"llama", b"lloma", 1))


GGUF, WEIGHTS = "gguf/run-f16.gguf", "merged/model.safetensors"
SPOILT: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut in the middle": (GGUF, lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "whole"),
    "cut by a byte": (GGUF, lambda path: path.write_bytes(path.read_bytes()[:-40]), "whole"),
    "cut in the header": (GGUF, lambda path: path.write_bytes(path.read_bytes()[:300]), "whole"),
    "empty": (GGUF, lambda path: path.write_bytes(b""), "whole"),
    "no GGUF": (GGUF, lambda path: path.write_bytes(b"GGML" + path.read_bytes()[4:]), "whole"),
    "one tensor fewer": (GGUF, _at(lambda path: 8, 3), "tensor"),
    "more tensors than there are": (GGUF, _at(lambda path: 8, 2**40), "whole"),
    "more keys than there are": (GGUF, _at(lambda path: 16, 2**40), "whole"),
    "one key fewer": (GGUF, _at(lambda path: 16, 3), ""),
    "a side too long": (GGUF, _at(lambda path: info_of(path, 3)[0], 2**62), ""),
    "a side of nothing": (GGUF, _at(lambda path: info_of(path, 3)[0], 0), ""),
    "an offset beyond the end": (GGUF, _at(lambda path: info_of(path, 3)[1], 2**62), ""),
    "another tensor's offset": (GGUF, _at(lambda path: info_of(path, 3)[1], 0), "on top of"),
    "a byte of a weight": (GGUF, _flip, "is off by"),
    "another name": (GGUF, _json_flip, "key general."),
    "a byte of a key's text": (
        GGUF,
        lambda path: path.write_bytes(path.read_bytes().replace(b"llama", b"ll\xe1ma", 1)),
        "whole",
    ),
    "weights cut": (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
    "weights' header cut": (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:50]), "corrupt"),
    "a byte of merged weights": (
        WEIGHTS,
        lambda path: path.write_bytes(path.read_bytes()[:-3] + b"\0\0\0"),
        "other numbers",
    ),
    "settings changed": ("merged/config.json", lambda path: path.write_text("{}"), "config.json has changed"),
    "no tokenizer": ("merged/tokenizer.json", lambda path: path.unlink(), "tokenizer.json is missing"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_damaged_is_told_by_name(what: str, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 21 ways to spoil a written file makes its path fail, with the file's name; nothing is touched."""
    assert len(SPOILT) == 21
    name, spoil, said = SPOILT[what]
    path, kept = written / name, (written / name).read_bytes()
    through = "gguf-f16" if name == GGUF else "merged"
    spoil(path)
    spoilt = path.read_bytes() if path.exists() else None
    try:
        code = ft(["compare", str(written), "--through", through, "--json"])
        told = json.loads(capsys.readouterr().out)
        [row] = [row for row in told["paths"] if row["path"] == through]
        assert (code, told["outcome"], row["outcome"]) == (1, "failed", "failed"), row
        assert path.name in row["reason"] or "merged" in row["reason"]
        assert said in row["reason"]
        assert "write it again" in row["reason"]
        assert (path.read_bytes() if path.exists() else None) == spoilt
    finally:
        path.write_bytes(kept)


ALONE = ("peft", "mlx-lm", "gguf-lora")
LACKS = {
    "whole model": {"peft": "no adapter", "gguf-lora": "no adapter"},
    "dora": {"gguf-lora": "DoRA"},
    "tied head": {},
    # Its tensors have names that transformers reads and mlx-lm does not.
    "gpt2": {"mlx-lm": "mlx-lm does not load it: Received"},
}


@pytest.mark.parametrize("kind", LACKS)
def test_programs_that_users_have_load_what_they_can(kind: str, tmp_path: Path) -> None:
    """PEFT, mlx-lm and llama.cpp, each alone: what was trained, or not applicable for the reason of that kind."""
    found = compare_paths(tiny_run(tmp_path, kind), ALONE)
    told = {row.path: row.reason for row in found.rows[1:] if row.outcome != "passed"}
    assert told.keys() == LACKS[kind].keys(), told
    for row in found.rows[1:]:
        if row.path in told:
            assert row.outcome == "not applicable"
            assert LACKS[kind][row.path] in row.reason


def _set(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _with_alpha(adapter: Path) -> Path:
    changed = adapter.parent / "changed"
    shutil.copytree(adapter, changed, dirs_exist_ok=True)
    _set(changed / "adapter_config.json", lora_alpha=1)
    return changed


def _ask_of_another_base(folder: Path, request: InferenceRequest) -> InferenceResponse:
    _set(folder / "config.json", rope_theta=9.0, rope_parameters={"rope_theta": 9.0, "rope_type": "default"})
    return ask_mlx_lm(folder, request)


def _with_scale(*given: Any) -> Blueprint:
    made = plan_lora(*given)
    return replace(made, metadata={**made.metadata, "adapter.lora.alpha": 1.0})


MISREAD: dict[str, tuple[str, Callable[..., Any]]] = {
    "peft": ("paths.ask_peft", lambda folder, adapter, request: ask_peft(folder, _with_alpha(adapter), request)),
    "mlx-lm": ("comparison.ask_mlx_lm", _ask_of_another_base),
    "gguf-lora": ("paths.plan_lora", _with_scale),
}


@pytest.mark.parametrize("path", MISREAD)
def test_program_that_reads_something_else_is_told(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another strength of the adapter, or another constant of the model, as one program reads it, fails its path."""
    name, misread = MISREAD[path]
    monkeypatch.setattr(f"finetune.compare.{name}", misread)
    row = row_of(compare_paths(tiny_run(tmp_path, "lora"), [path]), path)
    assert row.outcome == "failed"
    assert "max log-prob error" in row.reason


def test_what_cannot_be_computed_is_skipped_with_the_reason(tmp_path: Path) -> None:
    """A GPT-2 is none of the reference's models: skipped, never silent; where nothing is left, that is no success."""
    run = tiny_run(tmp_path, "gpt2")
    found = compare_paths(run, ("reference", "gguf-f32"))
    assert row_of(found, "gguf-f32").outcome == "passed"
    row = row_of(found, "reference")
    assert (row.outcome, "computes 'llama' only" in row.reason) == ("not applicable", True)
    assert found.outcome == "passed"
    with pytest.raises(EvidenceError, match="no path could be compared with the trainer"):
        compare_paths(run, ("reference",))
    with pytest.raises(UsageError, match="no path 'llama'"):
        compare_paths(run, ("llama",))
    assert not list(run.glob(".*"))


def test_table_says_what_the_file_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The terminal has a line for each path, with its outcome; what is not data goes elsewhere."""
    assert ft(["compare", str(run), "--through", "reference"]) == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines() if line.strip()]
    assert [line[:2] for line in lines] == [["path", "outcome"], ["trainer", "baseline"], ["reference", "passed"]]
    assert "asking the trainer" in shown.err
