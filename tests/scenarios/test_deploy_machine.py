"""Names on a server, told as a story: given to models, given to others, asked, removed, while the server has troubles.

A dictionary says what each name means. Where the server was gone in the middle, it may be the old or the new, and what
the client said of it must be so.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

pytest.importorskip("ollama", reason="needs the ollama extra: pip install 'finetune-suite[ollama]'")

from finetune.serve.ollama import OllamaTimeouts
from finetune.verify.stateful.lives import Ending
from finetune_strategies.profiles import examples
from finetune_strategies.scratch import lasting_folder
from support.ollama_server import StandIn, Trouble
from support.ours_on_ollama import OursOnOllama, Serving

pytestmark = pytest.mark.tier2
PATIENCE = OllamaTimeouts(connect=5, silence=0.5, whole=0.5)
"""A hanging server costs a story so much; the stand-in answers at once, or not at all."""
NAMES = st.sampled_from(["facts", "facts:other", "someone/facts"])
TEMPLATES = [
    "{{ range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}",
    "{{ range .Messages }}{{ .Content }}!{{ end }}",
]
PATHS = ["/api/blobs/", "/api/create", "/api/chat", "/api/copy", "/api/delete", "/api/tags"]
UNNAMED = PATHS[:3]
"""Where a trouble comes before the model has its name."""
KINDS = ["half-closed", "hang", "garbage", "refused", "stream error", "gone"]


@cache
def file(number: int) -> Path:
    """A file that begins as GGUF does; the stand-in looks no further."""
    path = lasting_folder("served") / f"served-{number}.gguf"
    path.write_bytes(b"GGUF" + bytes([number]) * 1000)
    return path


SERVINGS = st.builds(
    lambda number, template, stop: Serving(file(number), template, (stop,)),
    st.integers(1, 2),
    st.sampled_from(TEMPLATES),
    st.sampled_from(["</s>", "<|end|>"]),
)
TROUBLES = st.builds(Trouble, st.sampled_from(PATHS), st.sampled_from(KINDS), st.integers(0, 400), st.booleans())


def whole(name: str) -> str:
    """A name as it is listed."""
    return name if ":" in name else f"{name}:latest"


class DeployCycle(RuleBasedStateMachine):
    """One server and a client of it."""

    @initialize()
    def begin(self) -> None:
        """No model is there yet."""
        self.server = StandIn()
        self.server.start()
        self.subject: OursOnOllama = OursOnOllama(self.server.address, PATIENCE)
        self.there: dict[str, Serving] = {}

    def teardown(self) -> None:
        """Leave nothing."""
        if hasattr(self, "server"):
            self.server.stop()
            self.subject.close()

    @rule(name=NAMES, serving=SERVINGS, replace=st.booleans())
    def deploy(self, name: str, serving: Serving, replace: bool) -> None:
        """A name that is free, or may be taken, means the new model; another keeps what it means."""
        ending = self.subject.deploy(name, serving, replace=replace)
        if whole(name) in self.there and not replace:
            assert ending.code == 3
            assert "has a model" in ending.stderr
            assert "--replace" in ending.stderr
        else:
            assert ending.code == 0, ending.stderr
            self.there[whole(name)] = serving

    @rule(name=NAMES, question=st.text(max_size=8))
    def ask(self, name: str, question: str) -> None:
        """A name answers with one whole model; one that means nothing is told by itself."""
        ending = self.subject.answer(name, question)
        if whole(name) not in self.there:
            assert ending.code == 1
            assert "not found" in ending.stderr
            return
        assert ending.code == 0, ending.stderr
        self.check_answer(ending, self.there[whole(name)], question)

    def check_answer(self, ending: Ending, serving: Serving, question: str) -> None:
        """The answer is that of the file, the template and the stops that belong together."""
        digest, template, stops, prompt = json.loads(ending.answer)
        assert (template, tuple(stops)) == (serving.template, serving.stops)
        assert self.server.blobs[digest] == serving.file.read_bytes()
        assert question in prompt

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        """A name that is removed means nothing any more, and can be removed once."""
        ending = self.subject.remove(name)
        assert (ending.code == 0) is (whole(name) in self.there), ending.stderr
        self.there.pop(whole(name), None)

    @rule(name=NAMES, serving=SERVINGS, trouble=TROUBLES)
    def deploy_in_trouble(self, name: str, serving: Serving, trouble: Trouble) -> None:
        """Whatever goes wrong on the way: a name means the old or the new, and what is said of it is so."""
        before = self.there.get(whole(name))
        ending = self.in_trouble(lambda: self.subject.deploy(name, serving, replace=True), trouble)
        found = self.meaning(whole(name))
        assert found in (before, serving)
        if ending.code == 0:
            assert found == serving
        else:
            self.check_told(ending, name, found, before)
            # What was not verified has no name.
            assert trouble.path not in UNNAMED or found == before
        if found is not None:
            self.there[whole(name)] = found
        self.clear_up(ending)

    def check_told(self, ending: Ending, name: str, found: Serving | None, before: Serving | None) -> None:
        """What the client says of the state is the state; it says something where it had begun to change it."""
        assert ending.code == 1, ending.stderr
        assert self.server.address in ending.stderr
        assert "hint: " in ending.stderr
        said = {
            "means what it meant before": found == before,
            "there is no model": found is None,
            "means the new model": found is not None,
            "is deployed and verified": found is not None,
        }
        assert all(true for words, true in said.items() if words in ending.stderr), ending.stderr
        begun = any(line.endswith("/api/create") for line in self.server.asked)
        assert not begun or any(words in ending.stderr for words in (*said, "cannot be seen")), ending.stderr

    def clear_up(self, ending: Ending) -> None:
        """What is left half made was told by its name, and can be removed under it."""
        left = [name for name in self.server.models if "-part-" in name]
        assert all(name in ending.stderr for name in left)
        for name in left:
            assert self.subject.remove(name).code == 0

    @precondition(lambda self: self.there)
    @rule(data=st.data(), trouble=TROUBLES, question=st.text(max_size=8))
    def ask_in_trouble(self, data: st.DataObject, trouble: Trouble, question: str) -> None:
        """A whole answer, or none and the reason."""
        name = data.draw(st.sampled_from(sorted(self.there)))
        ending = self.in_trouble(lambda: self.subject.answer(name, question), trouble)
        if ending.code == 0:
            self.check_answer(ending, self.there[name], question)
        else:
            assert (ending.code, ending.answer) == (1, "")
            assert self.server.address in ending.stderr

    @precondition(lambda self: self.there)
    @rule(data=st.data(), trouble=TROUBLES)
    def remove_in_trouble(self, data: st.DataObject, trouble: Trouble) -> None:
        """What is said to be removed is; otherwise it is removed or as it was."""
        name = data.draw(st.sampled_from(sorted(self.there)))
        ending = self.in_trouble(lambda: self.subject.remove(name), trouble)
        found = self.meaning(name)
        assert found in ((None,) if ending.code == 0 else (None, self.there[name]))
        if found is None:
            del self.there[name]

    def in_trouble(self, act: Callable[[], Ending], trouble: Trouble) -> Ending:
        """Do something while the server has a trouble; afterwards it runs, and has none."""
        self.server.asked.clear()
        self.server.troubles.append(trouble)
        ending = act()
        self.server.troubles.clear()
        self.server.stop()
        self.server.start()
        return ending

    def meaning(self, name: str) -> Serving | None:
        """What a name means on the server, whoever is asked."""
        model = self.server.models.get(name)
        if model is None:
            return None
        number = self.server.blobs[model.digest][4]
        return Serving(file(number), model.template, tuple(model.parameters["stop"]))

    @invariant()
    def agrees(self) -> None:
        """What is listed is what was created and not removed, and each is what it was created as."""
        if hasattr(self, "server"):
            assert sorted(self.subject.served()) == sorted(self.there)
            assert {name: self.meaning(name) for name in self.there} == self.there


DeployCycle.TestCase.settings = examples(1 / 2)
test_deploy_cycle_keeps_each_name_whole = DeployCycle.TestCase
