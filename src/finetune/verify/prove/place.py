"""Where a proof lies."""

from pathlib import Path

from finetune.files import make_folder, write_text
from finetune.verify.findings import as_document
from finetune.verify.prove.baseline import baseline_text
from finetune.verify.prove.campaign import Proof


def write_proof(found: Proof, folder: Path, page: str) -> Path:
    """Write `proof.json`, `proof.html` and, where all laws were asked, `kill-matrix.json`; the place of the page."""
    make_folder(folder)
    write_text(folder / "proof.json", as_document(found.as_dict()))
    write_text(folder / "proof.html", page)
    if not found.stop_after:
        write_text(folder / "kill-matrix.json", baseline_text(found))
    return folder / "proof.html"
