"""Downloads a model from the hub, and tells apart why it could not be had."""

import errno
from difflib import get_close_matches
from pathlib import Path

from finetune.errors import ModelError
from finetune.files import nearest_file

SHIPPED = ("reference-llama", "reference-gpt2")
OFFLINE_HINT = f"without a hub, use a model that ships with FineTune: {' or '.join(SHIPPED)}, or a local folder"
_WANTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
_MOST_TOLD = 100
"""So many letters of a reason that is the client's own are told."""
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
        message, hint = hub_refusal(name, revision, error)
        raise ModelError(message, hint=hint) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests"):
            raise
        message, hint = hub_refusal(name, revision, error)
        raise ModelError(message, hint=hint) from None


def near_model(name: str) -> str:
    """The shipped model or the local folder whose name is nearest, as the beginning of a hint; empty where none is."""
    near = get_close_matches(name, SHIPPED, n=1, cutoff=0.7)
    found = near[0] if near else nearest_file(Path(name))
    return f"did you mean {found}? " if found else ""


def hub_refusal(name: str, revision: str | None, error: Exception, *, what: str = "model") -> tuple[str, str]:
    """Why the hub did not give a model or a data set, in a line, and what to do, in another."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    # What the hub answered is the cause, where the client first looked into its cache.
    causes = [error, *(each for each in (error.__cause__, error.__context__) if each)]
    model = what == "model"
    page = f"{constants.ENDPOINT}/{'' if model else 'datasets/'}{name}"
    near, without = (near_model(name), OFFLINE_HINT) if model else ("", "or name a file or folder here")
    here = f"unknown {what} {name!r}: no {'folder' if model else 'file or folder'} of that name here"

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in causes)

    status = next((each.response.status_code for each in causes if isinstance(each, hub.HfHubHTTPError)), None)
    full = any(isinstance(each, OSError) and each.errno == errno.ENOSPC for each in causes)
    if is_a(hub.GatedRepoError):
        told = "is gated: the hub gives it only to who has accepted its licence"
        return f"{what} {name!r} {told}", f"accept it at {page}, then {_LOG_IN}"
    if is_a(hub.RevisionNotFoundError):
        hint = f"leave out {'model.revision' if model else 'what follows @'}, or choose one of {page}/commits/main"
        return f"the hub's {what} {name!r} has no revision {revision!r}", hint
    if is_a(hub.RepositoryNotFoundError):
        hint = f"{near}see {page}; of a private {what}, {_LOG_IN}"
        return f"{here}, and none on the hub, or a private one", hint
    if is_a(hub.DisabledRepoError):
        return f"the hub has disabled the {what} {name!r}", f"see {page}"
    if status in (401, 403):
        return f"the hub refuses the token that asks for {name!r}", f"log in again: {_LOG_IN}"
    if status == 429:
        return f"the hub was asked too often for {name!r}", f"wait a while, or log in: {_LOG_IN}"
    if full:
        return f"no space left for {name!r}", f"make room in {constants.HF_HUB_CACHE}, or set HF_HOME"
    if is_a(hub.OfflineModeIsEnabled):
        hint = near.strip() or f"unset HF_HUB_OFFLINE to download it; {without}"
        return f"{here}, and HF_HUB_OFFLINE is set", hint
    lines = str(causes[-1]).strip().splitlines()
    reason = lines[0][:_MOST_TOLD] if lines else type(causes[-1]).__name__
    told = f"{here}, and {constants.ENDPOINT} could not give it ({reason})"
    return told, near.strip() or f"check the network; {without}"
