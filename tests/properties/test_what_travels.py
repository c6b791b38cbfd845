"""Laws of files that travel: adapter, model, merged folder, GGUF and card name no place of this machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.adapters.peft_files import base_of
from finetune.backends import open_backend
from finetune.errors import UsageError
from finetune.evidence.starting import with_start
from finetune.export.gguf_source import exportable_result
from finetune.export.merged_folder import side_files
from finetune.export.result import open_result
from finetune.models.travel import hub_id, is_hashed, public_name, without_places, words_without_places
from finetune.records import ModelLocation
from finetune.run.find import base_beside
from finetune.train import fine_tune
from support.workplace import make_data, make_model, settings, without_reload_check

pytestmark = pytest.mark.tools
HOME = "somebodys-home"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name is to be nowhere, with a base that names it, as older libraries write it, and rows."""
    place = tmp_path_factory.mktemp("home") / HOME
    model = make_model(place / "my-base")
    for name in ("config.json", "tokenizer_config.json"):
        file = model / name
        values = {"hidden_act": "silu"} | (json.loads(file.read_text()) if file.exists() else {})
        file.write_text(json.dumps({**values, "_name_or_path": str(model), "name_or_path": str(model)}))
    make_data(place / "rows.jsonl", 8)
    return place


def trained(home: Path, kind: str) -> Path:
    """A run on them."""
    output = home / f"run-{kind}"
    with without_reload_check():
        fine_tune(
            settings(
                home / "my-base", home / "rows.jsonl", adapter__kind=kind, adapter__rank=8 if kind == "full" else 2
            ),
            output=output,
        )
    return output


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_travels_names_no_place_of_this_machine(kind: str, home: Path) -> None:
    """Nor do settings of the base's that name it; an adapter's base has its name and a hash."""
    run = trained(home, kind)
    saved = run / ("model" if kind == "full" else "adapter")
    assert [str(file) for file in saved.iterdir() if HOME.encode() in file.read_bytes()] == []
    result = open_result(run, open_backend)
    assert [name for name, content in side_files(result, None).items() if HOME.encode() in content] == []
    assert HOME not in str(exportable_result(result).naming)
    if kind == "lora":
        named = base_of(run / "adapter")
        assert named is not None
        assert named.startswith("my-base (sha256 ")
        assert named == public_name(ModelLocation("x", (home / "my-base").resolve(), "local"))
        assert base_beside(run / "adapter") == str(home / "my-base")


def test_adapter_that_has_travelled_asks_for_its_base(home: Path, tmp_path: Path) -> None:
    """Whoever goes on from it is told what the base is, and what to write."""
    run = home / "run-lora" if (home / "run-lora").exists() else trained(home, "lora")
    copy = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    assert base_beside(copy) is None
    loaded = settings(copy, home / "rows.jsonl")
    with pytest.raises(UsageError, match=r"trained on the folder my-base \(sha256 [0-9a-f]{16}\)") as caught:
        with_start(loaded)
    assert f"--model BASE --set model.adapter={copy}" in caught.value.hint


@pytest.mark.parametrize(
    ("folder", "known"),
    [
        ("/c/hub/models--me--my.model/snapshots/abc", "me/my.model"),
        ("/c/models--me--a--b/snapshots/abc", "me/a--b"),
        ("/c/models--gpt2/snapshots/abc", ""),
        ("/c/my-model", ""),
        ("my-model", ""),
    ],
)
def test_folder_of_the_hubs_cache_is_known_by_its_id(folder: str, known: str) -> None:
    """It is its hub id, and not its revision."""
    assert hub_id(Path(folder)) == known


_PARTS = st.lists(
    st.from_regex(r"[A-Za-z0-9._-]{1,8}", fullmatch=True).filter(lambda part: part.strip(".")), min_size=2
)


@given(_PARTS, st.sampled_from(["_name_or_path", "name_or_path", "base_model_name_or_path"]))
def test_places_are_replaced_and_nothing_else(parts: list[str], key: str) -> None:
    """An absolute path is its last part; hub ids, relative names, other values and other files stay as they are."""
    place = "/" + "/".join(parts)
    values: dict[str, Any] = {"a": place, key: place, "b": [1]}
    changed = json.loads(without_places(json.dumps(values).encode()))
    assert changed == {**values, key: hub_id(Path(place)) or parts[-1]}
    for kept in (json.dumps({key: "me/model"}), json.dumps([key]), f'{{"{key}": ', json.dumps({key: 1})):
        assert without_places(kept.encode()) == kept.encode()
    assert words_without_places(f"of {place}: gone") == f"of {parts[-1]}: gone"
    assert words_without_places(f"see https://example.com{place}") == f"see https://example.com{place}"


@pytest.mark.parametrize("named", ["me/model", "reference-llama", "/a/b", "model (sha256 12)"])
def test_names_without_a_hash_are_names(named: str) -> None:
    """Only a name with a whole mark is one that says what and not where."""
    assert not is_hashed(named)
