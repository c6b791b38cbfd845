"""A pytest plugin, there wherever FineTune is installed: `pytest --finetune-subject=trl` judges a trainer, law by law.

It holds only the options. Each law is one test, beside whatever else is collected; nothing of the suite is read where
no trainer is named.
"""

import pytest

__all__ = ["pytest_addoption", "pytest_configure"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say which trainer is judged, and how."""
    group = parser.getgroup("finetune", "laws of fine-tuning")
    group.addoption("--finetune-subject", metavar="NAME", help="Judge this trainer; as `ft verify --subject`.")
    group.addoption("--finetune-tier", type=int, default=1, choices=(1, 2), help="Laws up to this tier.")
    group.addoption("--finetune-seed", type=int, default=0, help="Where cases are drawn from.")
    group.addoption("--finetune-python", metavar="PATH", help="The interpreter in which the trainer is installed.")


def pytest_configure(config: pytest.Config) -> None:
    """Have the laws collected where a trainer is named; every run of pytest loads this file, so it imports none."""
    config.addinivalue_line("markers", "finetune: a law of fine-tuning that a trainer is held to")
    if config.getoption("--finetune-subject"):
        config.pluginmanager.import_plugin("finetune.verify.plugin_laws")
