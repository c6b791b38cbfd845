"""Where a proof lies."""

from pathlib import Path

from finetune.artifacts.write import make_folder, write_text
from finetune.verify.prove.campaign import Proof
from finetune.verify.suite.findings import as_document


def write_proof(found: Proof, folder: Path, page: str) -> Path:
    """Write `proof.json` and `proof.html` into a folder; the place of the page."""
    make_folder(folder)
    write_text(folder / "proof.json", as_document(found.as_dict()))
    write_text(folder / "proof.html", page)
    return folder / "proof.html"
