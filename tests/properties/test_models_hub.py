"""Models of the hub: had where they can be, and else refused with the reason and what to do about it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.models.locate import SHIPPED_FOLDER
from support.hub_downloads import COMMIT, GATED, GOOD, REFUSALS, HubServer

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


OF_DATA = PROGRAM.replace("ModelError", "DataError").replace(
    "locate_model(name, revision=revision or None)", "find_set(asked)"
)
OF_DATA = OF_DATA.replace("models.locate import locate_model", "data.parts import find_set").replace(
    'str(found.folder), "place": found.source', '[str(file) for file in found.files], "place": "hub"'
)


def ask(names: list[str], folder: Path, program: str = PROGRAM, **environment: str) -> dict[str, dict[str, str]]:
    """What a fresh process is told of each name, in a folder that has a model."""
    (folder / "model").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    given = {**kept, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program, *names], cwd=folder, env=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {told["asked"]: told for told in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
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


@pytest.mark.slow
def test_hub_that_refuses_a_data_set_is_told_as_of_a_model(tmp_path: Path) -> None:
    """Each refusal is told of data as it is of a model, in at most three lines, and names the page of the data set."""
    with HubServer({"train.jsonl": b'{"prompt": "a", "completion": "b"}\n'}) as hub:
        asked = {name: told for name, told in TOLD.items() if name in {*REFUSALS, GATED} or "@" in name}
        found = ask([GOOD, *asked], tmp_path, OF_DATA, HF_ENDPOINT=hub.address)
    assert found[GOOD]["place"] == "hub"
    assert len(asked) == 8
    for name, (message, hint) in asked.items():
        told = found[name]
        assert message.replace("model", "data set") in told["message"], name
        kept = hint.replace("{hub}/", "{hub}/datasets/").format(hub=hub.address)
        assert name == "broken/hub" or "model.revision" in told["hint"] or kept.split("model")[0] in told["hint"], name
        assert "reference-llama" not in told["hint"]
        assert "\n" not in told["message"] + told["hint"]
        assert len(told["message"] + told["hint"]) <= 300


@pytest.mark.slow
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
