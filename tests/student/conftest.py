"""One world per test session: building it takes a second."""

import pytest
import torch

from tests.student.world import World, build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return build_world(tmp_path_factory.mktemp("world"))
