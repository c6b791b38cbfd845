"""The wheel of this source tree, and a reader's fresh environment with it in."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from repo.page_examples import ROOT, user


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree, built without the network."""
    pytest.importorskip("build", reason="needs build: pip install 'finetune-suite[dev]'")
    pytest.importorskip("hatchling", reason="needs hatchling, with which the wheel is built: pip install hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = folder.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def reader(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment: the built wheel, of others what is installed here, and no source tree."""
    place = tmp_path_factory.mktemp("reader") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=120)
    python = place / "bin" / "python"
    # What a .pth file names is searched for packages; .pth files in it, such as an editable install's, are not read.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (place / "lib" / version / "site-packages" / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        str(wheel),
    ]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=300)
    ask = "import sys, finetune, finetune_strategies as ours; print(finetune.__file__, ours.__file__, *sys.path)"
    done = subprocess.run([str(python), "-c", ask], env=user(python), capture_output=True, text=True, check=True)
    first, second, *searched = done.stdout.split()
    assert first.startswith(str(place))
    assert second.startswith(str(place))
    assert not [path for path in searched if path.startswith((str(ROOT / "src"), str(ROOT / "strategies")))]
    return python
