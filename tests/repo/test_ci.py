"""Laws of CI: what it runs exists, each tier runs when it must, and what it measured is kept."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
USES = re.compile(r"^\s*(?:- )?uses: (\S+?)@(\S+)(?: # (\S+))?$", re.MULTILINE)
MAY_WRITE = {("release", "publish"): {"id-token"}, ("pages", "deploy"): {"pages", "id-token"}}
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


def test_ci_runs_both_ends_of_each_stated_range(workflow: dict[str, Any]) -> None:
    """Each of 6 frameworks has a range; CI runs its lowest version and its newest, and what is tested lies within."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = [Requirement(each) for each in (*extras["torch"], *extras["mlx"])]
    assert {each.name for each in asked} == {"torch", "transformers", "peft", "accelerate", "mlx", "mlx-lm"}
    lowest, tested = (
        dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in ("constraints-lowest.txt", "constraints.txt")
    )
    for each in asked:
        bounds = {bound.operator: bound.version for bound in each.specifier}
        assert bounds.keys() == {">=", "<"}, each
        assert Version(bounds[">="]) == Version(lowest[each.name]), each
        assert tested[each.name] in each.specifier, each
    assert lowest["mlx-cpu"] == lowest["mlx"]
    job = workflow["jobs"]["versions"]
    assert job["strategy"]["matrix"]["constraints"] == ["constraints-lowest.txt", "/dev/null"]
    [step] = [step for step in job["steps"] if step.get("run") == "make test-e2e-real-model"]
    assert step["env"]["CONSTRAINTS"] == "${{ matrix.constraints }}"
    assert "schedule" in job["if"]


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


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_trust_nobody_more_than_they_must(path: Path) -> None:
    """The token may only read where a job need not write and is kept by no step, every job ends, no text is run."""
    workflow = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert 0 < int(job["timeout-minutes"]) <= 120, name
        written = {what for what, how in job.get("permissions", {}).items() if how == "write"}
        assert written == MAY_WRITE.get((path.stem, name), set())
    for step in steps(workflow):
        assert "${{" not in step.get("run", "")
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"
    kept = [step["with"]["name"] for step in steps(workflow) if "upload-artifact" in step.get("uses", "")]
    assert len(set(kept)) == len(kept)


def test_actions_of_others_are_named_by_one_commit_each() -> None:
    """In workflows, in the action and on pages each is a whole commit with its version, the same everywhere."""
    texts = [*WORKFLOWS, ROOT / "action.yml", *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    assert {path.stem for path in WORKFLOWS} == {"tests", "release", "pages"}
    named = [found for path in texts for found in USES.findall(path.read_text(encoding="utf-8"))]
    others = [found for found in named if not found[0].startswith("finetune-suite/")]
    assert len(others) >= 25
    assert [found for found in others if not re.fullmatch(r"[0-9a-f]{40}", found[1]) or not found[2]] == []
    assert {name.split("/")[0] for name, _, _ in others} == {"actions", "github"}
    assert len({name for name, _, _ in others}) == len(set(others))


def test_package_is_published_without_a_secret() -> None:
    """What is published was built and tried in a job that may not publish, and no workflow reads a secret."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in WORKFLOWS}
    assert [name for name, text in texts.items() if "secrets." in text] == []
    jobs = yaml.load(texts["release"], yaml.BaseLoader)["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert [step for step in jobs["publish"]["steps"] if "checkout" in step.get("uses", "")] == []


def test_forms_and_citation_are_well_formed() -> None:
    """Each of 3 forms asks for something by ids of its own, and the citation is of the version that is built."""
    forms = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        ids = [part["id"] for part in form["body"]]
        assert form["name"]
        assert form["description"]
        assert len(set(ids)) == len(ids) > 0
        assert {part["type"] for part in form["body"]} <= {"textarea", "input", "dropdown"}
        assert any(part.get("validations", {}).get("required") for part in form["body"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{citation["version"]}"\n' in project
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_hooks_of_a_commit_are_not_run_again_by_a_push() -> None:
    """`test-e2e-quick` runs on each commit, and its other form before a push alone."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    stages = {hook["id"]: hook.get("stages", hooks["default_stages"]) for hook in hooks["repos"][0]["hooks"]}
    assert (stages["test-e2e-quick"], stages["test-e2e-quick-push"]) == (["pre-commit"], ["pre-push"])


@pytest.mark.parametrize(
    ("given", "gpu", "at_hand", "index"),
    [
        ([], False, False, "https://download.pytorch.org/whl/cpu"),
        ([], False, True, None),
        ([], True, False, None),
        (["TORCH_INDEX="], False, False, None),
        (["TORCH_INDEX=mine"], True, True, "mine"),
    ],
    ids=["no GPU", "a CPU build is at hand", "a GPU", "none wanted", "another"],
)
def test_torch_comes_without_cuda_where_there_is_no_gpu(
    given: list[str], gpu: bool, at_hand: bool, index: str | None, tmp_path: Path
) -> None:
    """Torch's own index is asked for a CPU build, unless one is at hand, a GPU is there, or an index is set."""
    venv, asked = tmp_path / "venv", tmp_path / "asked"
    version = "2.13.0+cpu" if at_hand else "2.13.0"
    programs = {
        venv
        / "bin"
        / "pip": f"""case "$*" in *--report*) echo '"version": "{version}"';; *) echo "$@" >> {asked};; esac""",
        tmp_path / "uname": "echo Linux",
        **({tmp_path / "nvidia-smi": "exit 0"} if gpu else {}),
    }
    (venv / "bin").mkdir(parents=True)
    for path, body in programs.items():
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    (venv / "python-ok").touch()
    command = ["make", "-o", f"{venv}/python-ok", f"VENV={venv}", *given, f"{venv}/torch-ok"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = asked.read_text().splitlines()
    assert first.endswith("constraints.txt torch" if index is None else f"--index-url {index} torch")
    assert "--quiet" in first
    assert "index-url" not in second


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
