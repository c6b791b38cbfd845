"""The campaign that counts how often the verdict errs: runs of known kind, each judged once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
TOOL = Path(__file__).resolve().parents[2] / "bench" / "rates.py"


def test_campaign_judges_each_kind_once_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A run that did nothing fails its goal, four rows decide nothing, and what is done is not done again."""
    output = tmp_path / "rates.jsonl"
    words = [sys.executable, str(TOOL), "--runs", "1", "--jobs", "1", "--output", str(output)]
    first = subprocess.run([*words, "--kind", "nothing"], capture_output=True, text=True, check=True)
    assert "1 of 1 seeds to do" in first.stderr
    both = [*words, "--kind", "nothing", "--kind", "few rows"]
    subprocess.run(both, capture_output=True, text=True, check=True)
    again = subprocess.run(both, capture_output=True, text=True, check=True)
    assert "0 of 1 seeds to do" in again.stderr
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(line["kind"], line["outcome"]) for line in lines] == [("nothing", "failed"), ("few rows", "inconclusive")]
    assert lines[0]["claims"]["claim-rows"] == lines[0]["claims"]["claim-unseen"] == "failed"
    assert lines[1]["claims"]["claim-rows"] == "inconclusive"
