"""Models of the hub: had where they can be, and else refused with the reason and what to do about it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.models.locate import SHIPPED_FOLDER
from support.hub_downloads import COMMIT, GATED, GOOD, HubServer

PROGRAM = """
import json, sys
from finetune.errors import ModelError
from finetune.models.locate import locate_model
for asked in sys.argv[1:]:
    name, _, revision = asked.partition("@")
    try:
        found = locate_model(name, revision=revision or None)
        told = {"folder": str(found.folder), "place": found.source}
    except ModelError as error:
        told = {"message": error.message, "hint": error.hint}
    print(json.dumps({"asked": asked, **told}))
"""
TOLD = {
    GATED: ("is gated", "accept it at {hub}/gated/llama, then `hf auth login`"),
    "private/model": ("or a private one", "`hf auth login`, or set HF_TOKEN"),
    "nobody/nothing": ("unknown model 'nobody/nothing'", "see {hub}/nobody/nothing"),
    "reference-lama": ("unknown model 'reference-lama'", "did you mean reference-llama?"),
    "token/expired": ("refuses the token", "log in again"),
    "asked/too-often": ("asked too often", "wait"),
    "broken/hub": ("could not give it (", "reference-llama"),
    "old/disabled": ("disabled", "see {hub}/old/disabled"),
    f"{GOOD}@v9": ("has no revision 'v9'", "leave out model.revision"),
    "./modle": ("does not exist", "did you mean model?"),
}


def ask(names: list[str], folder: Path, **environment: str) -> dict[str, dict[str, str]]:
    """What a fresh process is told of each name, in a folder that has a model."""
    (folder / "model").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given = {**kept, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], cwd=folder, env=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {told["asked"]: told for told in map(json.loads, done.stdout.splitlines())}


def test_hub_that_refuses_is_told_with_its_reason_and_what_to_do(tmp_path: Path) -> None:
    """Gated, private, disabled, no such revision, a bad token, asked too often, a hub at fault: all differ."""
    model = SHIPPED_FOLDER / "reference-llama"
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    with HubServer(files) as hub:
        found = ask([GOOD, f"{GOOD}@{COMMIT}", *TOLD], tmp_path, HF_ENDPOINT=hub.address)
    assert found[GOOD]["place"] == "hub"
    assert (Path(found[GOOD]["folder"]) / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert found[f"{GOOD}@{COMMIT}"]["folder"] == found[GOOD]["folder"]
    for asked, (message, hint) in TOLD.items():
        assert message in found[asked]["message"], asked
        assert hint.format(hub=hub.address) in found[asked]["hint"], asked
        assert "\n" not in found[asked]["message"] + found[asked]["hint"]
    assert len({found[asked]["message"] for asked in TOLD}) == len(TOLD)


@pytest.mark.parametrize(
    ("environment", "message", "hint"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 could not give it (", "check the network"),
    ],
)
def test_hub_that_cannot_be_reached_is_told(
    environment: dict[str, str], message: str, hint: str, tmp_path: Path
) -> None:
    """Offline by a variable and offline by the network are told apart, and both name what ships here."""
    told = ask(["some/model"], tmp_path, **environment)["some/model"]
    assert message in told["message"]
    assert hint in told["hint"]
    assert "reference-llama" in told["hint"]
