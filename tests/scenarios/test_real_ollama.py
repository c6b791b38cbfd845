"""A real Ollama takes our models, makes the prompts that were trained, and renders whatever it looks at."""

import contextlib
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from finetune.backends import open_backend
from finetune.chat.encoder import Encoder
from finetune.errors import FineTuneError, TemplateError
from finetune.export.gguf_source import exportable_run
from finetune.models.locate import SHIPPED
from finetune.records import Conversation, Message
from finetune.serve.deploy import Deployed, deploy_ollama
from finetune.serve.expected import prepare_serving_check
from finetune.serve.messages import chat_messages
from finetune.serve.ollama import Ollama
from support.processes import ft
from support.real_ollama import REMEDY, serving

pytestmark = pytest.mark.tier2
pytest.importorskip("peft", reason="needs the torch extra: pip install 'finetune-suite[torch]'")
ROLES = {"s": "system", "u": "user", "a": "assistant"}
SHAPES = ("u", "su", "uau", "suau", "uauauau", "suauauauau", "uasuau", "usu", "ssu")
CONVERSATIONS = int(os.environ.get("FT_CONVERSATIONS") or 30)
"""An answer of this server takes half a second, whatever it is asked; `FT_CONVERSATIONS=100` asks more."""
WORDS = ("Ghana", "what is 3 plus 4?", "  two  spaces ", "a\n\nb", "é 漢 🙂", "{{ .System }}", '"""', "x")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ollama]:
    """A real server, its models in a folder of its own."""
    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(serving(tmp_path_factory.mktemp("ollama")))
        except LookupError as error:
            pytest.skip(f"{error}: {REMEDY}")
        yield stack.enter_context(contextlib.closing(Ollama(address)))


@pytest.fixture(scope="module", params=SHIPPED)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run on a shipped model."""
    folder = tmp_path_factory.mktemp("real")
    quick = ["judge.control=never", "judge.memory=never", "training.max_steps=60", "evaluation.questions=8"]
    words = ("train", "--model", request.param, "--backend", "torch", "--output", "run")
    done = ft(*words, *(word for key in quick for word in ("--set", key)), cwd=folder)
    assert done.returncode in (0, 1, 4), done.stderr
    return folder / "run"


def drawn(number: int) -> Conversation:
    """A conversation of one of nine shapes, its length drawn, its contents awkward."""
    dice = random.Random(number)
    shape = SHAPES[number % len(SHAPES)]
    said = (Message(ROLES[letter], " ".join(dice.choices(WORDS, k=dice.randint(1, 12)))) for letter in shape)
    return Conversation(tuple(said), f"conversation {number}")


def test_ollama_serves_what_was_trained(server: Ollama, run: Path) -> None:
    """A model is deployed with all checks; drawn conversations are prompts of as many tokens as were trained.

    Each is asked in a context that holds it and in one that holds a part: there Ollama renders window after window,
    which may begin with an answer, and none stops it. Deployed again it must be told to replace.
    """
    done = deploy_ollama(run, server=server)
    assert [check.stage for check in done.checks if not check.passed] == []
    with pytest.raises(FineTuneError) as refused:
        deploy_ollama(run, server=server)
    assert "--replace" in refused.value.hint
    encoder = prepare_serving_check(run, exportable_run(run, open_backend)).encoder
    counts = [counted(server, encoder, done, drawn(number)) for number in range(CONVERSATIONS)]
    assert sum(count is not None for count in counts) >= CONVERSATIONS // 2
    assert {number for number, pair in enumerate(counts) if pair and pair[0] != pair[1]} == set()
    server.delete(done.name)


def counted(
    server: Ollama, encoder: Encoder, done: Deployed, conversation: Conversation
) -> tuple[int, int | None] | None:
    """So many tokens the prompt has in training and here; None where the run's template refuses it, or it is too long.

    Whatever it is, the server answers: also to a part of it, and where it ends with an answer. It joins neighbours of
    one role before its template sees them: they are asked, and not counted.
    """
    messages = chat_messages(conversation)
    for part in (messages[1:] or messages, messages[:-1] or messages):
        server.chat(done.name, part, most=1)
    found = server.chat(done.name, messages, most=1).prompt_tokens
    joined = any(one.role == other.role for one, other in pairwise(conversation.messages))
    try:
        ids = encoder.prompt_ids(conversation)
    except TemplateError:
        return None
    return (len(ids), found) if len(ids) < done.context and not joined else None
