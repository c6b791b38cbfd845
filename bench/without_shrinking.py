"""A pytest plugin: a law that fails is not made smaller; whether it fails is all that a mutant asks."""

import pytest
from hypothesis import Phase, settings


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """After the project has loaded its profile, take away the search for the smallest case."""
    settings.register_profile("without shrinking", settings(), phases=(Phase.explicit, Phase.generate))
    settings.load_profile("without shrinking")
