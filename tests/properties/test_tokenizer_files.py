"""Laws of a tokenizer's files: they are read once, and what they say holds, whichever files and settings there are."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from tokenizers import AddedToken, Tokenizer

from finetune.chat import tokenizer
from finetune.chat.tokenizer import FileTokenizer
from finetune.errors import ModelError
from finetune.models.locate import locate_model
from finetune_strategies.conversations import texts
from finetune_strategies.tokenizers import EOS, KINDS, tokenizer_folder
from support.conversations import (
    FIRST,
    tokenizer_of,
)


def test_tokenizer_is_read_once_and_as_its_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reading serves markup, texts and everybody who opens the folder; what one template makes control tokens
    stays text to another's; a file that was changed is read again.
    """
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder(FIRST), folder)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<q>", "<hole>")])
    file.save(str(folder / "tokenizer.json"))
    saved = json.loads((folder / "tokenizer.json").read_text())
    opened: list[Path] = []
    load = tokenizer._load
    monkeypatch.setattr(tokenizer, "_load", lambda folder: (opened.append(folder), load(folder))[1])
    whole = "a<q>b" + EOS
    turns = FileTokenizer(folder).for_template("<q>")
    assert turns.encode_markup(whole) == file.encode(whole, add_special_tokens=False).ids
    assert len(turns.encode_content(whole)) > len(turns.encode_markup(whole)) + len("<q>") - 1
    assert turns.encode_markup(whole) == FileTokenizer(folder).encode_markup(whole)
    assert len(opened) == 1
    plain = FileTokenizer(folder)
    assert file.token_to_id("<q>") in plain.encode_content(whole)
    assert file.token_to_id("<q>") not in turns.encode_content(whole)
    assert turns.decode(turns.encode_markup(whole)) == "a<q>b"
    assert turns.decode(turns.encode_markup(whole), control=True) == whole
    for each in (plain, turns):
        assert (each.description(), len(each)) == (saved, file.get_vocab_size())
    assert len(opened) == 2
    assert turns.identity() == FileTokenizer(folder).for_template("<q>").identity() != plain.identity()
    file.add_tokens([AddedToken("<new>", special=False, normalized=False)])
    file.save(str(folder / "tokenizer.json"))
    assert FileTokenizer(folder).word(file.token_to_id("<new>")) == "<new>"


def test_tokenizer_own_length_limit_and_padding_are_not_ours(tmp_path: Path) -> None:
    """A tokenizer.json saved with truncation and padding switched on cuts and pads nothing."""
    for path in tokenizer_folder(FIRST).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": EOS,
    }
    file.write_text(json.dumps(settings))
    strict, free = FileTokenizer(tmp_path), tokenizer_of(FIRST)
    for text in ("a b c d e f g h i j", "a"):
        assert strict.encode_content(text) == free.encode_content(text)
        assert strict.encode_markup(text) == free.encode_markup(text)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[FileTokenizer, FileTokenizer]:
    """The shipped GPT-2 tokenizer, as one file and as two."""
    folder = locate_model("reference-gpt2").folder
    other = tmp_path_factory.mktemp("merges")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, other)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {**model["model"]["vocab"], **{token["content"]: token["id"] for token in model["added_tokens"]}}
    (other / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["model"]["merges"]]
    (other / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return FileTokenizer(folder), FileTokenizer(other)


@given(text=texts())
def test_merges_make_the_ids_of_the_one_file(both: tuple[FileTokenizer, FileTokenizer], text: str) -> None:
    """Every text becomes the same ids, and back."""
    one, two = both
    assert two.encode_content(text) == one.encode_content(text)
    assert two.decode(two.encode_content(text)) == one.decode(one.encode_content(text))


def test_merges_keep_the_ends_and_the_padding(both: tuple[FileTokenizer, FileTokenizer]) -> None:
    """End, padding and begin are those of the settings, and in markup they are control tokens."""
    one, two = both
    assert (two.eos_id, two.pad_id, two.bos_id, two.adds_bos) == (one.eos_id, one.pad_id, one.bos_id, one.adds_bos)
    for token in {one.eos, one.bos} - {""}:
        assert two.encode_markup(f"a{token}b") == one.encode_markup(f"a{token}b")
        assert two.encode_content(token) == one.encode_content(token)
        assert token in two.control_tokens


def test_merges_take_their_marks_from_either_settings_file(tmp_path: Path, both: object) -> None:
    """Tokens named only in special_tokens_map.json, as text or as an object, are control tokens, too."""
    folder = locate_model("reference-gpt2").folder
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = [token["content"] for token in model["added_tokens"] if token["content"] != "<|endoftext|>"][:3]
    vocabulary = {**model["model"]["vocab"], **{token["content"]: token["id"] for token in model["added_tokens"]}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": names[0]}))
    marks = {"pad_token": {"content": names[1]}, "unk_token": names[2], "bos_token": "<not there>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(marks))
    found = FileTokenizer(tmp_path)
    assert set(found.control_tokens) == {*names, "<|endoftext|>"}
    assert "<not there>" not in found.control_tokens
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        FileTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "model", "expected"),
    [
        ({"eos_token": "</s>", "pad_token": "<|pad|>"}, {"eos_token_id": 1}, ("</s>", "<|pad|>")),
        ({"eos_token": {"content": "</s>"}}, {"pad_token_id": 1}, ("</s>", "<|pad|>")),
        ({}, {"eos_token_id": [0, 1], "pad_token_id": 1}, ("</s>", "<|pad|>")),
        ({}, {"eos_token_id": 0, "pad_token_id": []}, ("</s>", "</s>")),
        ({"pad_token": ""}, {"eos_token_id": 0}, ("</s>", "</s>")),
    ],
)
def test_ends_come_from_the_settings_or_else_from_the_models_ids(
    settings: dict[str, object], model: dict[str, object], expected: tuple[str, str], tmp_path: Path
) -> None:
    """A named token is taken as it is named, else the id in config.json (the first of several), else the end pads."""
    shutil.copy(tokenizer_folder(KINDS[0]) / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    found = FileTokenizer(tmp_path)
    assert (found.eos, found.pad_id) == (expected[0], found.control_id(expected[1]))
    assert found.stop_ids == (0, 5)


@pytest.mark.parametrize(
    ("settings", "bos"), [({}, "</s>"), ({"bos_token": None}, ""), ({"bos_token": "<|pad|>"}, "<|pad|>")]
)
def test_no_begin_of_text_is_none_whatever_the_model_says(
    settings: dict[str, object], bos: str, tmp_path: Path
) -> None:
    """Settings that say null mean that there is none; the id in config.json counts where they say nothing."""
    shutil.copy(tokenizer_folder(KINDS[0]) / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, **settings}))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0}))
    assert FileTokenizer(tmp_path).bos == bos


@pytest.mark.parametrize("ids", [10**200, -1, "2", 1.5, True, [0, None]])
def test_end_that_is_no_id_is_refused_by_its_place(ids: object, tmp_path: Path) -> None:
    """What generation_config.json names as an end is a token's id, or null for none; all else is told with its file."""
    shutil.copytree(tokenizer_folder(KINDS[0]), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id has .* no token's id"):
        FileTokenizer(tmp_path)
    file.write_text('{"eos_token_id": null}')
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": ids, "pad_token_id": ids}))
    assert FileTokenizer(tmp_path).stop_ids == (FileTokenizer(tmp_path).eos_id,)


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        {"model": {"type": "WordLevel", "vocab": {EOS: 0}, "unk_token": "none"}, "pre_tokenizer": None},
    ],
    ids=["panic", "bare exception"],
)
def test_tokenizer_that_cannot_be_used_is_refused(part: dict[str, object], tmp_path: Path) -> None:
    """A file that the library reads, and by which it then panics or fails, is one error that names its folder."""
    shutil.copytree(tokenizer_folder(KINDS[0]), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **part, "post_processor": None}))
    with pytest.raises(ModelError, match=r"can be read and not be used") as caught:
        FileTokenizer(tmp_path).encode_content("some text")
    assert str(tmp_path) in str(caught.value)
