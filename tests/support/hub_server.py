"""A hub that speaks the protocol of uploads: repositories, preupload, git-lfs batches, commits, and what is there.

Source: huggingface_hub's client; git-lfs, "Batch API".
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

TOKEN = "hf_" + "mockedSecretOfNobody"


class Hub:
    """What the hub has: files by their names, and every request's line; `refuse` is the status of any answer."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.lfs: set[str] = set()
        self.repos: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.refuse = 0
        self.spoil = ""
        self.address = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _say(self, value: object, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_PUT(self) -> None:
        body, digest = self._body(), self.path.rsplit("/", 1)[-1]
        self.hub.asked.append(f"PUT {self.path}")
        good = hashlib.sha256(body).hexdigest() == digest
        if good:
            self.hub.large[digest] = body
        self._say({}, 200 if good else 400)

    def do_POST(self) -> None:
        body, path = self._body(), self.path
        self.hub.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self._say({"warnings": [], "errors": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say({"error": f"Invalid credentials: {self.headers.get('Authorization')}"}, 401)
        if self.hub.refuse:
            return self._say({"error": f"no, {TOKEN}"}, self.hub.refuse)
        if path == "/api/repos/create":
            self.hub.repos.append(json.loads(body))
            name = "{organization}/{name}".format(**self.hub.repos[-1])
            return self._say({"url": f"{self.hub.address}/{name}"})
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self._say({"files": files})
        if path.endswith("/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = [
                {**each, "actions": {"upload": {"href": f"{self.hub.address}/store/{each['oid']}"}}} for each in wanted
            ]
            return self._say({"transfer": "basic", "objects": upload})
        if "/commit/" in path:
            return self._commit(body)
        if "/paths-info/" in path:
            return self._say([self._told(name) for name in parse_qs(body.decode())["paths"] if name in self.hub.files])
        return self._say({"error": "no such thing"}, 404)

    def _commit(self, body: bytes) -> None:
        for line in body.decode().splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.large[value["oid"]]
                self.hub.lfs.add(value["path"])
        if self.hub.spoil:
            self.hub.files[self.hub.spoil] = b"#" + self.hub.files[self.hub.spoil][1:]
        repo = self.path.removeprefix("/api/models/").split("/commit/")[0]
        self._say({"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.hub.address}/{repo}/commit/{'c' * 40}"})

    def _told(self, name: str) -> dict[str, Any]:
        content = self.hub.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
        if name in self.hub.lfs:
            found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return found


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on this machine, for as long as this is open."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
