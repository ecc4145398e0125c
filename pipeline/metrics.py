"""A teaching run's numbers as Ray metrics, which a cluster's Prometheus collects from its nodes.

Enters: counts. Leaves: `ray_stillroom_*`, each with a tag `run`. Costs: microseconds; nothing where nobody collects.
"""

from ray.util.metrics import Counter, Gauge


class TeachingMetrics:
    """Of one run, in the driver. Needs a session."""

    def __init__(self, run: str) -> None:
        def counter(name: str, what: str) -> Counter:
            metric = Counter(f"stillroom_{name}", description=what, tag_keys=("run",))
            metric.set_default_tags({"run": run})
            return metric

        self._tokens = counter("tokens", "Tokens scored by the teachers")
        self._units = counter("units", "Units scored")
        self._bytes = counter("bytes", "Bytes of the shards written")
        self._retries = counter("retries", "Actors lost")
        self._quarantined = counter("quarantined_units", "Units given up")
        self._actors = Gauge("stillroom_actors", description="Actors at work", tag_keys=("run",))
        self._actors.set_default_tags({"run": run})
        self._lost = 0

    def scored(self, tokens: int, size_bytes: int) -> None:
        """A unit is scored and written."""
        self._units.inc(1)
        self._tokens.inc(tokens)
        self._bytes.inc(size_bytes)

    def quarantined(self) -> None:
        """A unit is given up."""
        self._quarantined.inc(1)

    def actors(self, ready: int, lost: int) -> None:
        """ready: at work now. lost: since the run began."""
        self._actors.set(ready)
        if lost > self._lost:
            self._retries.inc(lost - self._lost)
            self._lost = lost
