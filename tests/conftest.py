"""Fixtures shared by all tests: two threads at most, where the development data is, typed shapes."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

_MATHS = [
    "ppomax.masked",
    "ppomax.advantages",
    "ppomax.normalise",
    "ppomax.experience",
    "ppomax.losses",
    "ppomax.models.logprobs",
    "ppomax.rollout.sampling",
]
_hook = install_import_hook(_MATHS, "beartype.beartype")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real development data, beside the checkout or named by PPOMAX_SHARED_DATA."""
    named = os.environ.get("PPOMAX_SHARED_DATA")
    place = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not place.is_dir():
        pytest.skip(f"development data not found at {place}; set PPOMAX_SHARED_DATA")
    return place
