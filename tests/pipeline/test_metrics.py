"""What a cluster's Prometheus reads of a teaching run."""

import time
import urllib.error
import urllib.request

import pytest
import ray

from stillroom.pipeline.cluster import session
from stillroom.pipeline.metrics import TeachingMetrics
from stillroom.pipeline.recipe.teacher_schema import RayConfig

PATIENCE_S = 120.0


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_node_shows_the_counts_of_a_run() -> None:
    """At the node's own endpoint, which Ray lists for Prometheus; numbers arrive there within about ten seconds."""
    with session(RayConfig(actors=1)):
        metrics = TeachingMetrics("a run")
        metrics.scored(1200, 3400)
        metrics.scored(800, 600)
        metrics.quarantined()
        metrics.actors(2, 1)
        metrics.actors(1, 3)
        wanted = {
            "ray_stillroom_units_total": 2.0,
            "ray_stillroom_tokens_total": 2000.0,
            "ray_stillroom_bytes_total": 4000.0,
            "ray_stillroom_quarantined_units_total": 1.0,
            "ray_stillroom_retries_total": 3.0,
            "ray_stillroom_actors": 1.0,
        }
        (node,) = ray.nodes()
        page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        end = time.monotonic() + PATIENCE_S
        while (found := shown(page, 'run="a run"')) != wanted:
            assert time.monotonic() < end, found
            time.sleep(0.2)


def shown(page: str, tag: str) -> dict[str, float]:
    """The values with this tag; {} where nobody answers yet."""
    try:
        with urllib.request.urlopen(page, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return {}
    samples = (line.rsplit(" ", 1) for line in lines if tag in line)
    return {name.partition("{")[0]: float(value) for name, value in samples}
