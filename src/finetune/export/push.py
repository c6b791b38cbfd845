"""Sends what a run trained to the hub, and holds what came there to what was sent."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.config import load_plan
from finetune.errors import DeploymentError, FineTuneError, ModelError, RefusedError, UsageError
from finetune.evidence.saved import saved_in
from finetune.export.gguf import plan_lora, plan_whole
from finetune.export.gguf_source import exportable_run, require_gguf
from finetune.export.outtypes import FILE_TYPES
from finetune.export.read_back import read_back
from finetune.files import file_hash
from finetune.models.gguf_file import read_gguf
from finetune.models.shape import refuse_leading_out
from finetune.models.travel import without_places
from finetune.records import Outcome
from finetune.report.card import CARD, licence_in, model_card
from finetune.run.folder import RunFolder

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SECRET = re.compile(r"hf_[A-Za-z0-9]{6,}")
_MOST_READ = 20_000_000


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file that goes up: its name there, and its content or where that lies."""

    name: str
    content: bytes | Path = field(repr=False)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def read(self) -> Iterator[bytes]:
        """Its content in pieces."""
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece


@dataclass(frozen=True, slots=True)
class Push:
    """What would go up, and what came of it: `url` and `commit` are empty before."""

    repo: str
    run: str
    outcome: str
    files: tuple[Outgoing, ...]
    notes: tuple[str, ...] = ()
    url: str = ""
    commit: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        files = [{"path": file.name, "bytes": file.size} for file in self.files]
        told = {"repo": self.repo, "run": self.run, "outcome": self.outcome, "sent": bool(self.commit)}
        return {**told, "url": self.url, "commit": self.commit, "files": files, "notes": list(self.notes)}


def plan_push(path: Path, repo: str, *, merged: bool = False, gguf: bool = False, force: bool = False) -> Push:
    """What of a finished run goes to a repository; nothing is sent, and no network is asked.

    Args:
        merged: the model folder that `ft merge` made, in place of the adapter or the whole model.
        gguf: the files that `ft export` made, each read back first, with a card of their own.
        force: also where the run's verdict is that it failed.

    Raises:
        UsageError: the repository's name is none.
        RefusedError: the run failed, is not finished or was changed, or a secret is in a file.
    """
    if merged and gguf:
        raise UsageError("--merged and --gguf are two things to send", hint="send each to a repository of its own")
    if not _REPO.fullmatch(repo):
        raise UsageError(
            f"{repo!r} names no repository of the hub", hint="write it as USER/NAME, such as me/my-adapter"
        )
    run = RunFolder.finished(path)
    record, config = run.read_manifest(), load_plan(run.plan).config
    outcome = str(record.get("outcome"))
    if outcome == Outcome.FAILED and not force:
        broken = [str(each["title"]) for each in record["verdicts"] if each["outcome"] == Outcome.FAILED]
        raise RefusedError(
            f"the run {run.path.name} failed its verdict: {'; '.join(broken[:3])}",
            hint="train again, or send it all the same with --force: its card says that it failed",
        )
    notes: list[str] = []
    if gguf:
        files = _gguf_files(run, record)
    else:
        base = str(record["model"]["name"]) if record["model"]["source"] == "hub" else ""
        files = _folder_files(run, run.merged if merged else saved_in(run, config), base, notes)
    _refuse_secrets(files)
    if outcome != Outcome.PASSED:
        notes.append(f"the run's outcome is {outcome}; its card says so")
    return Push(repo, run.path.name, outcome, tuple(files), tuple(notes))


def _folder_files(run: RunFolder, saved: Path, base: str, notes: list[str]) -> list[Outgoing]:
    """The files of a folder, without what is hidden; `notes` are told where one named a place."""
    if not saved.is_dir():
        raise ModelError(f"{saved} does not exist", hint=f"make it first: ft merge {run.path}")
    files = []
    for file in sorted(saved.rglob("*")):
        refuse_leading_out(file)
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(saved).parts):
            name = file.relative_to(saved).as_posix()
            content = _without_places(file, base)
            notes += [f"{name}: the base is named without its place on this machine"] * isinstance(content, bytes)
            files.append(Outgoing(name, content))
    return files


def _gguf_files(run: RunFolder, record: Mapping[str, Any]) -> list[Outgoing]:
    """The GGUF files of a run, each of them still what was written, and their card.

    Raises:
        FineTuneError: there is none, or one has changed since.
    """
    found = [file for file in sorted(run.gguf.glob("*.gguf")) if not file.stem.endswith(".refused")]
    if not found:
        raise ModelError(f"{run.gguf} holds no GGUF file", hint=f"make one first: ft export {run.path}")
    require_gguf()
    exportable, told = exportable_run(run.path, open_backend), []
    for file in found:
        refuse_leading_out(file)
        kind = read_gguf(file).metadata
        outtype = next((name for name, number in FILE_TYPES.items() if number == kind.get("general.file_type")), None)
        if outtype is None:
            wrong = f"no type of ours: {kind.get('general.file_type')}"
        else:
            plan = plan_lora if kind.get("general.type") == "adapter" else plan_whole
            wrong = read_back(plan(exportable, outtype), file).first
        if wrong:
            hint = f"remove it, and write it again: ft export {run.path}"
            raise ModelError(f"{file} is not what was written: {wrong}", hint=hint)
        told.append(f"`{file.name}`: {outtype}, {file.stat().st_size:,} bytes, sha256 `{file_hash(file)}`.")
    card = model_card(record, licence_in(exportable.folder), "gguf", told)
    return [*(Outgoing(file.name, file) for file in found), Outgoing(CARD, card.encode())]


def push(plan: Push, *, private: bool = False, tell: Callable[[str], None] = lambda words: None) -> Push:
    """Make the repository where there is none, send the files in one commit, and compare what the hub then has.

    Raises:
        RefusedError: no token, or the hub does not let this one write there.
        DeploymentError: the hub cannot be reached, failed, or has other files now than were sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = get_token()
    if not token:
        raise RefusedError("there is no token for the hub", hint="run `hf auth login` once, or set HF_TOKEN")
    api = HfApi(token=token)
    try:
        api.create_repo(plan.repo, private=private or None, exist_ok=True)
        tell(f"sending {len(plan.files)} files to {plan.repo}")
        operations = [
            CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
            for file in plan.files
        ]
        done = api.create_commit(plan.repo, operations, commit_message=f"FineTune run {plan.run}: {plan.outcome}")
        there = {each.path: each for each in api.get_paths_info(plan.repo, [file.name for file in plan.files])}
    except OfflineModeIsEnabled:
        raise RefusedError("HF_HUB_OFFLINE keeps the hub from being asked", hint="unset it and try again") from None
    except HfHubHTTPError as error:
        raise _told(error, plan.repo, token) from None
    # What the client library raises where a server cannot be reached or answers with what is no answer.
    except Exception as error:
        raise DeploymentError(
            f"the hub could not take {plan.repo}: {_safe(f'{type(error).__name__}: {error}', token)}",
            hint="try again; what is there already is not sent twice",
        ) from None
    if odd := [file.name for file in plan.files if not _is_there(file, there.get(file.name))]:
        raise DeploymentError(
            f"{plan.repo} has not what was sent: {', '.join(odd)}", hint="try again; look at the repository's files"
        )
    return Push(plan.repo, plan.run, plan.outcome, plan.files, plan.notes, str(done.repo_url), str(done.oid))


def _without_places(file: Path, base: str) -> bytes | Path:
    """A file's content where it names a base by its folder here: then by its hub id, or its name alone."""
    if file.suffix != ".json" or file.stat().st_size > _MOST_READ:
        return file
    content = file.read_bytes()
    changed = without_places(content, base)
    return file if changed == content else changed


def _refuse_secrets(files: Sequence[Outgoing]) -> None:
    """Refuse to send the hub's own token, wherever it stands.

    Raises:
        RefusedError: it is in a file, which is named; the token is not.
    """
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for file in files:
        if token and file.size <= _MOST_READ and token in b"".join(file.read()):
            raise RefusedError(f"{file.name} holds your token for the hub", hint="take it out; nothing was sent")


def _is_there(file: Outgoing, found: Any) -> bool:
    """Whether the hub has this file with this content: by SHA-256 where it is large, by git's own hash elsewhere."""
    if found is None or found.size != file.size:
        return False
    digest = hashlib.sha256() if found.lfs else hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    for piece in file.read():
        digest.update(piece)
    return bool(digest.hexdigest() == (found.lfs.sha256 if found.lfs else found.blob_id))


_STATUS: Mapping[int, tuple[str, str]] = {
    401: ("the hub does not take your token", "run `hf auth login` with a token that may write, or set HF_TOKEN"),
    403: ("your token may not write to {repo}", "use a token with the right to write, or a name of your own"),
    404: ("{repo} cannot be made or found", "check the user or organisation in its name"),
}


def _told(error: Any, repo: str, token: str) -> FineTuneError:
    """The hub's refusal in words, with what to do."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in _STATUS:
        what, hint = _STATUS[status]
        return RefusedError(what.format(repo=repo), hint=hint)
    reason = _safe(" ".join(str(error).split())[:400] or type(error).__name__, token)
    return DeploymentError(f"the hub could not take {repo}: {reason}", hint="try again; nothing is sent twice")


def _safe(text: str, token: str) -> str:
    """Words of others without a secret in them."""
    return _SECRET.sub("hf_***", text.replace(token, "hf_***") if token else text)
