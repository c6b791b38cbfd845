"""The peers' own environments, made when they are missing, and the BLAS that a contestant is given."""

import ctypes
import os
import subprocess
import sys
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
