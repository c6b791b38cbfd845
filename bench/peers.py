"""The peers' own environments, made when they are missing, and the BLAS that a contestant is given.

`python bench/peers.py` gets llama.cpp's converter, which laws and the benchmark hold ours to, and
`python bench/peers.py trl mlx-lm` makes the environments in which laws judge these.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".peers"
PACKAGES = {
    "trl": (("torch",), ("torch", "transformers", "peft", "datasets", "trl")),
    "mlx-lm": (("mlx[cpu]" if sys.platform == "linux" else "mlx", "mlx-lm"), ("mkl",)),
}
"""What each is made of, installed one after the other."""


def peer_python(peer: str) -> Path:
    """The interpreter of a peer's own environment."""
    folder = PEERS / peer
    python, done = folder / "bin" / "python", folder / "packages-ok"
    if not done.exists():
        print(f"setting up: an environment for {peer} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in PACKAGES[peer]:
            command = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *packages]
            subprocess.run(command, check=True)
        done.touch()
    return python


def converter() -> Path:
    """The folder of llama.cpp's `convert_hf_to_gguf.py`, from the source archive of llama-cpp-python.

    The chat templates that llama.cpp is tested on lie in it, too.
    """
    folder = PEERS / "llama.cpp"
    if not (folder / "models" / "templates").exists():
        print("getting llama.cpp's converter (once)", file=sys.stderr)
        PEERS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PEERS) as name:
            # pip builds nothing of it; it only reads what the archive needs.
            words = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", name]
            command = [sys.executable, "-m", "pip", *words, "--constraint", ROOT / "constraints.txt"]
            subprocess.run([*command, "llama-cpp-python"], check=True)
            [archive] = Path(name).glob("*.tar.gz")
            with tarfile.open(archive) as files:
                files.extractall(name, [file for file in files if _is_of_converter(file.name)], filter="data")
            [found] = Path(name).glob("*/vendor/llama.cpp")
            if folder.exists():  # an older one, without templates
                shutil.rmtree(folder)
            shutil.move(found, folder)
    return folder


def _is_of_converter(name: str) -> bool:
    below = name.partition("/vendor/llama.cpp/")[2]
    return below == "convert_hf_to_gguf.py" or below.startswith(("conversion/", "gguf-py/gguf/", "models/templates/"))


def fast_blas() -> dict[str, str]:
    """The environment in which MLX on Linux multiplies by a fast library: the system's OpenBLAS, or else MKL."""
    if sys.platform != "linux":
        return {}
    try:
        ctypes.CDLL("libopenblas.so.0", mode=os.RTLD_LOCAL)
    except OSError:
        found = sorted((PEERS / "mlx-lm" / "lib").glob("libmkl_rt.so*"))
        return {"LD_PRELOAD": str(found[-1])} if found else {}
    return {"LD_PRELOAD": "libopenblas.so.0"}


if __name__ == "__main__":
    for peer in sys.argv[1:]:
        print(peer_python(peer))
    if not sys.argv[1:]:
        converter()
