"""What is asked of a cluster, and which one is joined."""

from typing import Any

import psutil
import pytest
import ray
from pydantic import ValidationError

from stillroom.pipeline.cluster import JOB, Actors, address_of, session, shipping
from stillroom.pipeline.recipe.teacher_schema import RayConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus_per_actor": 1.5}, "expected a whole number above 1, or a part of one GPU, got 1.5"),
        ({"resources": {"GPU": 1}}, "expected a resource of your own, got GPU"),
        ({"resources": {"teachers": 0}}, "expected an amount above 0 of teachers, got 0"),
        ({"placement": "packed"}, "Input should be 'default', 'spread' or 'pack'"),
    ],
)
def test_what_ray_would_refuse_hours_later_is_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RayConfig.model_validate(given)


def test_what_an_actor_asks_for() -> None:
    assert Actors(dict, RayConfig()).make() == {"num_cpus": 1, "num_gpus": 0, "resources": {}}
    config = RayConfig(cpus_per_actor=0.5, gpus_per_actor=0.25, resources={"teachers": 1}, placement="spread")
    assert Actors(dict, config).make() == {
        "num_cpus": 0.5, "num_gpus": 0.25, "resources": {"teachers": 1}, "scheduling_strategy": "SPREAD",
    }  # fmt: skip


def test_a_submitted_job_joins_its_own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert address_of(RayConfig()) is None, "an address in the environment is no reason to join"
    monkeypatch.setenv(JOB, "{}")
    assert address_of(RayConfig()) == "10.0.0.1:6379"
    assert address_of(RayConfig(address="auto")) == "auto"


def test_what_a_job_brings_is_sent_on_beside_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "0")
    with shipping() as options:
        (package,) = options["runtime_env"]["py_modules"]
        assert package.endswith("/stillroom")
    monkeypatch.setenv(JOB, '{"runtime_env": {"py_modules": ["gcs://other.zip"], "env_vars": {"A": "1"}}}')
    with shipping() as options:
        assert options["runtime_env"]["py_modules"][1:] == ["gcs://other.zip"]


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_local_ray_has_what_its_actors_ask_for_and_is_heard_on_this_machine_alone() -> None:
    config = RayConfig(actors=2, cpus_per_actor=0.5, resources={"teachers": 1.5}, placement="pack")
    with session(config):
        assert ray.cluster_resources()["teachers"] == 3
        listening = [
            connection.laddr.ip
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) > 4
        assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        group = Actors(dict, config).make()["scheduling_strategy"].placement_group
        assert group.wait(30)
        assert group.bundle_specs == [{"CPU": 0.5, "teachers": 1.5}] * 2
