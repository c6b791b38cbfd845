"""Laws of the BLAS that MLX gets on Linux: a fast one before MLX itself, or one line that says what to install."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.sessions import need

need("mlx")
pytestmark = [
    pytest.mark.tier2,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: only there MLX brings a slow BLAS"),
]


def told(*lines: str) -> tuple[str, str]:
    """What a fresh process that runs these lines prints, and what it says besides."""
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return found.stdout.strip(), found.stderr


def test_fast_blas_is_loaded_for_everybody_before_mlx(tmp_path: Path) -> None:
    """A library in the environment's own folder is found past broken ones, and its symbols are everybody's."""
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "libopenblas.so").write_text("no library")
    for library in (
        Path(str(find_spec("mlx.core").origin)).parents[1] / "mlx_cpu.libs"
    ).iterdir():  # its own, under another name
        (folder / library.name).symlink_to(library)
        if library.name.startswith("liblapack"):
            (folder / "libopenblas.so.7").symlink_to(library)
    out, _ = told(
        f"import ctypes, sys; sys.prefix = {str(tmp_path)!r}",
        "before = hasattr(ctypes.CDLL(None), 'cblas_sgemm')",
        "from finetune.backends.mlx import blas",
        "print(before, 'mlx.core' in sys.modules, blas.blas_name(), hasattr(ctypes.CDLL(None), 'cblas_sgemm'))",
        "print(repr(blas.blas_note()))",
    )
    first, note = out.splitlines()
    before, imported, name, after = first.split(" ", 3)
    assert (before, imported, after) == ("False", "False", "True")
    assert name.startswith("libopenblas")
    assert note == "''"


def test_without_a_fast_blas_one_line_says_what_to_install() -> None:
    """Where nothing is found the note names what to install: once, on standard error; elsewhere there is none."""
    out, said = told(
        "import ctypes",
        "def missing(name=None, **how):",
        "    if name is not None: raise OSError(name)",
        "    return object()",
        "real, ctypes.CDLL = ctypes.CDLL, missing",
        "import finetune.backends.mlx.blas",
        "ctypes.CDLL = real",
        "from finetune.backends import open_backend",
        "print([open_backend('mlx').versions()['blas'] for _ in range(2)])",
    )
    assert out == "['netlib, the slow reference', 'netlib, the slow reference']"
    assert said.count("libopenblas0-pthread") == said.count("pip install mkl") == len(said.splitlines()) == 1


def test_after_mlx_it_is_too_late() -> None:
    """Where MLX is there already nothing is loaded, and that is not called fast."""
    out, said = told(
        "import mlx.core", "from finetune.backends import open_backend", "print(open_backend('mlx').versions()['blas'])"
    )
    assert out == "netlib, the slow reference"
    assert len(said.splitlines()) == 1
