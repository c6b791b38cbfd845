"""Breaks the code in small ways, one at a time, and counts how many breaks Tier 1 alone notices: `make mutants`.

mutmut makes the mutants and knows which tests touch each function. A seeded sample of them is run; those that no
test notices are listed with their change, so that each can be explained or caught.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

from finetune.intervals import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".mutants"
ROOMS = ("config", "data", "chat", "memory", "adapters", "training", "run")
COPIED = ("src", "strategies", "tests", "docs", "bench", "Makefile", "pyproject.toml", "constraints.txt", "LICENSE")
PASSED_OVER = ("test_every_setting",)
"""What is slow for what it adds to the others."""
SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
# Workers that come from a process in which no test has run: what a law keeps between cases would hide a mutant.
process_isolation = "forkserver"
only_mutate = [{rooms}]
pytest_add_cli_args_test_selection = ["tests/properties"]
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "without_shrinking", {passed_over}]
also_copy = ["strategies", "docs", "bench", "Makefile", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]
"""
# mutmut's own words for how a mutant's tests ended.
_ENDS = {0: "survived", 1: "killed", 3: "killed", 5: "no tests", 33: "no tests", 24: "timeout", 36: "timeout"}


def copy_project() -> None:
    """Put the project into a folder of its own: mutants never touch the real files."""
    # Whole, mutmut's own notes included: it would go on running tests by names that they had before.
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    for name in (*COPIED, "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        source, target = ROOT / name, WORK / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(source, target)
    rooms = ", ".join(f'"src/finetune/{room}/*"' for room in ROOMS)
    with (WORK / "pyproject.toml").open("a", encoding="utf-8") as file:
        passed_over = ", ".join(f'"--ignore=tests/properties/{name}.py"' for name in PASSED_OVER)
        file.write(SETTINGS.format(rooms=rooms, passed_over=passed_over))


def mutmut(*arguments: str, quiet: bool = False) -> str:
    """Run mutmut in the copy; its children import the mutated code, too."""
    program = Path(sysconfig.get_path("scripts")) / "mutmut"
    paths = os.pathsep.join(str(WORK / "mutants" / name) for name in ("src", "strategies", "bench"))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "HYPOTHESIS_PROFILE": "fast",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [program, *arguments], cwd=WORK, env=environment, capture_output=quiet, text=True, check=False
    )
    return done.stdout or ""


def read_mutants() -> dict[str, int | None]:
    """How each mutant's tests ended, by name; None when it was not run."""
    found: dict[str, int | None] = {}
    for meta in sorted((WORK / "mutants" / "src").rglob("*.meta")):
        found |= json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def main() -> None:
    """Sample, run, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=400, help="how many mutants to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="only mutants whose name holds this")
    parser.add_argument("--report", type=Path, default=WORK / "report.md")
    asked = parser.parse_args()
    copy_project()
    mutmut("run", "--max-children", "1", "no.such.mutant", quiet=True)
    everything = sorted(name for name in read_mutants() if asked.only in name)
    if not everything:
        sys.exit("mutmut made no mutants: run it by hand in .mutants to see why")
    chosen = random.Random(asked.seed).sample(everything, min(asked.sample, len(everything)))
    print(f"{len(everything):,} mutants, of which {len(chosen)} are run (seed {asked.seed})", flush=True)
    mutmut("run", "--max-children", str(asked.jobs), *chosen)
    ended = read_mutants()
    asked.report.write_text(told(chosen, ended), encoding="utf-8")
    print(asked.report.read_text(encoding="utf-8").split("## Survivors")[0])
    print(f"survivors with their changes: {asked.report}")


def told(chosen: list[str], ended: dict[str, int | None]) -> str:
    """The result by room, then every mutant that was not killed with its change."""
    outcome = {
        name: _ENDS.get(code, f"exit {code}") if (code := ended[name]) is not None else "not run" for name in chosen
    }
    lines = ["# Mutants", "", "| room | run | killed | share | 95% interval |", "|---|---|---|---|---|"]
    for room in (*ROOMS, ""):
        mine = [outcome[name] for name in chosen if f"finetune.{room}" in name]
        killed = sum(end in ("killed", "timeout") for end in mine)
        low, high = wilson_interval(killed, len(mine)) if mine else (0.0, 1.0)
        share = f"{killed / max(1, len(mine)):.0%} | {low:.0%} to {high:.0%}"
        lines.append(f"| {room or 'all'} | {len(mine)} | {killed} | {share} |")
    lines += ["", f"How they ended: {dict(Counter(outcome.values()))}", "", "## Survivors"]
    for name in sorted(name for name in chosen if outcome[name] not in ("killed", "timeout")):
        change = mutmut("show", name, quiet=True).strip()
        lines += ["", f"### {name} ({outcome[name]})", "", "```diff", change, "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
