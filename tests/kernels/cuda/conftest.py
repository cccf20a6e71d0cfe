"""The long part of these tests runs when it is asked for: `make test-kernels`, or `-m kernels`."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "kernels: the long part of the CUDA kernels' tests (make test-kernels)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "kernels" in config.getoption("markexpr"):
        return
    long = [item for item in items if item.get_closest_marker("kernels")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
