"""Laws of CI: what it runs exists, each tier runs when it must, and what it measured is kept."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TIERS = {"workflow": "test-e2e-workflow", "real-model": "test-e2e-real-model", "whole-chain": "test-e2e-all"}


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    """The workflow as GitHub reads it: strict YAML, in which `on` is a word."""
    found = yaml.load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"), yaml.BaseLoader)
    assert isinstance(found, dict)
    return found


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """Every step of every job."""
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_ci_runs_make_targets_that_exist(workflow: dict[str, Any]) -> None:
    """Each of at least 5 targets that a job makes is one of the Makefile's."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = [re.search(r"\bmake (.*)$", step.get("run", "")) for step in steps(workflow)]
    named = {word for found in made if found for word in found[1].split()}
    assert len(named) >= 5
    assert named <= targets


def test_ci_tries_every_python_that_is_promised(workflow: dict[str, Any]) -> None:
    """Tier 1 runs on Linux and macOS with each Python that the package names, no other, and each within its bounds."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = re.findall(r"Python :: (3\.\d+)", project)
    matrix = workflow["jobs"]["workflow"]["strategy"]["matrix"]
    assert matrix["python"] == promised
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}
    [(least, below)] = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project)
    used = [str(job["steps"][1]["with"]["python-version"]) for job in workflow["jobs"].values()]
    minors = [int(each.split(".")[1]) for each in [*promised, *used] if "${{" not in each]
    assert all(int(least) <= minor < int(below) for minor in minors)


def test_ci_runs_each_tier_when_it_must_and_keeps_its_history(workflow: dict[str, Any]) -> None:
    """Tier 1 runs always, Tier 2 on pull requests, Tier 3 on main and at night; 2 and 3 on Apple silicon, too."""
    jobs = workflow["jobs"]
    assert "if" not in jobs["workflow"]
    assert jobs["real-model"]["if"] == "github.event_name == 'pull_request'"
    assert jobs["whole-chain"]["if"] == "github.event_name != 'pull_request'"
    assert {"push", "pull_request", "schedule"} <= set(workflow["on"])
    for name, target in TIERS.items():
        assert "macos-latest" in jobs[name]["strategy"]["matrix"]["os"]
        assert f"make {target}" in [step.get("run") for step in jobs[name]["steps"]]
        kept = jobs[name]["steps"][-1]
        assert (kept["if"], kept["with"]["include-hidden-files"]) == ("always()", "true")
        assert ".finetune/history.jsonl" in kept["with"]["path"]
        assert "matrix.os" in kept["with"]["name"], "two machines cannot hand on one name"


def test_ci_trusts_nobody_more_than_it_must(workflow: dict[str, Any]) -> None:
    """The token may only read, every job ends in time, and every action of others is one fixed commit."""
    assert workflow["permissions"] == {"contents": "read"}
    assert [name for name, job in workflow["jobs"].items() if not 0 < int(job["timeout-minutes"]) <= 120] == []
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert len(used) >= 15
    assert [name for name in used if not re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name)] == []
    kept = [step["with"]["name"] for step in steps(workflow) if "upload-artifact" in step.get("uses", "")]
    assert len(set(kept)) == len(kept)


def test_tiers_are_recorded_by_their_make_targets() -> None:
    """The target of each of 3 tiers says which tier its session is."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = {
        name: makefile.split(f"\n{name}:", 1)[1].split("\n.PHONY")[0]
        for name in ("test-e2e-workflow", "tier2", "test-e2e-mlx")
    }
    assert {name: re.findall(r"\bFT_TIER=(\d)", recipe) for name, recipe in recipes.items()} == {
        "test-e2e-workflow": ["1"],
        "tier2": ["2"],
        "test-e2e-mlx": ["3"],
    }
