"""One store with the teacher's inside per test session."""

import pytest
import torch

from tests.student.features.world import build_inner_world
from tests.student.world import World


@pytest.fixture(scope="session")
def inner(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return build_inner_world(tmp_path_factory.mktemp("inner"))
