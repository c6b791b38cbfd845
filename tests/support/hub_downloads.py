"""A hub for tests that answers as huggingface.co does: listings, files with their headers, and its refusals."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "private/model": (401, "RepoNotFound", "Repository not found"),
    "nobody/nothing": (404, "RepoNotFound", "Repository not found"),
    "token/expired": (401, "", "Invalid credentials in Authorization header"),
    "asked/too-often": (429, "", "Too many requests"),
    "broken/hub": (500, "", "Internal error"),
    "old/disabled": (403, "", "Access to this resource is disabled."),
}
"""How each model is refused where it is looked up: status, error code, message."""
GATED = "gated/llama"
GOOD = "good/llama"


class HubServer:
    """Serves one good model with its files, one gated model, and the refusals; at `address` while it is open."""

    def __init__(self, files: dict[str, bytes]) -> None:
        """Serve the good model with these files."""

        class Handler(_Handler):
            served: ClassVar[dict[str, bytes]] = files

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        """Begin to serve."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: ClassVar[dict[str, bytes]] = {}
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer()

    def do_GET(self) -> None:
        """Answer as the hub does."""
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        parts = parts[1:] if parts[0] == "datasets" else parts
        listing = parts[:2] in (["api", "models"], ["api", "datasets"])
        name = "/".join(parts[2:4] if listing else parts[:2])
        if name in REFUSALS:
            return self._refuse(*REFUSALS[name])
        if name not in (GOOD, GATED):
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if listing and parts[4:5] == ["revision"] and parts[5] not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {parts[5]}")
        if listing and parts[4:5] == ["tree"]:
            return self._send([self._listed(path) for path in self.served])
        if listing:
            siblings = [{"rfilename": path} for path in self.served]
            return self._send({"id": name, "sha": COMMIT, "private": False, "siblings": siblings})
        if name == GATED:
            return self._refuse(403, "GatedRepo", f"Access to model {name} is restricted and you are not logged in.")
        return self._file("/".join(parts[4:]))

    def _listed(self, path: str) -> dict[str, Any]:
        content = self.served[path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _file(self, path: str) -> None:
        content = self.served.get(path)
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._body(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _send(self, value: object) -> None:
        self._body(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        named = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self._body(status, body, {**named, "X-Error-Message": message, "Content-Type": "application/json"})

    def _body(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
