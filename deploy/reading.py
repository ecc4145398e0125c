"""The files for launchers as facts: instructions of a Dockerfile, commands in scripts and pages, what each offers.

Enters: texts and parsed YAML. Leaves: frozen records for `deploy.validate`; ValueError, one line, for what cannot be
read. Costs: nothing.
"""

import re
import shlex
from dataclasses import dataclass
from typing import Any

#: Dockerfile reference, "Overview of instructions"; ONBUILD, MAINTAINER and the like are not for here.
INSTRUCTIONS = frozenset(
    ("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "SHELL",
     "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile. stage: which FROM it belongs to, -1 before the first."""

    name: str
    words: str
    stage: int


@dataclass(frozen=True)
class Command:
    """A command in a script or page, its variables filled in. program: `stillroom` or `ray`; words: what follows."""

    where: str
    program: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Offer:
    """What a launcher offers at most. mounts: the folders that a head and a worker share; None: all of their disk."""

    where: str
    workers: int
    gpus: float
    cpus: float
    head_mounts: tuple[str, ...] | None = None
    worker_mounts: tuple[str, ...] | None = None

    def actors(self, gpus_each: float, cpus_each: float) -> int:
        """How many actors fit, each on one worker."""
        by_gpu = self.gpus // gpus_each if gpus_each else float("inf")
        return self.workers * int(min(by_gpu, self.cpus // cpus_each))


def logical_lines(text: str) -> list[str]:
    """Lines with their continuations, without comments and blank lines."""
    kept = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [line.strip() for line in re.sub(r"[ \t]*\\\n\s*", " ", "\n".join(kept)).splitlines()]


def read_dockerfile(text: str) -> list[Instruction]:
    """Raises ValueError for a line that is no instruction, and for one before the first FROM."""
    found: list[Instruction] = []
    stage = -1
    for line in logical_lines(text):
        name, _, words = line.partition(" ")
        if name not in INSTRUCTIONS or not words.strip():
            raise ValueError(f"{line[:60]!r} is no instruction with words")
        stage += name == "FROM"
        if stage < 0 and name != "ARG":
            raise ValueError(f"{name} stands before the first FROM")
        found.append(Instruction(name, words.strip(), stage))
    if stage < 0:
        raise ValueError("there is no FROM")
    return found


def code_blocks(page: str) -> str:
    """The fenced blocks of a page in Markdown."""
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE))


#: A program where a command may begin, and its words up to an operator of the shell; they may hold another command.
_COMMAND = re.compile(r"(?:(?<=^)|(?<=[\s'\"(]))(stillroom|python3? -m stillroom\.pipeline|ray)(?=[ \t]+([^;|&>\n]*))")
_ASSIGNED = re.compile(r"^\s*(?:export )?([A-Z_]+)=\"?\$\{\1:-([^}]*)\}\"?", flags=re.MULTILINE)


def commands_in(where: str, script: str) -> list[Command]:
    """The commands of stillroom and Ray in a script. `$NAME` is filled in where the script gives it a default."""
    given = dict(_ASSIGNED.findall(script))
    found = []
    for line in logical_lines(script):
        for program, rest in _COMMAND.findall(line):
            filled = re.sub(r"\$\{?([A-Z_]+)\}?", lambda name: given.get(name[1], name[0]), rest)
            found.append(Command(where, "ray" if program == "ray" else "stillroom", _words(filled)))
    return found


def _words(text: str) -> tuple[str, ...]:
    """Words of a command. A quotation mark without its partner belongs to a command around it, or is cut off inside."""
    try:
        return tuple(shlex.split(text))
    except ValueError:
        last = max(text.rfind("'"), text.rfind('"'))
        return tuple(shlex.split(f"{text[:last]} {text[last + 1 :]}"))


def options_of(script: str) -> dict[str, str]:
    """The `#SBATCH --name=value` lines of a batch script."""
    return dict(re.findall(r"^#SBATCH +--([a-z-]+)(?:=(\S+))?$", script, flags=re.MULTILINE))


def slurm_offer(where: str, script: str) -> Offer:
    """Raises ValueError for a script that does not say its nodes, GPUs and CPUs."""
    options = options_of(script)
    numbers = [options.get(name, "") for name in ("nodes", "gpus-per-node", "cpus-per-task")]
    if not all(number.isdigit() for number in numbers):
        raise ValueError("#SBATCH must give --nodes, --gpus-per-node and --cpus-per-task as numbers")
    nodes, gpus, cpus = map(int, numbers)
    return Offer(where, nodes, gpus, cpus)


def rayjob_offer(where: str, job: dict[str, Any]) -> Offer:
    """Of the groups with GPUs. Raises KeyError, TypeError or ValueError for what has no such fields."""
    cluster = job["spec"]["rayClusterSpec"]
    group = next(group for group in cluster["workerGroupSpecs"] if _limits(group).get("nvidia.com/gpu"))
    limits = _limits(group)
    return Offer(
        where, group["maxReplicas"], float(limits["nvidia.com/gpu"]), float(limits["cpu"]),
        _mounts(cluster["headGroupSpec"]), _mounts(group),
    )  # fmt: skip


def _limits(group: dict[str, Any]) -> dict[str, Any]:
    return dict(container_of(group)["resources"]["limits"])


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    """Ray's container of a group of pods: the first."""
    return dict(group["template"]["spec"]["containers"][0])


def _mounts(group: dict[str, Any]) -> tuple[str, ...]:
    return tuple(mount["mountPath"] for mount in container_of(group)["volumeMounts"])


def launcher_offer(where: str, config: dict[str, Any]) -> Offer:
    """Of the node type with GPUs. Raises KeyError, TypeError or ValueError for what has no such fields."""
    kinds = config["available_node_types"].values()
    kind = next(kind for kind in kinds if kind["resources"].get("GPU"))
    workers = min(config["max_workers"], kind["max_workers"])
    mounts = tuple(
        option.split()[1].split(":")[1] for option in config["docker"]["run_options"] if option.startswith("--volume ")
    )
    return Offer(where, workers, kind["resources"]["GPU"], kind["resources"]["CPU"], mounts, mounts)
