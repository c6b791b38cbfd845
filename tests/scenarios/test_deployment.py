"""`ft deploy`: what is served is what was trained, or nothing is served and the reason is told."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("ollama", reason="needs the ollama extra: pip install 'finetune-suite[ollama]'")

from finetune.backends import open_backend
from finetune.chat.catalog import CHATML
from finetune.errors import DeploymentError, OutputError, StorageError, TemplateError
from finetune.evidence.drift import Bound
from finetune.evidence.saved import prepare_again
from finetune.export.gguf_source import exportable_run
from finetune.records import Conversation, Message
from finetune.run.folder import RunFolder
from finetune.serve import deploy, recipe
from finetune.serve.deploy import Deployed, deploy_llama_cpp, deploy_ollama
from finetune.serve.expected import prepare_serving_check
from finetune.serve.llama_server import LlamaServer, llama_server
from finetune.serve.ollama import Ollama
from finetune.serve.ties import Ties
from finetune.verify.laws.modelfile_reader import read_modelfile
from finetune_strategies.scratch import lasting_folder
from support.ollama_server import Model, Spoken, StandIn, running
from support.processes import MAIN, ft

pytestmark = pytest.mark.tier2
STAGES = ["template", "answers", "stop"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run."""
    folder = tmp_path_factory.mktemp("deploy")
    quick = ["judge.control=never", "judge.memory=never", "training.max_steps=60", "evaluation.questions=20"]
    words = ("train", "--backend", "reference", "--output", "run", *(w for key in quick for w in ("--set", key)))
    done = ft(*words, cwd=folder)
    assert done.returncode in (0, 1, 4), done.stderr
    return folder / "run"


class Speaker:
    """Lets llama.cpp speak for the stand-in's models."""

    def __init__(self) -> None:
        self._servers: dict[str, LlamaServer] = {}
        self._stack = contextlib.ExitStack()

    def __call__(self, content: bytes, model: Model, prompt: str, most: int) -> Spoken:
        """What the model goes on with, up to its stops."""
        if model.digest not in self._servers:
            file = lasting_folder("speaker") / "model.gguf"
            file.write_bytes(content)
            served = llama_server(file, context=model.parameters["num_ctx"], name="x")
            self._servers[model.digest] = self._stack.enter_context(served)
        asked = {"prompt": prompt, "temperature": 0, "n_predict": most, "stop": model.parameters["stop"]}
        told = self._servers[model.digest].ask("completion", asked)
        return Spoken(told["content"], told["stop_type"] != "limit", told["tokens_evaluated"])

    def close(self) -> None:
        """End them."""
        self._stack.close()


@pytest.fixture
def ollama() -> Iterator[StandIn]:
    """A server in Ollama's stead whose models really answer."""
    with contextlib.closing(Speaker()) as speaker, running(speak=speaker) as stand_in:
        yield stand_in


def test_deploy_to_llama_cpp_is_verified(run: Path) -> None:
    """Prompts have the ids of training, answers are the run's own; a file that is another's is written anew, once."""
    manifest = (run / "run.json").read_bytes()
    (run / "deploy").mkdir()
    (run / "deploy" / "run-f16.gguf").write_bytes(b"GGUF, but of whom?")
    (run / "deploy" / "run-f16.gguf.json").write_text('{"run": "another"}', encoding="utf-8")
    (run / "deploy" / ".run-f16.gguf.7.part").write_bytes(b"of one that was killed")
    (run / "deploy" / ".run-f16.gguf.x.part").mkdir()
    done = ft("deploy", "run", "--to", "llama.cpp", "--check-only", "--json", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "writing" in done.stderr
    told = json.loads(done.stdout)
    assert [check["stage"] for check in told["checks"]] == STAGES
    prompts, equal = (int(word) for word in told["checks"][0]["measured"].split()[:3:2])
    assert prompts == equal >= 60
    assert told["checks"][1]["measured"].startswith("20 of 20 are the run's own")
    assert json.loads((run / "deploy" / "llama.cpp.json").read_text(encoding="utf-8")) == told
    assert sum("control token" in note for note in told["notes"]) == 1
    assert not list(run.rglob("*.part"))
    again = ft("deploy", "run", "--to", "llama.cpp", "--check-only", cwd=run.parent)
    assert "which was made of this run and has not changed" in again.stderr
    assert (run / "run.json").read_bytes() == manifest


def test_deploy_leaves_a_run_to_whoever_is_at_work_in_it(run: Path, tmp_path: Path) -> None:
    """While another process is at work in the run its file stays; where no folder can be made, that is told."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("deploy"))
    place = RunFolder(tmp_path / "run")
    place.deploy.mkdir()
    (file := place.deploy / "run-f16.gguf").write_bytes(b"of another run")
    with place.held(), pytest.raises(OutputError, match="is at work in"):
        deploy_llama_cpp(place.path)
    assert file.read_bytes() == b"of another run"
    shutil.rmtree(place.deploy)
    place.deploy.write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot write .*deploy"):
        deploy_llama_cpp(place.path)


def test_deploy_asks_no_question_that_servers_read_otherwise(tmp_path: Path) -> None:
    """A run's own question that holds a control token's name is left out and counted; the others are asked."""
    rows = [{"prompt": f"What is {n}{' <|end_of_text|>' * (n % 2)}?", "completion": "A number"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    quick = ["judge.control=never", "judge.memory=never", "training.max_steps=1", "evaluation.questions=12"]
    words = ("--data", str(tmp_path / "rows.jsonl"), "--backend", "reference", "--output", "run")
    done = ft("train", *words, *(w for key in quick for w in ("--set", key)), cwd=tmp_path)
    assert done.returncode in (0, 1, 4), done.stderr
    serving_check = prepare_serving_check(tmp_path / "run", exportable_run(tmp_path / "run", open_backend))
    asked = [asked.prompt.messages[-1]["content"] for asked in serving_check.questions]
    assert not [text for text in asked if "<|" in text]
    [told] = [int(note.split()[0]) for note in serving_check.notes if "a control token's name" in note]
    assert min(told, len(asked)) > 0


def test_a_run_on_open_answers_is_compared_by_the_questions_that_it_asked(tmp_path: Path) -> None:
    """It asks fewer of them than its rows have; each answer that was recorded is asked for again, in its order."""
    answer = "After {n} comes {m}."
    rows = [{"prompt": f"Tell me of {n}.", "completion": answer.format(n=n, m=n + 1)} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    quick = ["judge.control=never", "judge.memory=never", "training.max_steps=1", "judge.answers=open"]
    words = ("--data", str(tmp_path / "rows.jsonl"), "--backend", "reference", "--output", "run")
    done = ft("train", *words, *(w for key in quick for w in ("--set", key)), cwd=tmp_path)
    assert done.returncode in (0, 1, 4), done.stderr
    run = tmp_path / "run"
    recorded = RunFolder.finished(run).read_manifest()["scores"]["learning"]["tuned"]["answers"]
    assert 0 < len(recorded) < len(prepare_again(RunFolder(run)).questions)
    asked = prepare_serving_check(run, exportable_run(run, open_backend)).questions
    assert [each.expected for each in asked] == [each["expected"] for each in recorded]


def test_deploy_is_verified_on_any_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that prints the day is asked for with the server's own, to which the trainer answers anew.

    That holds over midnight, too.
    """
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}\n" + CHATML.jinja, encoding="utf-8")
    rows = [{"prompt": f"What is {n}?", "completion": "A number"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = [
        f"template.name={tmp_path / 'dated.jinja'}",
        "judge.control=never",
        "judge.memory=never",
        "training.max_steps=1",
    ]
    words = (
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--model",
        "reference-llama",
        "--backend",
        "reference",
        "--output",
        "run",
    )
    done = ft("train", *words, *(w for key in settings for w in ("--set", key)), cwd=tmp_path)
    assert done.returncode in (0, 1, 4), done.stderr
    asked_before = [date.today() - timedelta(days=1)]
    clock = type("Clock", (date,), {"today": classmethod(lambda cls: asked_before.pop() if asked_before else real())})
    real = date.today
    monkeypatch.setattr(deploy, "date", clock)
    deployed = deploy_llama_cpp(tmp_path / "run")
    assert asked_before == []
    asked = {check.stage: check.measured for check in deployed.checks}
    total, right = (int(word) for word in asked["template"].split()[:3:2])
    assert total == right > 20
    assert " are the run's own" in asked["answers"]
    assert any("template.date" in note for note in deployed.notes), deployed.notes


def test_deploy_serves_until_interrupted(run: Path) -> None:
    """Once verified it tells where it listens, answers there, and Ctrl-C ends it with 130 and no server left."""
    command = [sys.executable, "-c", MAIN, "deploy", "run", "--to", "llama.cpp"]
    with subprocess.Popen(
        command, cwd=run.parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as ours:
        assert ours.stdout is not None
        address = ours.stdout.readline().strip()
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}).encode()
        request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["choices"]
        ours.send_signal(signal.SIGINT)
        assert ours.wait(120) == 130
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{address}/health", timeout=5)


def test_deploy_to_ollama_is_verified(run: Path, ollama: StandIn) -> None:
    """The model gets its name once it is verified; its recipe lies beside the file; it gives way only when told to."""
    words = ("deploy", "run", "--to", "ollama", "--name", "facts:first")
    done = ft(*words, "--json", cwd=run.parent, OLLAMA_HOST=ollama.address)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [check["stage"] for check in told["checks"]] == ["recipe", *STAGES]
    assert list(ollama.models) == ["facts:first"]
    recipe = dict(read_modelfile((run / "deploy" / "Modelfile").read_text(encoding="utf-8")))
    assert recipe["from"] == "./run-f16.gguf"
    assert recipe["template"] == ollama.models["facts:first"].template
    assert recipe["num_ctx"] == str(told["context"]) == str(ollama.models["facts:first"].parameters["num_ctx"])
    assert recipe["stop"] in told["stops"]
    second = ft(*words, cwd=run.parent, OLLAMA_HOST=ollama.address)
    assert (second.returncode, "--replace" in second.stderr) == (3, True)
    third = ft(*words, "--replace", cwd=run.parent, OLLAMA_HOST=ollama.address)
    assert (third.returncode, third.stdout) == (0, "facts:first\n")


def test_deploy_tells_no_secret(run: Path, ollama: StandIn) -> None:
    """A login in the server's address, and a token, are in no file and no line, served or not."""
    canary = "canary-4c1e77d09b"
    secrets = {"OLLAMA_HOST": ollama.address.replace("://", f"://me:{canary}@"), "HF_TOKEN": canary}
    words = ("deploy", "run", "--to", "ollama", "--name", "facts:quiet", "--replace")
    for given in ((*words, "--json"), words):
        done = ft(*given, cwd=run.parent, **secrets)
        assert done.returncode == 0, done.stderr
        assert canary not in done.stdout + done.stderr
    ollama.stop()
    done = ft(*words, "--host", secrets["OLLAMA_HOST"], cwd=run.parent, **secrets)
    assert done.returncode == 3
    assert canary not in done.stdout + done.stderr
    assert not [each for each in run.rglob("*") if each.is_file() and canary.encode() in each.read_bytes()]


def test_deploy_to_an_ollama_that_tells_less(run: Path, ollama: StandIn) -> None:
    """An older server, which does not tell its prompts, has them counted, and that is said to be less."""
    ollama.tells_renderings = False
    with contextlib.closing(Ollama(ollama.address)) as server:
        done = deploy_ollama(run, server=server)
    assert done.checks[1].measured == "4 of 4 prompts have as many tokens"
    assert any("only counted" in note for note in done.notes)


def _changed(derive: Callable[..., str], old: str, new: str) -> Callable[..., str]:
    def change(*given: Any, **named: Any) -> str:
        template = derive(*given, **named)
        assert old in template
        return template.replace(old, new)

    return change


def _endless(speak: Callable[..., Spoken]) -> Callable[..., Spoken]:
    def say(*given: Any) -> Spoken:
        return Spoken(speak(*given).text, ended=False)

    return say


def _other(speak: Callable[..., Spoken]) -> Callable[..., Spoken]:
    def say(*given: Any) -> Spoken:
        return Spoken(f"{speak(*given).text}!")

    return say


def _other_once(speak: Callable[..., Spoken]) -> Callable[..., Spoken]:
    said: list[str] = []

    def say(*given: Any) -> Spoken:
        told = speak(*given)
        said.append(told.text)
        return Spoken(f"{told.text}!") if len(said) == 7 else told

    return say


FAULTS: dict[str, tuple[str, Any]] = {
    "one line break less": ("template", ("<|end_header_id|>\n\n", "<|end_header_id|>\n")),
    "two begin-of-text tokens": ("template", ("{{ $last :", "<|begin_of_text|>{{ $last :")),
    "no markup at all": ("template", ("<|start_header_id|>", "")),
    "runs on": ("stop", _endless),
    "another model": ("answers", _other),
    "one answer of twenty": ("answers", _other_once),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_deploy_of_what_was_not_trained_is_told_and_gone(
    fault: str, run: Path, ollama: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 6 faults is found at its stage, and neither the name nor anything half made is left on the server."""
    stage, how = FAULTS[fault]
    if isinstance(how, tuple):
        monkeypatch.setattr(recipe, "derive_template", _changed(recipe.derive_template, *how))
    else:
        ollama.speak = how(ollama.speak)
    with (
        contextlib.closing(Ollama(ollama.address)) as server,
        pytest.raises(DeploymentError, match=f"at the stage '{stage}'") as told,
    ):
        deploy_ollama(run, server=server, name="facts")
    assert "there is no model facts:latest; nothing half made is left" in told.value.message
    assert ollama.models == {}


def test_answer_may_part_from_the_trainers_at_a_tie_and_nowhere_else(run: Path) -> None:
    """Another text is explained where its first other word is as likely within rounding, and not a hair beyond."""
    exportable = exportable_run(run, open_backend)
    check = prepare_serving_check(run, exportable)
    asked = check.questions[0]
    ids, own = asked.prompt.ids, asked.given
    ties = Ties(exportable, "f16", (ids,), check.encoder.stop_ids, check.most)
    assert 0 < ties.bound.distance < 0.1
    assert ties.explain(ids, own)
    assert not ties.explain(ids, f"{own}!")
    assert not ties.explain(ids, "")
    [row] = ties._rows(ids, [])
    second = next(each for each in np.argsort(-row) if each != row.argmax() and ties._decode([int(each)]))
    gap = float(row.max() - row[second]) / float(row.std())
    for share, explained in ((1.01, True), (0.99, False)):
        ties.__dict__["bound"] = Bound(share * gap / 2, 0.0, "")
        assert ties.explain(ids, f"{ties._decode([int(second)])} and so on") is explained


def test_template_that_takes_a_servers_variable_otherwise_is_refused(tmp_path: Path) -> None:
    """llama.cpp's server sets enable_thinking: where that changes a prompt, the run must have set it, or is refused."""
    asks = "{{- '<|im_start|>assistant"
    jinja = CHATML.jinja.replace(asks, f"{{{{- 'Think. ' if enable_thinking -}}}}{asks}")
    assert jinja != CHATML.jinja
    (tmp_path / "thinks.jinja").write_text(jinja)
    quick = ["judge.control=never", "judge.memory=never", "training.max_steps=1", "evaluation.questions=1"]
    quick += ["template.name=thinks.jinja"]
    for name, more in (("without", []), ("with", ["template.variables={enable_thinking: false}"])):
        words = ("--backend", "reference", "--output", name, *(w for key in quick + more for w in ("--set", key)))
        done = ft("train", *words, cwd=tmp_path)
        assert done.returncode in (0, 1, 4), done.stderr
    found = {name: exportable_run(tmp_path / name, open_backend) for name in ("without", "with")}
    with pytest.raises(TemplateError, match="enable_thinking") as told:
        prepare_serving_check(tmp_path / "without", found["without"], today=date(2026, 1, 1))
    assert "template.variables" in told.value.hint
    assert prepare_serving_check(tmp_path / "with", found["with"], today=date(2026, 1, 1)).prompts


def test_variables_that_all_rows_share_are_asked_with(tmp_path: Path) -> None:
    """A server is asked with the `chat_template_kwargs` of all rows, which is told, and without them asks otherwise."""
    (tmp_path / "moods.jinja").write_text(f"{{{{- mood ~ level if mood -}}}}{CHATML.jinja}")
    given = {"level": 2, "mood": "glad"}
    turns = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}"}] for n in range(6)]
    rows = [json.dumps({"messages": each, "chat_template_kwargs": given}) for each in turns]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    quick = ["judge.control=never", "judge.memory=never", "training.max_steps=1", "template.name=moods.jinja"]
    words = ("--backend", "reference", "--data", str(tmp_path / "rows.jsonl"), "--output", "run")
    done = ft("train", *words, *(w for key in quick for w in ("--set", key)), cwd=tmp_path)
    assert done.returncode in (0, 1, 4), done.stderr
    seen: list[tuple[int, ...]] = []

    def ask(_: Deployed, server: LlamaServer) -> None:
        seen.extend(server.rendered_ids(turns[0][:1], variables) for variables in (given, None))

    deployed = deploy_llama_cpp(tmp_path / "run", outtype="f32", serve=ask)
    assert {check.stage for check in deployed.checks} >= {"template", "answers"}
    assert "were not compared" not in " ".join(deployed.notes)
    assert f"ask it with chat_template_kwargs {json.dumps(given)}" in " ".join(deployed.notes)
    exportable = exportable_run(tmp_path / "run", open_backend)
    check = prepare_serving_check(tmp_path / "run", exportable)
    assert check.questions[0].prompt.ids == seen[0]
    assert seen[0] != seen[1]
    # In Ollama's language there are none: they are written into the template that is made for it.
    assert "glad2" in check.render(Conversation((Message("user", "a"),), "here"))


def test_deploy_refuses_before_it_writes(run: Path, ollama: StandIn) -> None:
    """Each of 6 mistakes ends with its exit code and its remedy, before a file is written or a server asked."""
    nowhere = "127.0.0.1:9"
    cases = {
        ("run", "--to", "cloud"): (2, "ollama, llama.cpp"),
        ("run", "--to", "ollama", "--name", "a b"): (2, "model[:tag]"),
        ("run", "--to", "ollama", "--host", "127.0.0.1:port"): (2, "11434"),
        ("run", "--to", "ollama", "--host", nowhere): (3, "ollama serve"),
        ("run", "--to", "llama.cpp", "--outtype", "q4"): (2, "q8_0"),
        ("nothing", "--to", "llama.cpp"): (3, "does not exist"),
    }
    before = sorted(run.rglob("*"))
    for arguments, (code, words) in cases.items():
        done = ft("deploy", *arguments, cwd=run.parent, OLLAMA_HOST=ollama.address)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert sorted(run.rglob("*")) == before
    assert ollama.asked == []


def test_deployed_can_be_used_from_python(run: Path) -> None:
    """Other code gets the running server for as long as it needs it, and what was verified afterwards."""
    seen: list[str] = []
    done = deploy_llama_cpp(run, serve=lambda deployed, server: seen.append(server.ask("tokenize", {"content": "a"})))  # type: ignore[arg-type]
    assert len(seen) == 1
    assert all(check.passed for check in done.checks)
