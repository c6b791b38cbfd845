"""A real Ollama without a hub: an old one from the packages that bring it, or the one that is installed.

`make ollama` gets Ollama 0.9.3 out of bigdl-core-cpp, which was built for Intel's GPUs, into the cache: `FT_OLLAMA`
names another folder. What it asks of a GPU's library is answered by one of thirteen functions that finds none.
`python -m support.real_ollama` gets it, and nothing a second time.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx

from finetune.files import write_folder

HOME = Path(
    os.environ.get("FT_OLLAMA") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune/ollama"
)
PACKAGES = (
    "bigdl-core-cpp==2.7.0b20260110",
    *(f"intel-{name}==2025.0.5" for name in ("cmplr-lib-rt", "cmplr-lib-ur", "openmp", "sycl-rt")),
)
REMEDY = "make ollama gets one, or install it: https://ollama.com/download"
_GPU = [f"ggml_backend_{name}" for name in ("init", "is_sycl")] + [
    f"ggml_backend_sycl_{name}"
    for name in (
        *("buffer_type", "get_device_count", "get_device_description", "get_device_memory", "get_device_name"),
        *("get_gpu_list", "host_buffer_type", "init", "print_sycl_devices", "reg", "split_buffer_type"),
    )
]
"""What Ollama asks of the GPU's library; each finds nothing, and counts none."""


def get_ollama() -> None:
    """Get it from its packages, unless it is there.

    Raises:
        LookupError: pip or a C compiler cannot be had.
    """
    if HOME.exists():
        return
    compiler = shutil.which("cc")
    if compiler is None:
        raise LookupError("a C compiler (cc) is not installed")
    print("getting Ollama 0.9.3 (once; 160 MB)", file=sys.stderr)
    HOME.parent.mkdir(parents=True, exist_ok=True)

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="finetune-") as held:
            words = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--pre",
                "--no-deps",
                "--dest",
                held,
                *PACKAGES,
            ]
            if subprocess.run(words, stderr=subprocess.DEVNULL).returncode:
                raise LookupError(f"pip cannot get {PACKAGES[0]} here")
            for wheel in Path(held).glob("*.whl"):
                with zipfile.ZipFile(wheel) as files:
                    for name in files.namelist():
                        if "/libs/ollama/" in name or (".data/data/lib/" in name and ".so" in name):
                            (folder / Path(name).name).write_bytes(files.read(name))
            source = Path(held) / "none.c"
            source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _GPU), encoding="utf-8")
            library = folder / "libggml-sycl.so"
            subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        (folder / "ollama-lib").chmod(0o755)

    write_folder(HOME, fill)


@contextlib.contextmanager
def serving(models: Path) -> Iterator[str]:
    """A server with its models in this folder; the address at which it answers.

    Raises:
        LookupError: there is none.
    """
    own = HOME / "ollama-lib"
    program = str(own) if own.exists() else shutil.which("ollama")
    if program is None:
        raise LookupError("no Ollama is here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    outside = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
    outside |= {"OLLAMA_HOST": address, "OLLAMA_MODELS": str(models), "OLLAMA_NUM_GPU": "0", "HOME": str(models)}
    outside |= {"LD_LIBRARY_PATH": str(HOME)} if own.exists() else {}
    with (models / "server.log").open("wb") as log:
        child = subprocess.Popen([program, "serve"], env=outside, stdout=log, stderr=log)
    try:
        _wait(child, f"http://{address}/api/version")
        yield f"http://{address}"
    finally:
        child.terminate()
        child.wait(timeout=30)


def _wait(child: subprocess.Popen[bytes], address: str, *, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and child.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(address, timeout=1).status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    raise RuntimeError(f"Ollama did not answer at {address}: see its server.log")


if __name__ == "__main__":
    try:
        get_ollama()
        print(f"Ollama is in {HOME}")
    except LookupError as error:
        print(f"Ollama cannot be had: {error}; its tests are skipped", file=sys.stderr)
