"""What our own trainer hands on: merged models, GGUF files, and the table of `ft compare`."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.backends import open_backend
from finetune.export.result import open_result
from finetune.ports import Session
from finetune.verify.stateful.deaths import Death
from finetune.verify.stateful.lives import Ending
from finetune.verify.trainers.ours_program import OurProgram


class OurExports(OurProgram):
    """`ft` with one backend, and what it hands on."""

    def merge(self, folder: Path, death: Death | None = None) -> Ending:
        """`ft merge`."""
        return self.ft(folder, death, "merge", str(folder))

    def take_off(self, folder: Path) -> Ending:
        """A session that writes the merged model, and then answers without its adapter."""
        return self.fork_server.run("support.our_exports:take_off", [str(folder)], folder, None)

    def export(
        self, source: Path, outtype: str, *, output: Path | None = None, alone: bool = False, death: Death | None = None
    ) -> Ending:
        """`ft export`."""
        words = ["export", str(source), "--outtype", outtype, "--backend", self.backend]
        words += ["--output", str(output)] if output else []
        words += ["--adapter-only"] if alone else []
        return self.ft(output.parent if output else source, death, *words)

    def compare(self, folder: Path, through: Sequence[str], death: Death | None = None) -> Ending:
        """`ft compare`."""
        return self.ft(folder, death, "compare", str(folder), "--json", "--through", ",".join(through))


def take_off() -> None:
    """The program of `OurExports.take_off`."""
    result = open_result(Path(sys.argv[1]), open_backend)
    tuned = result.open()
    pad_id = result.encoder.tokenizer.pad_id
    base = open_backend(result.config.backend).open(result.location, "float32", pad_id)
    prompts = [prompt for prompt in result.prompts() if len(prompt) < 64]
    before, grown = tuned.fingerprints(), _logits(tuned, prompts)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        tuned.save_model(Path(folder))
    with tuned.adapter_disabled():
        off = _logits(tuned, prompts)
    plain = _logits(base, prompts)
    told = {
        "kept": tuned.fingerprints() == before,
        "base": all(map(np.array_equal, off, plain)),
        "another": not any(map(np.array_equal, grown, plain)),
    }
    sys.stdout.write(json.dumps(told) + "\n")


def _logits(session: Session, prompts: Sequence[Sequence[int]]) -> list[Any]:
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        path = Path(folder) / "logits.safetensors"
        session.save_logits(prompts, path)
        found = load_file(path)
    return [found[str(number)] for number in range(len(prompts))]
