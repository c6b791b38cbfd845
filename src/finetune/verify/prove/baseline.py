"""What a campaign leaves: the proof, and the kill matrix as a small text, by which a later campaign is judged."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UsageError
from finetune.files import make_folder, write_text
from finetune.verify.faults.fault import faults
from finetune.verify.findings import as_document
from finetune.verify.prove.campaign import Campaign, Proof

FORMAT = "finetune kill matrix baseline"
VERSION = 1


def write_proof(found: Proof, folder: Path, page: str) -> Path:
    """Write `proof.json`, `proof.html` and, where all laws were asked, `kill-matrix.json`; the place of the page."""
    make_folder(folder)
    write_text(folder / "proof.json", as_document(found.as_dict()))
    write_text(folder / "proof.html", page)
    if not found.stop_after:
        write_text(folder / "kill-matrix.json", baseline_text(found))
    return folder / "proof.html"


def baseline_text(found: Proof) -> str:
    """Each fault with its status and, sorted, the laws that kill it: a fault a line, which a diff shows well."""
    head = {"format": FORMAT, "version": VERSION, "tier": found.tier, "backend": found.backend, "times": found.times}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    faults = [
        f"    {json.dumps(each.fault.id)}: {json.dumps({'status': each.status, 'laws': sorted(each.laws)})}"
        for each in found.results
    ]
    return "\n".join(["{", *lines, '  "faults": {', ",\n".join(faults), "  }", "}", ""])


def read_baseline(path: Path, campaign: Campaign) -> Mapping[str, Any]:
    """What an earlier campaign of this tier, backend and effort wrote.

    Raises:
        UsageError: there is no such file, or it is none of such a campaign's.
    """
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = (found["format"], found["version"]) == (FORMAT, VERSION)
        kind = found["tier"], found["backend"], found["times"]
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UsageError(f"{path} is no baseline of `ft prove`", hint="`ft prove --all-laws` writes kill-matrix.json")
    if kind != (campaign.tier, campaign.backend, campaign.times):
        raise UsageError(f"{path} is of another campaign", hint="say --tier {} --backend {} --times {}".format(*kind))
    return found


def lost_kills(found: Proof, baseline: Mapping[str, Any]) -> list[str]:
    """A sentence for each law that killed a fault in the baseline and does so no more; faults not asked for aside."""
    now = {result.fault.id: result for result in found.results}
    lost = [f"{id}, which the baseline has, is no fault any more" for id in baseline["faults"] if id not in faults()]
    for id, before in baseline["faults"].items():
        if id in now:
            result = now[id]
            reason = f": {result.reason}" if result.reason else ""
            gone = [law for law in before["laws"] if law not in result.laws]
            lost += [f"{id} {result.fault.slug} is killed by {law} no more ({result.status}{reason})" for law in gone]
    return lost
