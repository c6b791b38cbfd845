"""Makes Ollama's recipe from a run's template and stops, and leaves it beside the run as a Modelfile."""

from collections.abc import Sequence
from pathlib import Path

from finetune.errors import FineTuneError
from finetune.files import write_text
from finetune.run.folder import RunFolder
from finetune.serve.derive import Render, derive_template
from finetune.serve.modelfile import Modelfile, write_modelfile
from finetune.serve.ollama import OllamaRecipe


def make_recipe(
    render: Render, *, bos: str, texts: Sequence[str], context: int, stops: Sequence[str], licence: str
) -> OllamaRecipe:
    """What Ollama needs besides the file; `bos` and `texts` as for `derive_template`.

    Raises:
        TemplateError: Ollama's language cannot express the run's template.
    """
    template = derive_template(render, bos=bos, texts=texts)
    return OllamaRecipe(template, {"num_ctx": context, "stop": list(stops)}, (licence,) if licence else ())


def leave_recipe(run: Path, file: Path, recipe: OllamaRecipe) -> tuple[str, ...]:
    """Write the recipe as a Modelfile; a note where no Modelfile can hold it."""
    stops = tuple(("stop", stop) for stop in recipe.parameters["stop"])
    parameters = (("num_ctx", recipe.parameters["num_ctx"]), *stops)
    try:
        text = write_modelfile(Modelfile(f"./{file.name}", recipe.template, "", parameters, recipe.licenses))
    except FineTuneError as error:
        return (f"no Modelfile was written: {error.message}",)
    write_text(RunFolder(run).deploy / "Modelfile", text)
    return ()
