"""Writes the pages about the suite from the suite itself and from what was measured with it: `make docs`.

What was measured lies in `docs/evidence/`: `proof.json` of `ft prove`, and of each trainer that was judged a folder
that `ft verify --output` wrote, with a file to replay for each finding. `notes.yaml` says beside a finding why a
maintainer might call it intended.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.verify.catalogue import Law, case_laws, catalogue
from finetune.verify.results import severity_of

EVIDENCE = Path(__file__).resolve().parent / "evidence"
CANDIDATES = {
    "the loss mask reaches one token into the padding": "padding.no_target",
    "accumulation is a mean of means": "gradient.oracle",
    "the last incomplete batch is dropped": "batches.cover",
    "a run goes on with its weights alone": "resume.same",
    "a second run writes over the adapter of the first": "runs.untouched",
    "rows are sorted by the number of their keys, not by their length": "rows.remarks",
    "unknown keys of the configuration are taken": "config.unknown",
    "a model's `rope_parameters` are passed over": "model.rope_spelling",
}
"""What mlx-lm's source suggested before anything was run, and the law that is about it."""
_COSTS = {1: "milliseconds", 2: "tens of milliseconds", 3: "a tenth of a second"}


def laws_page() -> str:
    """Every law with its id, sentence, oracle, cost and the faults that it kills."""
    kills = _kills()
    laws = case_laws()
    told = [law for law in catalogue().values() if law.scene]
    lines = [
        "# The laws",
        "",
        "Made from the code by `make docs`; the faults that each kills are those of the last campaign ([kill",
        "matrix](kill-matrix.md)). `ft verify --law ID` judges one.",
        "",
        f"{len(laws)} laws are held against cases that are drawn, {len(told)} against stories that machines tell.",
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
    """What was found in each trainer that was judged, with the smallest case and how to have it again."""
    notes = yaml.safe_load((EVIDENCE / "notes.yaml").read_text(encoding="utf-8")) or {}
    lines = [
        "# Findings",
        "",
        "What the suite said of other people's trainers, on one machine, with the versions named. Made by `make",
        "docs` from what `ft verify --output` wrote into `docs/evidence/`. Only what was run is told. A law that is",
        "broken is a difference between a trainer and a sentence; where its makers might say that they mean it so, the",
        "note says so.",
        "",
    ]
    lines += _candidates()
    for path in sorted(EVIDENCE.glob("*/verification*.json")):
        lines += _subject(path, notes.get(path.parent.name, {}))
    return "\n".join(lines) + "\n"


def _candidates() -> list[str]:
    """Which of the candidates the laws found by themselves, and in how small a case."""
    found = json.loads((EVIDENCE / "mlx-lm" / "verification.json").read_text(encoding="utf-8"))
    judged = {each["law"]: each for each in found["laws"]}
    lines = [
        "## What was looked for in mlx-lm",
        "",
        "Reading its source had suggested these before anything was run. Each law is one that any trainer is held to.",
        "A finding of a trainer in another environment is tried again with `--python PATH` added.",
        "",
        "| suspected | law | outcome | rows in the smallest case |",
        "|---|---|---|---|",
    ]
    for what, law in CANDIDATES.items():
        case = judged[law]["case"] or {}
        rows = len(case["rows"]) if "rows" in case else sum(map(len, case.get("micro", ()))) or "none needed"
        lines.append(f"| {what} | `{law}` | {judged[law]['outcome']} | {rows} |")
    return [*lines, ""]


def _subject(path: Path, notes: Mapping[str, str]) -> list[str]:
    found, name = json.loads(path.read_text(encoding="utf-8")), path.parent.name
    versions = ", ".join(f"{library} {number}" for library, number in found["versions"].items())
    counts = ", ".join(f"{count} {word}" for word, count in found["counts"].items() if count)
    later = "" if path.stem == "verification" else ", laws that came later"
    lines = [
        f"## {found['subject']}{later}",
        "",
        f"{versions}; {found['machine']}; tier {found['tier']}, seed {found['seed']}, {found['seconds']:.0f} s:",
        f"{counts}.",
        "",
    ]
    for judgement in found["laws"]:
        if judgement["outcome"] == "failed":
            lines += _finding(judgement, name, notes.get(judgement["law"], ""))
    unjudged = [each for each in found["laws"] if each["outcome"] not in ("passed", "failed")]
    if unjudged:
        lines += ["Not judged:", ""]
        lines += [f"- `{each['law']}`: {each['outcome']}: {_line(each['why'])}" for each in unjudged]
        lines.append("")
    return lines


def _finding(judgement: Mapping[str, Any], name: str, note: str) -> list[str]:
    lines = [
        f"### {name}: {judgement['statement']}",
        "",
        f"- law: [`{judgement['law']}`](laws.md), {severity_of(judgement['law'])}",
        f"- expected: {_line(judgement['expected'])}",
        f"- got: {_line(judgement['got'])}",
    ]
    if judgement["case"] is not None:
        lines.append(f"- smallest case: `{json.dumps(judgement['case'], ensure_ascii=False)}`")
        lines.append(f"- again: `ft replay docs/evidence/{name}/{judgement['law']}.json --subject {name}`")
    if judgement["why"]:
        lines.append(f"- {_line(judgement['why'])}")
    if note:
        lines.append(f"- intended? {note}")
    return [*lines, ""]


def _line(words: str) -> str:
    """Words in one line, and none of them markup."""
    told = " ".join(words.split())
    return f"`{told.replace('`', chr(39))}`" if told else ""
