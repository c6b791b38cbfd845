"""Laws of findings from strangers: `ft replay` takes them as data, and touches nothing outside its scratch."""

import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune.cli.app import run
from finetune.verify.catalogue import case_laws
from finetune.verify.confine import OutsideError, confined
from finetune.verify.findings import FORMAT, VERSION
from finetune.verify.subjects.subject import About
from finetune_strategies.profiles import examples
from finetune_strategies.recipes import TaskRecipe

pytestmark = pytest.mark.tools

FREE = {"prompt", "completion", "text", "system", "said[]", "turns[]", "before", "after"}
FREE |= {"question", "thoughts", "thoughts[]", "arguments", "arguments.*", "answer", "result", "earlier"}
FREE |= {"asked", "answered", "bad", "chosen", "rejected"}
"""Fields that hold what people say, or what a file holds, the names of its columns among it: no name of a file."""


WRITTEN = {
    "format": FORMAT,
    "version": VERSION,
    "law": "",
    "statement": "",
    "subject": "reference",
    "case": {},
    "expected": "",
    "got": "",
}


class Able:
    """A trainer that can do everything, and does nothing: whatever is touched, a law has touched."""

    def __init__(self) -> None:
        needs = dict.fromkeys((need for law in case_laws().values() for need in law.needs), "")
        self.about = About("able", {"able": "1.0"}, needs)

    def ask(self, ability: str, given: dict[str, Any]) -> dict[str, Any]:
        """No answer fits every question."""
        return {}

    def close(self) -> None:
        """There is nothing to end."""


def strings(schema: dict[str, Any], node: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each place of a case that holds a string, by the name of its field, and what its type says of it."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for each in node.get(key, ()):
            yield from strings(schema, each, name)
    for key, value in node.get("properties", {}).items():
        yield from strings(schema, value, key)
    if isinstance(node.get("items"), dict):
        yield from strings(schema, node["items"], f"{name}[]")
    if isinstance(more := node.get("additionalProperties"), dict):
        yield f"the keys of {name}", node.get("propertyNames", {})
        yield from strings(schema, more, f"{name}.*")
    for pattern, more in node.get("patternProperties", {}).items():
        yield f"the keys of {name}", {"pattern": pattern}
        yield from strings(schema, more, f"{name}.*")
    if node.get("type") == "string":
        yield name, node


def test_every_string_of_a_case_is_closed_or_what_somebody_says() -> None:
    """A string that a law's case may hold is one of a few, a plain word, or a text that names nothing."""
    for law in case_laws().values():
        assert law.kind is not None
        schema = law.kind.model_json_schema()
        for name, kind in strings(schema, schema):
            pattern = kind.get("pattern", "")
            few = "const" in kind or "enum" in kind or (pattern.startswith("^") and pattern.endswith("$"))
            assert name in FREE or few, f"{law.id}: {name} may be any string"


def closed(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places of a case's strings that are not what somebody says, keys of settings among them."""
    if isinstance(value, str):
        yield at
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key in ("settings", "given") and isinstance(each, dict):
            yield (*at, key, "the key of a new setting")
        if f"{key}{'[]' * isinstance(each, list)}" not in FREE:
            yield from closed(each, (*at, key))


def changed(value: Any, at: tuple[str | int, ...], text: str) -> Any:
    """The value with another string at a place."""
    if not at:
        return text
    if at[0] == "the key of a new setting":
        return {**value, text: "x"}
    if isinstance(value, list):
        return [changed(each, at[1:], text) if place == at[0] else each for place, each in enumerate(value)]
    return {**value, at[0]: changed(value[at[0]], at[1:], text)}


def tree(folder: Path) -> dict[str, object]:
    """Every file, folder and link below a folder."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def mine() -> Iterator[Path]:
    """What a user has: files, a folder, and a link, where absolute names and those above the scratch lead."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "victim").mkdir()
        (folder / "victim" / "file").write_text("mine")
        (folder / "file").write_text("mine")
        (folder / "link").symlink_to(folder / "victim")
        yield folder


@cache
def laws_with_closed_strings() -> list[str]:
    """The laws whose cases hold a string that is not what somebody says."""
    schemas = {law.id: law.kind.model_json_schema() for law in case_laws().values() if law.kind}
    return [id for id, schema in schemas.items() if not {name for name, _ in strings(schema, schema)} <= FREE]


@examples(4.0)
@given(st.data())
def test_hostile_names_in_findings_are_refused(mine: Path, data: st.DataObject) -> None:
    """Absolute, above, with NUL, with separators, or a link: refused by value and place, and nothing is touched."""
    law = case_laws()[data.draw(st.sampled_from(laws_with_closed_strings()), label="law")]
    assert law.cases is not None
    case = data.draw(law.cases, label="case").model_dump(mode="json")
    places = list(closed(case))
    assume(places)
    place = data.draw(st.sampled_from(places), label="place")
    up = "../" * data.draw(st.integers(1, 6), label="up")
    name = data.draw(
        st.sampled_from(
            [
                str(mine / "victim"),
                str(mine / "file"),
                str(mine / "link"),
                f"{up}{mine.name}/victim",
                f"{up}{mine.name}/file",
                f"./{up}{mine.name}/link",
                "a/victim",
                "a\\victim",
                "victim\0file",
                "..",
                ".",
                "victim\n",
                "~/victim",
                "-victim",
                f"{mine}/x.jinja",
                f"checkpoints/../{up}{mine.name}/file",
            ]
        ),
        label="name",
    )
    values = {**WRITTEN, "law": law.id, "case": changed(case, place, name)}
    before = tree(mine)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()) as told:
        file = Path(folder) / "finding.json"
        file.write_text(json.dumps(values))
        code = run(["replay", str(file), "--subject", f"{__name__}:Able"])
    assert tree(mine) == before, (law.id, values["case"])
    assert code == 2, (law.id, place, name, code)
    assert f"case.{place[0]}" in told.getvalue(), told.getvalue()
    assert json.dumps(name)[1:-1] in told.getvalue().replace("\n", ""), told.getvalue()
    assert "find it again with ft verify" in told.getvalue()


@pytest.mark.parametrize(("law", "name"), [("safety.links", "victim"), ("safety.pickle", "file")])
def test_finding_neither_moves_nor_overwrites_what_a_user_has(law: str, name: str, mine: Path, tmp_path: Path) -> None:
    """A name in a finding that is sent around removed the user's folder once, and overwrote a file."""
    file = tmp_path / "finding.json"
    case = {"rows": [{"prompt": "ab", "completion": "cde"}], "name": str(mine / name)}
    file.write_text(json.dumps({**WRITTEN, "law": law, "case": case}))
    before = tree(mine)
    code = run(["replay", str(file)])
    assert (tree(mine), code) == (before, 2)


def test_refusal_tells_value_place_and_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong, where, and what to do, without the letters that move a terminal."""
    file = tmp_path / "finding.json"
    case = {"rows": [{"prompt": "a", "completion": "b"}], "name": "/home/me/\x1b[2J\x00"}
    file.write_text(json.dumps({**WRITTEN, "law": "safety.links", "case": case}))
    assert run(["replay", str(file)]) == 2
    told = capsys.readouterr().err
    for words in ("case.name", '"/home/me/\\u001b[2J\\u0000"', "find it again with ft verify", "adapter"):
        assert words in told, told
    assert "\x1b" not in told


@given(
    st.sampled_from(["template.name", "tokens.cache", "data.train", "model.path", "adapter.target_modules"]),
    st.sampled_from(["/etc/x.jinja", "../x.JINJA", "a/b", "/abs", "..", "x\0y", "-x"]),
)
def test_story_refuses_names_that_lead_elsewhere(key: str, name: str) -> None:
    """No setting of a story is the name of a file."""
    with pytest.raises(ValidationError, match=re.escape(key)):
        TaskRecipe(rows=({"prompt": "a", "completion": "b"},), settings={key: name})


@pytest.mark.parametrize(
    "do", ["write", "append", "remove", "rename in", "rename out", "mkdir", "link", "through", "rmdir"]
)
def test_what_is_confined_cannot_leave(do: str, tmp_path: Path) -> None:
    """Whatever changes something outside of the folder is refused; the same inside is done."""
    scratch, outside = tmp_path / "scratch", tmp_path / "mine"
    for folder in (scratch, outside):
        (folder / "empty").mkdir(parents=True)
        (folder / "file").write_text("mine")
    (scratch / "door").symlink_to(outside)
    acts = {
        "write": lambda folder: (folder / "file").write_text("x"),
        "append": lambda folder: os.close(os.open(folder / "file", os.O_WRONLY | os.O_APPEND)),
        "remove": lambda folder: (folder / "file").unlink(),
        "rename in": lambda folder: (folder / "file").rename(scratch / "taken"),
        "rename out": lambda folder: (scratch / "file").rename(folder / "put"),
        "mkdir": lambda folder: (folder / "made").mkdir(),
        "link": lambda folder: (folder / "made").symlink_to(scratch),
        "through": lambda folder: (folder / "door" / "file" if folder == scratch else folder / "file").write_text("x"),
        "rmdir": lambda folder: (folder / "empty").rmdir(),
    }
    before = tree(outside)
    with confined(scratch):
        with pytest.raises(OutsideError, match="outside"):
            acts[do](outside)
        if do != "through":
            acts[do](scratch)
        else:
            with pytest.raises(OutsideError):
                acts[do](scratch)
        assert (outside / "file").read_text() == "mine"
        with open(os.devnull, "w") as nothing:
            nothing.write("x")
    assert tree(outside) == before
    acts["write"](outside)
