"""Laws of the token cache's names: where files lie and where a run writes is no part of them."""

import shutil
from pathlib import Path

import pytest

from finetune.chat.cache import cache_key
from finetune.chat.tokenizer import FileTokenizer
from finetune.train import fine_tune
from finetune_strategies.tokenizers import KINDS, TokenizerKind, tokenizer_folder
from support.encoders import talk, template_of, tokenizer_of
from support.workplace import make_data, make_model, settings, without_reload_check


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cache_key_is_the_same_wherever_the_tokenizer_lies(kind: TokenizerKind, tmp_path: Path) -> None:
    """P-CACHE: a copy of a tokenizer in another folder makes the same ids, and so has the same names."""
    shutil.copytree(tokenizer_folder(kind), tmp_path / "copy")
    rows = [template_of(kind, "alpaca").render(talk("user:a", "assistant:b"))]
    assert cache_key(rows, FileTokenizer(tmp_path / "copy")) == cache_key(rows, tokenizer_of(kind))


def test_cache_is_found_again_by_a_run_elsewhere(tmp_path: Path) -> None:
    """P-CACHE: another output, seed, length of run and copy of the model take the ids from the cache; none is added."""
    data = make_data(tmp_path / "rows.jsonl", 5)
    cache = tmp_path / "cache"
    kept = []
    for number in range(2):
        model = make_model(tmp_path / f"model {number}")
        changes = {"training__seed": number, "training__epochs": 1.0 + number, "tokens__max_length": 100 + number}
        with without_reload_check():
            fine_tune(settings(model, data, tokens__cache=str(cache), **changes), output=tmp_path / f"run {number}")
        kept.append({path.name: path.stat().st_mtime_ns for path in cache.iterdir()})
    assert len(kept[0]) == 1
    assert kept[0] == kept[1]
