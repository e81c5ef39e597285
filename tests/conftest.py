"""Shared by all tests: those marked ``gpu`` are skipped where there is no Hopper GPU."""

import pytest
import torch

HOPPER = (9, 0)


def hopper_missing() -> str | None:
    """Why GPU tests can't run here; None if they can."""
    if not torch.cuda.is_available():
        return "no GPU"
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, not 9.0"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests, counted and with the reason, where they can't run."""
    reason = hopper_missing()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
