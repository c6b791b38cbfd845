"""Deploys a run's result to llama.cpp's server or to Ollama, and verifies what is served."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.errors import DeploymentError, OutputError
from finetune.export.gguf import Teller, export
from finetune.export.gguf_source import Exportable, exportable_run
from finetune.export.outtypes import Outtype
from finetune.export.read_back import Check
from finetune.files import file_hash, make_folder, remove_torn, storage_errors, write_json
from finetune.reading import read_json
from finetune.run.folder import RunFolder
from finetune.serve.check import (
    compare_answers,
    compare_prompts,
    edge_notes,
    inert_notes,
    require_passed,
    unmeasured_notes,
)
from finetune.serve.expected import ServingCheck, prepare_serving_check
from finetune.serve.llama_server import LlamaServer, llama_server
from finetune.serve.messages import Messages
from finetune.serve.ollama import Ollama, OllamaRecipe, full_name
from finetune.serve.publish import Blob, check_free, place_model
from finetune.serve.recipe import leave_recipe, make_recipe
from finetune.serve.ties import Ties

COUNTED = 4
"""How many prompts are counted where a server does not show them: each loads the model again."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """A model that is served, with its checks."""

    target: str
    name: str
    address: str
    server: str
    file: Path
    context: int
    stops: tuple[str, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            **asdict(self),
            "file": str(self.file),
            "bytes": self.file.stat().st_size,
            "sha256": file_hash(self.file),
        }


def deploy_llama_cpp(
    run: Path,
    *,
    outtype: Outtype = "f16",
    port: int = 0,
    tell: Teller = lambda words: None,
    serve: Callable[[Deployed, LlamaServer], None] = lambda deployed, server: None,
) -> Deployed:
    """Start llama.cpp's server with a run's result, and verify it.

    Args:
        port: where it listens; 0 for any that is free.
        serve: is called once all is verified; when it returns, the server ends.

    Raises:
        FineTuneError: it was refused, the server failed, or does not answer as was trained; no server is left.
    """
    exportable = exportable_run(run, open_backend)
    serving_check = prepare_serving_check(run, exportable, today=date.today())
    file = _gguf(run, outtype, tell)
    name = default_name(run)
    with llama_server(file, context=serving_check.context, name=name, port=port) as server:
        tell(f"asking llama.cpp's server at {server.address}")
        rendered_ids = partial(server.rendered_ids, variables=serving_check.given)
        prompts = compare_prompts(serving_check, rendered_ids)
        # The server has its own clock: writing a large file may have taken until after midnight.
        while not prompts.passed and date.today() != serving_check.today:
            serving_check = prepare_serving_check(run, exportable, today=date.today())
            prompts = compare_prompts(serving_check, rendered_ids)
        checks = require_passed(
            prompts,
            *compare_answers(
                serving_check,
                partial(server.chat, variables=serving_check.given, most=serving_check.most),
                _ties(exportable, outtype, serving_check),
            ),
        )
        notes = (*unmeasured_notes(checks), *edge_notes(serving_check, rendered_ids))
        if serving_check.variables:
            notes += (f"ask it with chat_template_kwargs {serving_check.variables}, as all training rows have them",)
        deployed = Deployed(
            target="llama.cpp",
            name=name,
            address=server.address,
            server=f"xllamacpp {version('xllamacpp')}",
            file=file,
            context=serving_check.context,
            stops=serving_check.stops,
            checks=checks,
            notes=(*serving_check.notes, *notes, *inert_notes(serving_check, rendered_ids)),
        )
        _record(run, deployed)
        serve(deployed, server)
    return deployed


def deploy_ollama(
    run: Path,
    *,
    server: Ollama,
    name: str | None = None,
    replace: bool = False,
    outtype: Outtype = "f16",
    tell: Teller = lambda words: None,
) -> Deployed:
    """Create a model in Ollama from a run's result, and verify it; only then does it get its name.

    Args:
        name: the model's name; made from the run's where it is None.
        replace: overwrite an existing model of that name.

    Raises:
        FineTuneError: it was refused, the server failed, or does not answer as was trained; then the name means what
            it meant before, or the error says what it means now.
    """
    name = full_name(name or default_name(run))
    try:
        running = server.version()
    except DeploymentError as error:
        raise OutputError(error.message, hint=f"{error.hint}; or serve it with --to llama.cpp") from None
    check_free(server, name, replace=replace)
    exportable = exportable_run(run, open_backend)
    serving_check = prepare_serving_check(run, exportable)
    recipe = make_recipe(
        serving_check.render,
        bos=serving_check.bos,
        texts=serving_check.texts,
        context=serving_check.context,
        stops=serving_check.stops,
        licence=str(exportable.naming.get("general.license") or ""),
    )
    file = _gguf(run, outtype, tell)
    tell(f"sending {file.name} to Ollama {running} at {server.address}")
    digest = server.upload(file)
    tell("asking it")
    checks, notes = place_model(
        server,
        name,
        Blob(file.name, digest),
        recipe,
        verify=lambda first: _verify(server, first, serving_check, recipe, _ties(exportable, outtype, serving_check)),
    )
    deployed = Deployed(
        target="ollama",
        name=name,
        address=server.address,
        server=f"ollama {running}",
        file=file,
        context=serving_check.context,
        stops=serving_check.stops,
        checks=checks,
        notes=(*serving_check.notes, *unmeasured_notes(checks), *notes, *leave_recipe(run, file, recipe)),
    )
    _record(run, deployed)
    return deployed


def default_name(run: Path) -> str:
    """A model name made of the run's id."""
    told = str(RunFolder.finished(run).read_manifest().get("id", ""))
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"ft-{told}")[:60].strip("-")


def _gguf(run: Path, outtype: Outtype, tell: Teller) -> Path:
    """The run's GGUF file: that of an earlier deployment if unchanged, or a new one."""
    folder = RunFolder.finished(run)
    file = folder.deploy / f"{run.resolve().name}-{outtype}.gguf"
    record = file.with_name(f"{file.name}.json")
    made_of = {"run": file_hash(folder.manifest), "outtype": outtype}
    if file.is_file() and record.is_file():
        with contextlib.suppress(ValueError):  # a record that is cut off proves nothing
            if read_json(record) == {**made_of, "sha256": file_hash(file)}:
                tell(f"taking {file}, which was made of this run and has not changed")
                return file
    make_folder(folder.deploy)
    with folder.held():
        with storage_errors(file):
            # Only our own leftovers: another process may be writing its record of this folder.
            remove_torn(folder.deploy, like=".*.gguf.*")
            file.unlink(missing_ok=True)
        export(str(run), outtype=outtype, adapter_only=False, output=file, backend="torch", tell=tell)
        write_json(record, {**made_of, "sha256": file_hash(file)})
    return file


def _ties(exportable: Exportable, outtype: Outtype, serving_check: ServingCheck) -> Ties:
    prompts = tuple(asked.prompt.ids for asked in serving_check.questions)
    return Ties(exportable, outtype, prompts, serving_check.encoder.stop_ids, serving_check.most)


def _verify(
    server: Ollama, name: str, serving_check: ServingCheck, recipe: OllamaRecipe, ties: Ties
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Compare a model in Ollama with the run; its checks, and notes on it."""

    def ids_of(messages: Messages) -> tuple[int, ...]:
        text = server.rendered(name, messages)
        assert text is not None
        tokenizer = serving_check.encoder.tokenizer
        bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        # The export has proved that llama.cpp, and so Ollama, makes these ids of markup.
        return (*bos, *tokenizer.encode_markup(text))

    answers = compare_answers(
        serving_check, lambda messages: server.chat(name, messages, most=serving_check.most), ties
    )
    shown = _recipe_check(server, name, recipe)
    if serving_check.prompts and server.rendered(name, serving_check.prompts[0].messages) is not None:
        notes = (*edge_notes(serving_check, ids_of), *inert_notes(serving_check, ids_of))
        return require_passed(shown, compare_prompts(serving_check, ids_of), *answers), notes
    note = "this Ollama does not tell what it makes of a conversation, so prompts were only counted: a newer one does"
    return require_passed(shown, _count_prompts(server, name, serving_check), *answers), (note,)


def _recipe_check(server: Ollama, name: str, recipe: OllamaRecipe) -> Check:
    """Whether Ollama shows the template and the parameters that were sent."""
    told = server.show(name)
    wanted = [*recipe.parameters["stop"], str(recipe.parameters["num_ctx"])]
    missing = [each for each in wanted if each not in told["parameters"]]
    if told["template"].strip() != recipe.template.strip():
        missing.insert(0, "the template")
    first = f"{missing[0]} is not what it was created with" if missing else ""
    return Check("recipe", f"template, num_ctx and {len(wanted) - 1} stop words", "as they were sent", first)


def _count_prompts(server: Ollama, name: str, serving_check: ServingCheck) -> Check:
    """Whether prompts have as many tokens as in training, where they cannot be compared."""
    first, equal = "", 0
    for prompt in serving_check.prompts[:COUNTED]:
        found = server.chat(name, prompt.messages, most=1, fresh=True).prompt_tokens
        equal += found == len(prompt.ids)
        if found != len(prompt.ids) and not first:
            first = f"the conversation {str(list(prompt.messages))[:80]} has {found} tokens, and {len(prompt.ids)} here"
    return Check("template", f"{equal} of {COUNTED} prompts have as many tokens", "all of them", first)


def _record(run: Path, deployed: Deployed) -> None:
    folder = RunFolder(run).deploy
    make_folder(folder)
    write_json(folder / f"{deployed.target}.json", deployed.as_dict())
