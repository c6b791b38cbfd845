"""Downloads a model from the hub, and tells apart why it could not be had."""

import errno
from difflib import get_close_matches
from pathlib import Path

from finetune.errors import ModelError
from finetune.files import nearest_file

SHIPPED = ("reference-llama", "reference-gpt2")
OFFLINE_HINT = f"without a hub, use a model that ships with FineTune: {' or '.join(SHIPPED)}, or a local folder"
_WANTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
_LOG_IN = "`hf auth login`, or set HF_TOKEN"


def download_model(name: str, revision: str | None) -> Path:
    """The folder of a hub model in the hub's own cache, downloaded where it is not there yet.

    Raises:
        ModelError: it is gated, private or not there, has no such revision, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_WANTED_FILES)))
    # ValueError: a name that the hub itself does not take, such as a--b; HTTPError of its client is none of OSError.
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explained(name, revision, error) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests"):
            raise
        raise _explained(name, revision, error) from None


def near_model(name: str) -> str:
    """The shipped model or the local folder whose name is nearest, as the beginning of a hint; empty where none is."""
    near = get_close_matches(name, SHIPPED, n=1, cutoff=0.7)
    found = near[0] if near else nearest_file(Path(name))
    return f"did you mean {found}? " if found else ""


def _explained(name: str, revision: str | None, error: Exception) -> ModelError:
    """Why the hub did not give a model, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    # What the hub answered is the cause, where the client first looked into its cache.
    causes = [error, *(each for each in (error.__cause__, error.__context__) if each)]
    page = f"{constants.ENDPOINT}/{name}"

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in causes)

    status = next((each.response.status_code for each in causes if isinstance(each, hub.HfHubHTTPError)), None)
    full = any(isinstance(each, OSError) and each.errno == errno.ENOSPC for each in causes)
    if is_a(hub.GatedRepoError):
        told = "is gated: the hub gives it only to who has accepted its licence"
        return ModelError(f"model {name!r} {told}", hint=f"accept it at {page}, then {_LOG_IN}")
    if is_a(hub.RevisionNotFoundError):
        hint = f"leave out model.revision, or choose one of {page}/commits/main"
        return ModelError(f"the hub's model {name!r} has no revision {revision!r}", hint=hint)
    if is_a(hub.RepositoryNotFoundError):
        hint = f"{near_model(name)}see {page}; of a private model, {_LOG_IN}"
        told = "no folder of that name here, and none on the hub, or a private one"
        return ModelError(f"unknown model {name!r}: {told}", hint=hint)
    if is_a(hub.DisabledRepoError):
        return ModelError(f"the hub has disabled the model {name!r}", hint=f"see {page}")
    if status in (401, 403):
        return ModelError(f"the hub refuses the token that asks for {name!r}", hint=f"log in again: {_LOG_IN}")
    if status == 429:
        return ModelError(f"the hub was asked too often for {name!r}", hint=f"wait a while, or log in: {_LOG_IN}")
    if full:
        return ModelError(f"no space left for {name!r}", hint=f"make room in {constants.HF_HUB_CACHE}, or set HF_HOME")
    if is_a(hub.OfflineModeIsEnabled):
        hint = f"{near_model(name)}unset HF_HUB_OFFLINE to download it; {OFFLINE_HINT}"
        return ModelError(f"unknown model {name!r}: no folder of that name here, and HF_HUB_OFFLINE is set", hint=hint)
    lines = str(causes[-1]).strip().splitlines()
    reason = lines[0] if lines else type(causes[-1]).__name__
    told = f"no folder of that name here, and {constants.ENDPOINT} could not give it ({reason})"
    return ModelError(f"unknown model {name!r}: {told}", hint=f"{near_model(name)}check the network; {OFFLINE_HINT}")
