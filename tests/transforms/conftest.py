"""Every tiny model that has a wiring."""

import pytest

from .families import CASES


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """Every tiny model in turn."""
    return str(request.param)
