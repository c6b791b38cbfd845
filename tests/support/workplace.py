"""A place to fine-tune in, whole and in milliseconds: tiny models with real tokenizers, small data, no framework."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tokenizers import AddedToken, Tokenizer

from finetune.backends import open_backend
from finetune.config import LoadedConfig, load_config, load_plan
from finetune.events import Event, TrackerOpened
from finetune.records import Reload
from finetune.run.folder import RunFolder
from finetune.train import fine_tune
from finetune_strategies.tokenizers import KINDS, TokenizerKind, tokenizer_folder

ADAPTER = "adapter/adapter_model.safetensors"
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 12,
    "intermediate_size": 9,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 0,
}
OWN_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_version = cache(version)
QUICK: dict[str, Any] = {
    "backend": "reference",
    "template.name": "chatml",
    "adapter.rank": 2,
    "tokens.max_length": 128,
    "training.epochs": 2.0,
    "training.batch_size": 3,
    "training.learning_rate": 0.01,
    "evaluation.questions": 3,
    "evaluation.max_new_tokens": 3,
    "judge.control": "never",
    "judge.memory": "never",
}


def make_model(folder: Path, *, kind: TokenizerKind = KINDS[0], seed: int = 0, calls: bool = False) -> Path:
    """A tiny random Llama with a tokenizer of this kind, or with that of `CALLING_TEMPLATE`."""
    folder.mkdir(parents=True)
    if calls:
        calling_tokenizer(folder)
    else:
        shutil.copytree(tokenizer_folder(kind), folder, dirs_exist_ok=True)
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    open_backend("reference").create({**LLAMA, "vocab_size": words}, folder, seed=seed)
    return folder


CALLING_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}"
    "{{ '[CALL]' + m.tool_calls[0].function | tojson + '<|call|>' }}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Mistral's and gpt-oss': a call begins with a control token, and ends with another than an answer."""


def calling_tokenizer(folder: Path) -> Path:
    """A tokenizer with the control tokens of `CALLING_TEMPLATE`, which is its own template."""
    shutil.copytree(tokenizer_folder(KINDS[0]), folder, dirs_exist_ok=True)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("[CALL]", "<|call|>")])
    file.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CALLING_TEMPLATE, encoding="utf-8")
    config = {"model_type": "llama", "vocab_size": file.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def make_data(path: Path, count: int, *, step: int = 2) -> Path:
    """Questions of very unequal lengths, up to seven steps of words, each with a short answer."""
    words = ["word " * (step * index % (7 * step + 1)) for index in range(count)]
    rows = [{"prompt": f"{path.stem} {said}", "completion": f"{index}"} for index, said in enumerate(words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model: Path, data: Path, **changes: Any) -> LoadedConfig:
    """A quick fine-tune of the model on the data; `training__seed=1` changes a setting."""
    chosen = {key.replace("__", "."): value for key, value in changes.items()}
    overrides = {**QUICK, "model.path": str(model), "data.train": str(data), **chosen}
    return load_config(None, environ={}, overrides=overrides, profile=None)


def without_charts() -> Any:
    """Within this context a run's page is its title alone: drawing has its own laws."""
    return patch("finetune.train.render_html", lambda runs: f"<title>{runs[0]['id']}</title>")


@contextmanager
def without_reload_check() -> Iterator[None]:
    """Within this context no fresh process loads the saved adapter and no chart is drawn: both have their own laws.

    The versions of libraries, the same for all runs, are read once, and how fast this machine is, in a moment.
    """
    with (
        patch("finetune.evidence.observe.check_reload", lambda *given, **named: Reload(8, 10, 0, 1, 1e-5, 1.6e-4)),
        without_charts(),
        patch("finetune.evidence.record.version", _version),
        patch("finetune.evidence.forecast._MEASURED_SECONDS", 0.01),
    ):
        yield


class Death(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


def run(loaded: LoadedConfig, output: Path, *, death: int | None = None, **how: Any) -> list[Event]:
    """Begin the run, or go on with it as it was planned, until it ends, or dies when it tells its event of this number.

    What a tracker says of itself comes at a moment of its own, and is not counted.
    """
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        if death is not None and sum(not isinstance(one, TrackerOpened) for one in heard) > death:
            raise Death

    with suppress(Death), without_reload_check():
        if (output / "plan.yaml").exists():
            resume(output, listener=listen, **how)
        else:
            fine_tune(loaded, output=output, listener=listen, **how)
    return heard


def resume(output: Path, **how: Any) -> dict[str, Any]:
    """Go on with an unfinished run, as `ft train --resume` does; what run.json then holds."""
    plan = load_plan(RunFolder.unfinished(output).plan)
    return fine_tune(LoadedConfig(plan.config, plan.origins), output=output, resume=True, **how)[1]


def ended(output: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    found: dict[str, Any] = json.loads((output / "run.json").read_text())
    return found
