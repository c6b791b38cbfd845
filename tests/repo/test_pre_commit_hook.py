"""The hook for pre-commit, run by pre-commit itself on a repository of somebody's."""

import shutil
import subprocess
from pathlib import Path

import pytest

from repo.page_examples import ROOT, user

pytest.importorskip("pre_commit", reason="needs pre-commit: pip install pre-commit")
if shutil.which("git") is None:
    pytest.skip("needs git: apt-get install git", allow_module_level=True)

GOOD = "backend: reference\ntraining:\n  epochs: 2\n"
BROKEN = "backend: reference\ntraining:\n  epochs: none\n"
NOBODY = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.invalid", "-c", "commit.gpgsign=false")


def git(folder: Path, *words: str) -> None:
    """Run git in a folder, whoever its user is."""
    subprocess.run(["git", *NOBODY, *words], cwd=folder, env=user(), check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with our hook in it, as pre-commit clones one."""
    folder = tmp_path_factory.mktemp("hooks")
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", folder)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "hooks")
    return folder


def hooked(hooks: Path, folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What pre-commit says when these files are about to be committed."""
    repository = folder / "repository"
    for name, text in files.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text, encoding="utf-8")
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    return subprocess.run(
        ["pre-commit", "try-repo", str(hooks), "ft-check", "--verbose"],
        cwd=repository,
        env=user(PRE_COMMIT_HOME=str(folder / "home")),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_hook_refuses_what_is_broken_and_names_it(hooks: Path, tmp_path: Path) -> None:
    """Of several changed configurations each is checked, and the broken one fails the commit with its line."""
    files = {"finetune.yaml": GOOD, "jobs/finetune-large.yml": BROKEN, "other.yaml": BROKEN}
    done = hooked(hooks, tmp_path, files)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "finetune.yaml: no problems" in done.stdout
    assert "jobs/finetune-large.yml:3 training.epochs" in done.stdout
    assert "other.yaml" not in done.stdout


def test_hook_lets_through_what_is_good(hooks: Path, tmp_path: Path) -> None:
    """A good configuration passes, and what is no configuration is not looked at."""
    done = hooked(hooks, tmp_path, {"finetune.yaml": GOOD, "README.md": "", "myfinetune.yaml": BROKEN})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problems" in done.stdout
