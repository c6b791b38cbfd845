"""The kill matrix as a small text: what killed each fault, and whether a later campaign still does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UsageError
from finetune.verify.faults.fault import faults
from finetune.verify.prove.campaign import Proof

FORMAT = "finetune kill matrix baseline"
VERSION = 1


def baseline_text(found: Proof) -> str:
    """Each fault with its status and, sorted, the laws that kill it: a fault a line, which a diff shows well."""
    head = {"format": FORMAT, "version": VERSION, "tier": found.tier, "backend": found.backend}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    faults = [
        f"    {json.dumps(each.fault.id)}: {json.dumps({'status': each.status, 'laws': sorted(each.laws)})}"
        for each in found.results
    ]
    return "\n".join(["{", *lines, '  "faults": {', ",\n".join(faults), "  }", "}", ""])


def read_baseline(path: Path) -> Mapping[str, Any]:
    """What an earlier campaign wrote.

    Raises:
        UsageError: there is no such file, or it is none of a campaign's.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (values["format"], values["version"]) == (FORMAT, VERSION):
            found: Mapping[str, Any] = values
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{path} is no baseline of `ft prove`", hint="`ft prove --all-laws` writes kill-matrix.json")


def lost_kills(found: Proof, baseline: Mapping[str, Any]) -> list[str]:
    """A sentence for each law that killed a fault in the baseline and does so no more; faults not asked for aside.

    Both must be of one tier and one backend.
    """
    now = {result.fault.id: result for result in found.results}
    lost = [f"{id}, which the baseline has, is no fault any more" for id in baseline["faults"] if id not in faults()]
    for id, before in baseline["faults"].items():
        if id in now:
            result = now[id]
            reason = f": {result.reason}" if result.reason else ""
            gone = [law for law in before["laws"] if law not in result.laws]
            lost += [f"{id} {result.fault.slug} is killed by {law} no more ({result.status}{reason})" for law in gone]
    return lost
