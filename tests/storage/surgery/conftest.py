"""Sequences in units as teaching packs them, and a folder."""

from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.records import Sequence
from tests.strategies import random_sequences


@pytest.fixture
def sequences() -> list[Sequence]:
    """Three units of five or fewer, as teaching packs them: by rising digest."""
    found = random_sequences(np.random.default_rng(5), 13, shortest=4, longest=24)
    return sorted(found, key=lambda s: s.digest)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path
