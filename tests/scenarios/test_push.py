"""Laws of `ft push`: what goes to the hub is what was trained, nothing of this machine, and no secret."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.train import fine_tune
from support.hub_server import TOKEN, Hub, running_hub
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
