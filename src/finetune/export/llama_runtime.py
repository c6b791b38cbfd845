"""llama.cpp within this process: loads a GGUF file, and answers over HTTP at an address of this machine."""

import http.client
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from xllamacpp import CommonParams

_FULL_PRECISION = 0
"""llama.cpp's number of the type f32, in which it is to remember keys and values."""
_WARNINGS = 2
"""How much llama.cpp says while it serves: its warnings and errors."""
_LATE = 5.0
"""Seconds that llama.cpp has to write why it could not begin, once it has said that it could not."""
_WORDS = 1_000_000
"""Bytes of what llama.cpp says that are read for it."""


def load_exact(model: Path, *, context: int, adapter: Path | None = None) -> Any:
    """llama.cpp with the file loaded, computing as exactly as it can; it serves for as long as somebody holds it."""
    import xllamacpp

    params = _parameters(model, context)
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.use_jinja = False
    params.n_gpu_layers = 0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type(_FULL_PRECISION)
    params.cache_ram_mib = 0
    return _load(params)


def load_chat(model: Path, *, context: int, port: int, name: str) -> Any:
    """llama.cpp with the file loaded as its users have it, its chat template in force; serves as `load_exact` does."""
    params = _parameters(model, context)
    params.use_jinja = True
    params.port = port
    params.model_alias = {name}
    params.verbosity = _WARNINGS
    return _load(params)


class Line:
    """A connection for many questions: opening one for each took three times as long as the answers."""

    def __init__(self, address: str, *, timeout: float) -> None:
        self._http = http.client.HTTPConnection(urlsplit(address).netloc, timeout=timeout)

    def ask(self, path: str, asked: Mapping[str, object]) -> dict[str, Any]:
        """What llama.cpp answers; asked again where it has closed the connection meanwhile, as it does in a pause.

        Raises:
            OSError: it does not answer in time, is gone, or refuses; its words are quoted.
        """
        try:
            return self._ask(path, asked)
        except ConnectionError:
            self._http.close()
            return self._ask(path, asked)

    def _ask(self, path: str, asked: Mapping[str, object]) -> dict[str, Any]:
        self._http.request("POST", f"/{path}", json.dumps(dict(asked)), {"Content-Type": "application/json"})
        answer = self._http.getresponse()
        words = answer.read()
        if answer.status >= http.client.BAD_REQUEST:
            raise OSError(f"llama.cpp refuses {path}: {words.decode('utf-8', 'replace')[:300]}")
        said: dict[str, Any] = json.loads(words)
        return said


def post(address: str, path: str, asked: Mapping[str, object], *, timeout: float) -> dict[str, Any]:
    """What llama.cpp answers; `timeout` is in seconds, for each time that nothing comes."""
    body = json.dumps(dict(asked)).encode()
    return _read(urllib.request.Request(f"{address}/{path}", body, {"Content-Type": "application/json"}), timeout)


def get(address: str, path: str, *, timeout: float) -> dict[str, Any]:
    """What llama.cpp tells unasked; `timeout` as for `post`."""
    return _read(urllib.request.Request(f"{address}/{path}"), timeout)


def _read(request: urllib.request.Request, timeout: float) -> dict[str, Any]:
    # It is on this machine, where a proxy that the environment names cannot find it.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=timeout) as answer:
        said: dict[str, Any] = json.load(answer)
    return said


def _parameters(model: Path, context: int) -> "CommonParams":
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = context
    params.n_parallel = 1
    params.port = 0
    params.warmup = False
    params.ui = False
    params.fit_params = False
    # Its threads spin while they wait for each other: on a busy machine two of them took 40 times as long as one.
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads):
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    return params


def _reason(file: int) -> str:
    """What llama.cpp wrote of its error to the file; a thread of its own writes it, and may be late."""
    latest = time.monotonic() + _LATE
    while True:
        # Not by seeking: the thread writes where the file is at.
        lines = os.pread(file, _WORDS, 0).decode("utf-8", "replace").splitlines()
        said = next((line.split(": ", 1)[-1] for line in lines if "error" in line), "")
        if said or time.monotonic() > latest:
            return said or "it does not say why"
        time.sleep(0.01)


def _load(params: "CommonParams") -> Any:
    """llama.cpp with the file loaded; where it cannot be, what it says goes where errors go, as the last line."""
    import xllamacpp

    with tempfile.TemporaryFile() as words:
        kept = os.dup(2)
        os.dup2(words.fileno(), 2)
        try:
            server = xllamacpp.Server(params)
        except RuntimeError:
            said = _reason(words.fileno())
            # A thread of llama.cpp's may still be writing: what comes late goes where the rest of its words went.
            sys.stderr = os.fdopen(kept, "w", encoding="utf-8")
            raise SystemExit(f"llama.cpp cannot load it: {said}") from None
        os.dup2(kept, 2)
        os.close(kept)
    return server
