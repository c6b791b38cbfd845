"""The client of Ollama's server: what it brings there is there, and every trouble is told in bounded time.

Where Ollama itself runs, it takes the same laws as the server that stands in for it.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ollama", reason="needs the ollama extra: pip install 'finetune-suite[ollama]'")
pytest.importorskip("gguf", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")
pytest.importorskip("xllamacpp", reason="needs the gguf extra: pip install 'finetune-suite[gguf]'")

from finetune.errors import DeploymentError, OutputError, UsageError
from finetune.serve.ollama import Ollama, OllamaRecipe, OllamaTimeouts
from finetune.serve.publish import Blob, check_free, place_model
from support import ollama_server
from support.ollama_server import StandIn, Trouble, running
from support.served_models import shipped_gguf

pytestmark = pytest.mark.tier2
TEMPLATE = "{{ range .Messages }}{{ .Role }}: {{ .Content }}\n{{ end }}assistant:"
RECIPE = OllamaRecipe(TEMPLATE, {"num_ctx": 128, "stop": ["</s>", "\n\n"]}, ("Do as you like.",))
ASKED = [{"role": "system", "content": 'Say """x""".'}, {"role": "user", "content": "{{ .Who }}?\n"}]
NAME = "finetune-laws/first:try"
SHORT = OllamaTimeouts(connect=5, silence=0.4, whole=0.4)
KINDS = ("half-closed", "hang", "garbage", "refused", "stream error", "gone")


@pytest.fixture(scope="module")
def file() -> Path:
    """A GGUF file of a shipped model."""
    return shipped_gguf()


@pytest.fixture(params=["stand-in", "ollama"])
def server(request: pytest.FixtureRequest) -> Iterator[Ollama]:
    """A client of each server there is."""
    if request.param == "ollama":
        client = Ollama()
        try:
            client.version()
        except DeploymentError as error:
            pytest.skip(f"needs Ollama itself: {error}")
        yield client
        client.close()
        return
    with running() as stand_in:
        client = Ollama(stand_in.address)
        yield client
        client.close()


def test_ollama_takes_a_model_from_its_first_day_to_its_last(server: Ollama, file: Path) -> None:
    """Uploaded by its digest, created, listed, shown, asked, replaced, deleted: at each step the server says so."""
    assert re.match(r"\d+\.", server.version())
    digest = server.upload(file)
    assert digest == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert server.upload(file) == digest
    blob = Blob(file.name, digest)
    place_model(server, NAME, blob, RECIPE, verify=server.show)
    try:
        first = server.listed()[NAME]
        told = server.show(NAME)
        assert told["template"] == TEMPLATE
        assert "</s>" in told["parameters"]
        rendered = server.rendered(NAME, ASKED)
        assert rendered is None or rendered == f"system: {ASKED[0]['content']}\nuser: {ASKED[1]['content']}\nassistant:"
        said = server.chat(NAME, ASKED, most=4)
        assert server.chat(NAME, ASKED, most=4).text == said.text
        with pytest.raises(OutputError, match="has a model"):
            check_free(server, NAME.upper(), replace=False)
        other = OllamaRecipe("{{ range .Messages }}{{ .Content }}{{ end }}", RECIPE.parameters)
        place_model(server, NAME, blob, other, verify=server.show)
        assert server.listed()[NAME] != first
        assert not [name for name in server.listed() if "-part-" in name]
    finally:
        server.delete(NAME)
    assert NAME not in server.listed()
    with pytest.raises(DeploymentError, match="not found"):
        server.chat(NAME, ASKED, most=4)


def test_ollama_refuses_what_is_no_gguf_file(server: Ollama, tmp_path: Path) -> None:
    """What cannot become a model is told in the server's words, and leaves no name."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"no model at all")
    blob = Blob(file.name, server.upload(file))
    with pytest.raises(DeploymentError, match="could not create"):
        place_model(server, NAME, blob, RECIPE, verify=server.show)
    assert not [name for name in server.listed() if name.startswith("finetune-laws/")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/api/version", "/api/tags", "/api/blobs/", "/api/create", "/api/chat", "/api/show"])
def test_ollama_trouble_is_told(kind: str, path: str, file: Path) -> None:
    """Each of 6 troubles at each of 6 requests ends as one error, with the server's address and what to do."""
    with running() as stand_in:
        client = Ollama(stand_in.address, patience=SHORT)
        digest = client.upload(file)
        client.create(NAME, file.name, digest, RECIPE)
        if path == "/api/blobs/":
            del stand_in.blobs[digest]
        stand_in.troubles = [Trouble(path, kind, at) for at in (30, 30)]  # type: ignore[arg-type]
        with pytest.raises(DeploymentError) as told:
            request(client, path, file)
        client.close()
    assert stand_in.address in told.value.message
    assert told.value.hint
    assert told.value.exit_code == 1


def request(client: Ollama, path: str, file: Path) -> object:
    """Ask the server for something at a path."""
    return {
        "/api/version": client.version,
        "/api/tags": client.listed,
        "/api/blobs/": lambda: client.create(NAME, file.name, client.upload(file), RECIPE),
        "/api/create": lambda: client.create(NAME, file.name, client.upload(file), RECIPE),
        "/api/chat": lambda: client.chat(NAME, ASKED, most=4),
        "/api/show": lambda: client.show(NAME),
    }[path]()


def test_ollama_that_answers_drop_by_drop_is_given_up(file: Path) -> None:
    """An answer of which something always comes, but never all, is not waited for."""
    with running() as stand_in:
        client = Ollama(stand_in.address, patience=SHORT)
        client.create(NAME, file.name, client.upload(file), RECIPE)
        stand_in.troubles = [Trouble("/api/chat", "drip")]
        with pytest.raises(DeploymentError, match="not all of it within"):
            client.chat(NAME, ASKED, most=4)
        client.close()


def test_ollama_that_ends_before_its_last_word_has_failed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that ends as if all were well, but without its last line, is a failure to create, or to answer."""
    with running() as stand_in:
        client = Ollama(stand_in.address)
        digest = client.upload(file)
        client.create(NAME, file.name, digest, RECIPE)
        whole = ollama_server._lines
        monkeypatch.setattr(ollama_server, "_lines", lambda told: whole(told[:-1]))
        with pytest.raises(DeploymentError, match=r"did not say that .* was created: its last word was 'writing manif"):
            client.create(NAME, file.name, digest, RECIPE)
        with pytest.raises(DeploymentError, match="broke off in its answer"):
            client.chat(NAME, ASKED, most=4)
        client.close()


HOSTS = {
    "127.0.0.1": "http://127.0.0.1:11434",
    ":5000": "http://127.0.0.1:5000",
    "https://models.example.org": "https://models.example.org:443",
    "[::1]:5000": "http://[::1]:5000",
}


@pytest.mark.parametrize("told", HOSTS)
def test_ollama_host_is_read_as_documented(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 forms that OLLAMA_HOST may have each is the address that Ollama's documents say."""
    assert len(HOSTS) == 4
    monkeypatch.setenv("OLLAMA_HOST", told)
    client = Ollama()
    client.close()
    scheme, host = HOSTS[told].split("://")
    assert client.address in (HOSTS[told], f"{scheme}://{host.removesuffix(':443')}")


@pytest.mark.parametrize("told", ["127.0.0.1:port", ":99999", "[::1", "http://", "ftp://127.0.0.1", "unix:///x"])
def test_ollama_host_that_is_none_is_refused(told: str) -> None:
    """An address with a port, a host or a scheme that is none is refused by its own words, with the form."""
    with pytest.raises(UsageError, match=re.escape(f"{told!r}, of --host")) as refused:
        Ollama(told)
    assert "11434" in refused.value.hint


def test_ollama_that_is_not_there_is_told() -> None:
    """Where nobody listens, the reason names the address and what to install."""
    with running() as stand_in:
        address = stand_in.address
    with pytest.raises(DeploymentError) as absent:
        Ollama(address).version()
    assert address in absent.value.message
    assert "https://ollama.com/download" in absent.value.hint


def test_stand_in_checks_digests() -> None:
    """The stand-in takes no blob under another digest than its own, as Ollama does not."""
    import httpx

    with running() as stand_in:
        wrong = f"{stand_in.address}/api/blobs/sha256:{'0' * 64}"
        assert httpx.post(wrong, content=b"x", trust_env=False).status_code == 400
        assert httpx.head(wrong, trust_env=False).status_code == 404
        assert isinstance(stand_in, StandIn)
