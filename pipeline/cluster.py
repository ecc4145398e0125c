"""Ray for the driver: a session on the recipe's cluster, or on a local Ray of its own.

Enters: the recipe's `ray` section. Leaves: a connection, and what actors ask of the cluster. Costs: 3–8 s to start a
local Ray.

A local Ray listens on the loopback interface only and has no dashboard unless asked for one.
"""

import json
import math
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from stillroom.pipeline.process import uninterrupted
from stillroom.pipeline.recipe.teacher_schema import RayConfig
from stillroom.pipeline.ship import came_with_job, package_folder
from stillroom.storage.errors import RecipeError, StillroomError, TeacherError

#: Set by Ray in the driver of a submitted job: what it was submitted with.
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@contextmanager
def session(config: RayConfig, *, ranks: int = 1) -> Iterator[None]:
    """A connection to the recipe's cluster, or a local Ray that ends with the block. ranks: processes of one teacher.

    Raises TeacherError if the cluster cannot be joined, RecipeError if the local machine has less than is asked for.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = address_of(config)
    if address is not None:
        options["address"] = address
        ship = config.ship and not came_with_job()
    else:
        ship = False
        # Its own address: a RAY_ADDRESS or another local Ray must not be joined by surprise.
        options |= {
            "address": "local",
            "num_cpus": max(1, math.ceil(config.actors * ranks * config.cpus_per_actor)),
            "resources": {name: config.actors * ranks * each for name, each in config.resources.items()},
            "include_dashboard": config.dashboard,
            "_node_ip_address": "127.0.0.1",
        }
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Else Ray writes a token into the home directory, which may not be writable.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with ExitStack() as meanwhile:
        if address is None:
            meanwhile.enter_context(_loopback())
        _connect(options | (meanwhile.enter_context(shipping()) if ship else {}))
    try:
        _require_resources(config, ranks)
        yield
    finally:
        with uninterrupted():  # half a shutdown leaves processes behind
            ray.shutdown()


@contextmanager
def _loopback() -> Iterator[None]:
    """Ray (2.60) replaces a node's address 127.0.0.1 by the machine's own, and then listens on every interface. Where
    it thinks that no cluster can be, as on a desktop, it leaves it, and its servers listen on loopback alone."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def shipping() -> Iterator[dict[str, Any]]:
    """Options of ray.init that send stillroom to the nodes, beside what a submitted job sends itself."""
    job = json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {}
    with package_folder() as package:
        # Ray refuses two that name the same field, unless told that the driver's holds.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        yield {"runtime_env": {"py_modules": [str(package), *job.get("py_modules", [])]}}


def address_of(config: RayConfig) -> str | None:
    """The cluster to join, None for a local Ray. Inside `ray job submit` it is the job's, whose address Ray gives."""
    if config.address is None and JOB in os.environ:
        return os.environ.get("RAY_ADDRESS", "auto")
    return config.address


class Actors:
    """Teacher actors as the recipe asks for them. Needs a session.

    create: `ray.remote`'s options → a new actor. ranks: processes of one teacher, each with the resources of an actor;
    they get a placement group of their own, which ends with the actor.
    """

    def __init__(self, create: Callable[..., Any], config: RayConfig, *, ranks: int = 1) -> None:
        self._create, self._config, self._ranks = create, config, ranks
        self._options: dict[str, Any] = {"num_cpus": config.cpus_per_actor, "num_gpus": config.gpus_per_actor}
        self._options["resources"] = dict(config.resources)
        self._groups: dict[Any, Any] = {}
        if config.placement == "spread":
            self._options["scheduling_strategy"] = "SPREAD"
        elif config.placement == "pack":
            self._options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group(config.actors))

    def make(self) -> Any:
        """Another actor; of a teacher of several ranks the first, which starts the others in its placement group."""
        if self._ranks == 1:
            return self._create(**self._options)
        group = self._group(self._ranks)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        actor = self._create(**self._options | {"scheduling_strategy": strategy})
        self._groups[actor] = group
        return actor

    def end(self, actor: Any) -> None:
        """Kill it, also out of reach; what it held is free for the next."""
        ray.kill(actor, no_restart=True)
        group = self._groups.pop(actor, None)
        if group is not None:
            remove_placement_group(group)

    def _group(self, bundles: int) -> Any:
        config = self._config
        each = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor, **config.resources}
        bundle = {name: amount for name, amount in each.items() if amount}
        return placement_group([bundle] * bundles, strategy="PACK")


def _connect(options: dict[str, Any]) -> None:
    """ray.init, which has its own idea of SIGTERM: it would end the process without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as error:
        raise KeyboardInterrupt from error
    except (OSError, RuntimeError, ValueError, RayError) as error:
        where = f"the Ray cluster at {options['address']} (ray.address)"
        raise TeacherError(
            f"cannot join {where}: {one_line(error)}. Is it running, with the same Python and Ray? One that asks for "
            "a token needs RAY_AUTH_MODE=token in the environment"
            if options["address"] != "local"
            else f"a local Ray cannot be started: {one_line(error)}"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _require_resources(config: RayConfig, ranks: int) -> None:
    """Ray lets an actor that nothing can hold wait for ever. A cluster may grow, a local Ray does not."""
    held = ray.cluster_resources()
    for name, each in (("GPU", config.gpus_per_actor), ("CPU", config.cpus_per_actor)):
        needed = config.actors * ranks * each
        if address_of(config) is None and needed > held.get(name, 0):
            of_each = f"{ranks} ranks with {each:g} {name}s" if ranks > 1 else f"{each:g} {name}s"
            raise RecipeError(
                f"{config.actors} actors with {of_each} each need {needed:g}, this machine has "
                f"{held.get(name, 0):g}: lower ray.actors or ray.{name.lower()}s_per_actor{_none_of(name, held)}"
            )


def _none_of(name: str, held: dict[str, float]) -> str:
    return " (0 runs the teacher on the CPU)" if name == "GPU" and not held.get(name) else ""


def ask(actors: Actors, method: str, *arguments: Any) -> Any:
    """One new actor's answer to one call; it is ended. Raises what it raised on purpose, TeacherError else."""
    actor = actors.make()
    try:
        return ray.get(getattr(actor, method).remote(*arguments))
    except RayError as error:
        raise cause_of(error) from error
    finally:
        actors.end(actor)


def cause_of(error: Exception, what: str = "") -> StillroomError:
    """What the actor raised. what: the work it had, for errors that do not name it themselves."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, StillroomError):
        return cause
    return TeacherError(f"{what}a teacher actor failed: {one_line(cause or error)}")


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
