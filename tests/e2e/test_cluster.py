"""A real cluster, on whose nodes stillroom is not installed: jobs run, are killed anywhere, and finish when submitted
again; nodes come and go.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom.storage.store import open_store
from tests.e2e.clusters import Cluster, driver, progress
from tests.e2e.runs import Setup, assert_equal_rows, distil, sentences, wait_for

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

FEW = sentences(3, 40)
MANY = sentences(11, 700)
OVER: dict[str, Any] = {"store__unit_tokens": 128, "corpus__heldout": 0.02}


@pytest.fixture(scope="module", name="cluster")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head, and one node with one CPU, and with a GPU for Ray to count."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.add("--num-gpus=1", '--resources={"teachers": 2}')
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module", name="undisturbed")
def _undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    setup = Setup.make(tmp_path_factory.mktemp("undisturbed"), MANY, **OVER)
    distil(setup)
    return setup


@pytest.fixture(scope="module", name="few")
def _few(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    setup = Setup.make(tmp_path_factory.mktemp("few"), FEW, **OVER)
    distil(setup)
    return setup


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == code, printed
    return printed


def total_units(setup: Setup) -> int:
    return len(open_store(str(setup.folder / "store")).planned())


def scored_once(setup: Setup, undisturbed: Setup, *, driver_killed: bool = False) -> None:
    """Everything is committed, with the rows of an undisturbed run, and each unit was scored for the log once."""
    assert_equal_rows(setup.folder / "store", undisturbed.folder / "store")
    scored = sum(line["units_scored"] for line in setup.ledger())
    units = total_units(setup)
    assert units == len(open_store(str(setup.folder / "store")).committed())
    # A driver's SIGKILL between a commit and its ledger line may lose that line; it can never add one.
    assert units - 256 < scored <= units if driver_killed else scored == units


def in_mid_teaching(setup: Setup) -> Callable[[], bool]:
    return lambda: (setup.folder / "store" / "_delta_log" / "00000000000000000001.json").exists()


def test_a_job_runs_where_stillroom_is_not_installed(cluster: Cluster, tmp_path: Path, few: Setup) -> None:
    """By `ray job submit`, which takes it along."""
    setup = Setup.make(tmp_path, FEW, **OVER)
    printed = finish(cluster.submit(setup))
    assert "succeeded" in printed, printed
    scored_once(setup, few)
    state = progress(setup)
    assert (state["state"], state["units"]["pending"]) == ("done", 0)
    # Two actors are asked for, there is room for one.
    assert state["actors"] == {"wanted": 2, "ready": 1, "lost": 0}


@pytest.mark.slow
def test_a_driver_outside_the_cluster_sends_stillroom(cluster: Cluster, tmp_path: Path, few: Setup) -> None:
    setup = Setup.make(tmp_path, FEW, **OVER)
    words = driver("teach", str(setup.folder / "recipe.yaml"), f"ray.address={cluster.address}", "ray.placement=spread")
    done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    scored_once(setup, few)


SHARED = """
import ray
from stillroom.pipeline.cluster import Actors, session
from stillroom.pipeline.recipe.teacher_schema import RayConfig

class Probe:
    def gpus(self):
        return ray.get_runtime_context().get_accelerator_ids()["GPU"]

config = RayConfig(address="ADDRESS", actors=2, cpus_per_actor=0.5, gpus_per_actor=0.5, resources={"teachers": 1},
                   placement="pack", ship=False)
with session(config):
    makes = Actors(lambda **options: ray.remote(**options)(Probe).remote(), config)
    actors = [makes.make() for _ in range(2)]
    print(ray.get([actor.gpus.remote() for actor in actors], timeout=100))
"""


@pytest.mark.slow
def test_actors_share_a_gpu(cluster: Cluster) -> None:
    """Half of one each, packed into one node, with a resource of its own. In a process that has the cluster's token
    from the beginning: Ray reads it once."""
    words = [sys.executable, "-c", SHARED.replace("ADDRESS", cluster.address)]
    done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.splitlines()[-1:] == ["[['0'], ['0']]"], done.stderr


@pytest.mark.slow
def test_a_killed_driver(cluster: Cluster, tmp_path: Path, undisturbed: Setup) -> None:
    setup = Setup.make(tmp_path, MANY, **OVER)
    process = cluster.submit(setup)
    wait_for(in_mid_teaching(setup), process, "the first commit")
    for victim in cluster.processes("stillroom.pipeline teach"):
        victim.kill()
    assert "failed" in finish(process, code=1)
    before = dict(open_store(str(setup.folder / "store")).committed())
    assert 0 < len(before) < total_units(setup), "the stop came after the teaching: make it longer"
    ledger_before = sum(line["units_scored"] for line in setup.ledger())
    finish(cluster.submit(setup))
    after = open_store(str(setup.folder / "store")).committed()
    assert before.items() <= dict(after).items()
    assert sum(line["units_scored"] for line in setup.ledger()) - ledger_before == len(after) - len(before)
    scored_once(setup, undisturbed, driver_killed=True)


@pytest.mark.slow
def test_a_killed_actor(cluster: Cluster, tmp_path: Path, undisturbed: Setup) -> None:
    setup = Setup.make(tmp_path, MANY, **OVER)
    process = cluster.submit(setup)
    wait_for(in_mid_teaching(setup), process, "the first commit")
    (victim,) = cluster.processes("ray::TeacherActor")
    victim.kill()
    assert "an actor died" in finish(process)
    assert progress(setup)["actors"]["lost"] == 1
    scored_once(setup, undisturbed)


@pytest.mark.slow
def test_a_node_joins_and_takes_work_and_another_leaves(tmp_path: Path, undisturbed: Setup) -> None:
    """The first node's actor is held still, so that whatever is done then is done by the node that joined."""
    cluster = Cluster(tmp_path)
    try:
        first = cluster.add()
        setup = Setup.make(tmp_path / "setup", MANY, **OVER)
        process = cluster.submit(setup)
        wait_for(in_mid_teaching(setup), process, "the first commit")
        (actor,) = cluster.processes("ray::TeacherActor", first)
        actor.suspend()
        cluster.add()
        wait_for(lambda: progress(setup)["actors"]["ready"] == 2, process, "the second actor")
        scored = progress(setup)["units"]["scored"]
        assert scored < total_units(setup)
        wait_for(lambda: progress(setup)["units"]["scored"] >= scored + 10, process, "work by the second actor")
        cluster.kill(first)
        printed = finish(process)
        assert printed.count("is handed out again, alone") == 2
        state = progress(setup)
        assert (state["state"], state["actors"]["ready"], state["actors"]["lost"]) == ("done", 1, 1)
        scored_once(setup, undisturbed)
    finally:
        cluster.stop()
