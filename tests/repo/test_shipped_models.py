"""The shipped models and data sets: small, awkward, and exactly what their cards and recipe say."""

import re
from pathlib import Path

import pytest

from finetune.chat.catalog import CATALOG
from finetune.chat.render import ChatTemplate
from finetune.chat.tokenizer import FileTokenizer
from finetune.data.shipped import FOLDER, facts_as_jsonl, shipped_facts
from finetune.files import file_hash
from finetune.models.locate import SHIPPED, SHIPPED_FOLDER


def test_shipped_sets_are_what_the_generator_makes() -> None:
    """Every shipped data file is, byte for byte, what the seeded generator gives."""
    sets = shipped_facts()
    assert len(sets) == 3
    for name, facts in sets.items():
        path = FOLDER / f"{name.removeprefix('shipped:')}.jsonl"
        assert path.read_text(encoding="utf-8") == facts_as_jsonl(facts), f"run make reference-model: {name} differs"


@pytest.mark.parametrize("name", SHIPPED)
def test_card_names_the_hash_of_every_file(name: str) -> None:
    """The model card lists every file beside it with its true hash."""
    folder = SHIPPED_FOLDER / name
    card = (folder / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"\| `([^`]+)` \| [\d,]+ \| `([0-9a-f]{64})` \|", card))
    files = {path.name: file_hash(path) for path in folder.iterdir() if path.name != "README.md"}
    assert listed == files
    assert len(files) >= 5


@pytest.mark.parametrize("name", SHIPPED)
def test_control_tokens_are_distinct(name: str) -> None:
    """Pad, end of text and end of turn are three tokens, and every built-in template fits the tokenizer."""
    tokenizer = FileTokenizer(Path(SHIPPED_FOLDER / name))
    turns = {tokenizer.control_id("<|im_end|>"), tokenizer.control_id("<|eot_id|>")}
    assert len({tokenizer.pad_id, tokenizer.eos_id, *turns}) == 4
    assert tokenizer.adds_bos == (tokenizer.bos_id is not None) == (name == "reference-llama")
    for source in CATALOG.values():
        template = ChatTemplate(source, tokenizer.control_tokens, bos=tokenizer.bos, eos=tokenizer.eos)
        assert template.terminators()
