"""Writes the pages about the suite from the suite itself and from what was measured with it: `make docs`.

What was measured lies in `docs/evidence/`: `proof.json` of `ft prove`, and of each trainer that was judged a folder
that `ft verify --output` wrote, with a file to replay for each broken law. `causes.yaml` says what
these laws come from, and which of them are no finding.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.verify.catalogue import Law, case_laws, catalogue

EVIDENCE = Path(__file__).resolve().parent / "evidence"
SCRIPTS = EVIDENCE / "scripts"
_COSTS = {1: "milliseconds", 2: "tens of milliseconds", 3: "a tenth of a second"}


def laws_page() -> str:
    """Every law with its id, sentence, oracle, cost and the faults that it kills."""
    kills = _kills()
    laws = case_laws()
    told = [law for law in catalogue().values() if law.scene]
    lines = [
        "# The laws",
        "",
        f"What `ft verify` judges a trainer by: {len(laws)} properties on generated inputs, and {len(told)} stateful",
        "tests of our own. `ft verify --law ID` judges one. The faults that each kills are those of the last campaign",
        "([kill matrix](kill-matrix.md)).",
        "",
    ]
    for tier in (1, 2):
        of_tier = [law for law in laws.values() if law.tier == tier]
        if of_tier:
            lines += [f"## Tier {tier}", ""]
            for law in of_tier:
                lines += _law(law, kills.get(law.id, ()))
    lines += [
        "## Laws of stories",
        "",
        "State machines hold our own trainer to these in real processes that are killed, moved and spoilt; each",
        "failure is a finding that `ft replay` tries again. The oracle is a run of the task that nobody disturbed.",
        "",
        "| law | statement | a failure means |",
        "|---|---|---|",
    ]
    lines += [f"| `{law.id}` | {law.statement} | {law.severity} |" for law in told]
    return "\n".join(lines) + "\n"


def _law(law: Law, kills: Sequence[str]) -> list[str]:
    cost = _COSTS.get(law.cost, "longer") if law.tier == 1 else "seconds"
    lines = [
        f"### {law.id}",
        "",
        law.statement,
        "",
        f"- asks for: {', '.join(f'`{ability}`' for ability in law.needs)}",
        f"- decided by: {law.oracle}",
        f"- a failure means: {law.severity}",
        f"- a case costs: {cost}",
    ]
    first = _proof().get("stop_after") == 1
    word, none = (
        ("first to catch", "none: cheaper laws had caught them") if first else ("kills", "none that is planted")
    )
    if law.id not in _proof().get("laws", ()):
        none = "the last campaign did not ask it"
    lines.append(f"- {word}: {', '.join(kills) or none}")
    return [*lines, ""]


def _kills() -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for fault in _proof().get("faults", []):
        for law in fault["laws"]:
            found[law].append(f"{fault['fault']} `{fault['slug']}`")
    return found


def _proof() -> dict[str, Any]:
    path = EVIDENCE / "proof.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return values


def _idle(laws: list[str] | None) -> list[str]:
    """Which laws caught nothing, where every law was asked of every fault."""
    if laws is None:
        return []
    told = ", ".join(f"`{law}`" for law in laws) or "none"
    return [f"- Every law was asked of every fault. Laws that caught none: {told}."]


def kill_matrix_page() -> str:
    """What the last campaign came to, fault by fault."""
    proof = _proof()
    counts, clean, bound = proof["counts"], proof["clean_runs"], proof["false_alarm_bound"]
    total = sum(counts.values())
    every = "" if proof["stop_after"] else " --all-laws"
    lines = [
        "# Kill matrix",
        "",
        "Each fault is of a kind that trainers have had; a public case is named. It is planted in our own, in a",
        "process of its own, and the laws are judged, cheapest first. Made by `make docs` from",
        "`docs/evidence/proof.json`, which",
        f"`ft prove --tier {proof['tier']} --seeds {clean}{every}` wrote; its page has the [matrix as a",
        "picture](evidence/proof.html).",
        "",
        f"- **{counts['killed']} of {total}** faults are killed ({counts['killed'] / total:.1%}), by",
        f"  {len(proof['laws'])} laws of tier {proof['tier']}; {counts['survived']} survived,",
        f"  {counts['equivalent']} changed nothing that this tier asks for; {counts['error']} ended in an error, for",
        "  the reason in the table. A fault is killed by a law that is broken on evidence, and by nothing else.",
        f"- **{len(proof['false_alarms'])} of {clean}** runs without a fault were called broken: with 95%",
        f"  confidence at most {bound:.1%} of such runs are.",
        *_idle(proof["idle"]),
        f"- All of it took {proof['seconds'] / 60:.0f} minutes on the machine where it was measured.",
        "",
        f"| fault | what goes wrong | seen in | {'first killed by' if proof['stop_after'] == 1 else 'killed by'} |",
        "|---|---|---|---|",
    ]
    for fault in proof["faults"]:
        by = ", ".join(f"`{law}`" for law in fault["laws"][:4])
        more = f" and {len(fault['laws']) - 4} more" if len(fault["laws"]) > 4 else ""
        reason = "".join(fault["reason"].splitlines()[:1]).replace("|", "\\|")
        told = f"{by}{more}" if fault["status"] == "killed" else f"**{fault['status']}**" + (reason and f": {reason}")
        lines.append(f"| {fault['fault']} `{fault['slug']}` | {fault['what']} | {fault['real']} | {told} |")
    return "\n".join(lines) + "\n"


def findings_page() -> str:
    """What is wrong in trainers that were judged, by its cause, with a script; and what was no finding, with why."""
    found = yaml.safe_load((EVIDENCE / "causes.yaml").read_text(encoding="utf-8"))
    causes, beside = found["causes"], found["beside"]
    runs = [(path.parent.name, json.loads(path.read_text(encoding="utf-8"))) for path in _verifications()]
    broken = sum(run["counts"]["failed"] for _, run in runs)
    unnamed = sum(not cause["threads"] for cause in causes)
    lines = [
        "# Findings",
        "",
        f"What is wrong in other people's trainers: {len(causes)} causes, each with a script that uses the component's",
        "own interface alone and was run with the versions below. They stand under the component that is to be mended,",
        f"not under the trainer that was judged. {broken} laws are broken in what was run: most by these causes,",
        "and [the rest is no finding](#broken-and-no-finding), for a reason that is told. Of the causes",
        f"{unnamed} are named by no public thread that we found; the others are known. Made by `make docs` from",
        "`docs/evidence/causes.yaml` and from what `ft verify --output` wrote beside it.",
        "",
        "| component | what goes wrong | severity | what it says |",
        "|---|---|---|---|",
        *(f"| {each['component']} | {each['what']} | {each['severity']} | {each['told']} |" for each in causes),
        "",
    ]
    for cause in causes:
        lines += _cause(cause)
    lines += ["## Broken, and no finding", "", "| trainer | law | why |", "|---|---|---|"]
    for kind in beside.values():
        for trainer, laws in kind["laws"].items():
            lines += [f"| {trainer} | `{law}` | {kind['why']}. {why} |" for law, why in laws.items()]
    return "\n".join([*lines, "", *_what_was_run(runs)]) + "\n"


def _cause(cause: Mapping[str, Any]) -> list[str]:
    script = f"{cause['script']}.py"
    text = (SCRIPTS / script).read_text(encoding="utf-8")
    expected = next(line for line in text.splitlines() if "expected: " in line).partition("expected: ")[2]
    threads = "; ".join(cause["threads"]) or "none found"
    lines = [
        f"### {cause['component']}: {cause['what'].removesuffix('.')}",
        "",
        f"- expected: {_line(expected.rpartition(chr(34))[0])}",
        f"- got: {_line(cause['got'])}",
        f"- script: [`{script}`](evidence/scripts/{script}), {len(text.splitlines())} lines",
        f"- severity: {cause['severity']}; what it says: {cause['told']}",
        f"- public threads: {threads}",
    ]
    for trainer, laws in cause["laws"].items():
        named = ", ".join(f"[`{law}`](laws.md)" for law in laws)
        lines += [f"- broken by it, asked of {trainer}: {named}"]
        lines += [
            f"    - `ft replay docs/evidence/{trainer}/{law}.json --subject {trainer}`"
            for law in laws
            if (EVIDENCE / trainer / f"{law}.json").exists()
        ]
    if "note" in cause:
        lines += ["", cause["note"].strip()]
    return [*lines, ""]


def _verifications() -> list[Path]:
    return sorted(EVIDENCE.glob("*/verification*.json"))


def _what_was_run(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    lines = ["## What was run", ""]
    for _, run in runs:
        versions = ", ".join(f"{library} {number}" for library, number in run["versions"].items())
        counts = ", ".join(f"{count} {word}" for word, count in run["counts"].items() if count)
        lines += [
            f"- {run['subject']}: {versions}; {run['machine']}; tier {run['tier']}, seed {run['seed']},",
            f"  {run['seconds']:.0f} s: {counts}.",
        ]
    lines += ["", "A law that holds was tried on a few cases. Laws that were not judged:", ""]
    lines += ["| trainer | law | why |", "|---|---|---|"]
    for name, run in runs:
        unjudged = [each for each in run["laws"] if each["outcome"] not in ("passed", "failed")]
        lines += [f"| {name} | `{each['law']}` | {each['outcome']}: {_line(each['why'])} |" for each in unjudged]
    return lines


def _line(words: str) -> str:
    """Words in one line, and none of them markup."""
    told = " ".join(words.split())
    return f"`{told.replace('`', chr(39))}`" if told else ""
