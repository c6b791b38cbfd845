"""Laws of `ft push`: what goes to the hub is what was trained, nothing of this machine, and no secret."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.export.gguf import export
from finetune.train import fine_tune
from support.hub_server import TOKEN, Hub, running_hub
from support.tiny_runs import tiny_run
from support.workplace import make_data, make_model, settings, without_reload_check

pytestmark = pytest.mark.tools
FT = "import sys; from finetune.cli.app import run; sys.exit(run(sys.argv[1:]))"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose outcome is said to be passed."""
    place = tmp_path_factory.mktemp("pushed")
    model, data = make_model(place / "my-model"), make_data(place / "rows.jsonl", 6)
    with without_reload_check():
        folder, _ = fine_tune(settings(model, data), output=place / "run")
    return told(folder, outcome="passed")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub."""
    with running_hub() as opened:
        yield opened


def told(folder: Path, **changes: Any) -> Path:
    """The run, whose record says something else."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **changes}))
    return folder


def ft(hub: Hub, *words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `ft` says in a process of its own that knows this hub and no other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(cwd / "home"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", FT, *map(str, words)],
        cwd=cwd,
        env={**kept, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_push_sends_what_was_trained_and_its_card(run: Path, hub: Hub, tmp_path: Path) -> None:
    """Every file of the adapter is on the hub byte for byte, and the card is the run's."""
    done = ft(hub, "push", run, "me/mine", "--private", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["sent"], said["url"]) == (True, f"{hub.address}/me/mine")
    here = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    assert hub.files.keys() == here.keys()
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json"} <= here.keys()
    assert hub.files == here
    assert json.loads(here["adapter_config.json"])["base_model_name_or_path"].startswith("my-model (sha256 ")
    [repo] = hub.repos
    assert (repo["organization"], repo["name"], repo["visibility"]) == ("me", "mine", "private")
    assert all(str(run.parent).encode() not in content for content in hub.files.values())
    assert TOKEN not in done.stdout + done.stderr


def test_push_shows_what_would_go_up_and_asks_nobody(run: Path, hub: Hub, tmp_path: Path) -> None:
    """With --check-only every file is named with its size, also without a token, and no request is made."""
    done = ft(hub, "push", run, "me/mine", "--check-only", cwd=tmp_path, HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {path.name for path in (run / "adapter").iterdir()}
    assert hub.asked == []


def test_push_refuses_a_run_that_failed(run: Path, hub: Hub, tmp_path: Path) -> None:
    """A run that failed its verdict is refused by what failed; --force sends it, and says so."""
    failed = told(shutil.copytree(run, tmp_path / "failed"), outcome="failed")
    done = ft(hub, "push", failed, "me/mine", cwd=tmp_path)
    assert done.returncode == 3
    assert "failed its verdict" in done.stderr
    assert "--force" in done.stderr
    assert hub.asked == []
    done = ft(hub, "push", failed, "me/mine", "--force", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "outcome is failed" in done.stderr


@pytest.mark.parametrize(
    ("status", "token", "code", "words"),
    [
        (0, "", 3, "no token"),
        (0, "hf_anotherOfNobody", 3, "does not take your token"),
        (403, TOKEN, 3, "may not write to me/mine"),
        (500, TOKEN, 1, "could not take me/mine"),
    ],
)
def test_push_says_what_the_hub_refuses_and_no_secret(
    status: int, token: str, code: int, words: str, run: Path, hub: Hub, tmp_path: Path
) -> None:
    """Each refusal is one error with its remedy, even where the hub itself repeats the token."""
    hub.refuse = status
    done = ft(hub, "push", run, "me/mine", cwd=tmp_path, HF_TOKEN=token)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not token or token not in done.stdout + done.stderr


def test_push_holds_what_came_to_what_was_sent(run: Path, hub: Hub, tmp_path: Path) -> None:
    """A file that is another one on the hub fails the push by its name, be it large or small."""
    for name in ("adapter_model.safetensors", "README.md"):
        hub.spoil = name
        done = ft(hub, "push", run, "me/mine", cwd=tmp_path)
        assert done.returncode == 1
        assert f"has not what was sent: {name}" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("RUN", "mine"), 2, "USER/NAME"),
        (("RUN", "me/../other"), 2, "names no repository"),
        (("RUN", "me/mine", "--merged"), 3, "ft merge"),
        (("nowhere", "me/mine"), 3, "does not exist"),
        (("CHANGED", "me/mine"), 3, "is not the one that was trained"),
        (("SECRET", "me/mine"), 3, "holds your token"),
    ],
)
def test_push_refuses_before_it_asks(
    words: tuple[str, ...], code: int, said: str, run: Path, hub: Hub, tmp_path: Path
) -> None:
    """A name that is none, a run that is none or was changed, or a secret in a file: refused, and nothing is asked."""
    changed = shutil.copytree(run, tmp_path / "changed")
    (changed / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    secret = shutil.copytree(run, tmp_path / "secret")
    (secret / "adapter" / "README.md").write_text(f"mine is {TOKEN}")
    places = {"RUN": run, "CHANGED": changed, "SECRET": secret}
    done = ft(hub, "push", *(places.get(word, word) for word in words), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert hub.asked == []
    assert TOKEN not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the GGUF files of the merged model and of the adapter alone."""
    for library in ("peft", "gguf", "xllamacpp"):
        pytest.importorskip(library, reason="needs the torch and gguf extras: pip install 'finetune-suite[torch,gguf]'")
    run = told(tiny_run(tmp_path_factory.mktemp("exported"), "lora"), outcome="passed")
    for outtype, alone in (("q8_0", False), ("f32", True)):
        export(str(run), outtype=outtype, adapter_only=alone, output=None, backend="torch", tell=lambda words: None)
    (run / "gguf" / "run-f16.refused.gguf").write_bytes(b"what is refused is not sent")
    return run


def test_push_of_gguf_sends_what_was_exported_and_a_card_of_it(exported: Path, hub: Hub, tmp_path: Path) -> None:
    """The files are on the hub byte for byte; the card tells the hub what they are, and each one's type and hash."""
    done = ft(hub, "push", exported, "me/mine", "--gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = {path.name: path.read_bytes() for path in (exported / "gguf").glob("run-*[0-9].gguf")}
    assert here.keys() == {"run-q8_0.gguf", "run-adapter-f32.gguf"}
    card = hub.files["README.md"].decode()
    assert hub.files == {**here, "README.md": card.encode()}
    assert "library_name: gguf" in card
    for name, content in here.items():
        assert f"`{name}`: {name[:-5].rsplit('-', 1)[-1]}, {len(content):,} bytes" in card
        assert hashlib.sha256(content).hexdigest() in card
    assert str(tmp_path.parent) not in card


def test_push_of_gguf_refuses_what_was_not_exported(exported: Path, run: Path, hub: Hub, tmp_path: Path) -> None:
    """A byte of a weight that has changed, or no file at all, is refused, and nothing is asked."""
    changed = shutil.copytree(exported, tmp_path / "changed")
    file = changed / "gguf" / "run-q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-3] + b"\x01\x02\x03")
    for words, said in ((changed, "is not what was written"), (run, "holds no GGUF file")):
        done = ft(hub, "push", words, "me/mine", "--gguf", cwd=tmp_path)
        assert done.returncode == 3
        assert said in done.stderr
        assert "ft export" in done.stderr
    done = ft(hub, "push", exported, "me/mine", "--gguf", "--merged", cwd=tmp_path)
    assert done.returncode == 2
    assert hub.asked == []
