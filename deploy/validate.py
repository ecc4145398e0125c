"""Do the files for launchers fit stillroom, Ray and one another? `python -m deploy.validate`, from the root.

Enters: deploy/, pyproject.toml. Leaves: one line per problem on stdout, exit code 1 if there are any. Costs: three
seconds, no network; nothing is started but `bash -n`. What it cannot see: whether an image builds, and what a real
cluster makes of it.
"""

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.scripts.scripts import cli as ray_cli

from deploy.reading import Command, Offer, code_blocks, commands_in, launcher_offer, rayjob_offer, slurm_offer
from deploy.shapes import CLUSTER, DOCKERFILE, RAYJOB, SLURM, Deployment, at, cluster, dockerfile, rayjob, slurm
from stillroom.pipeline.arguments import RECIPE_COMMANDS, UsageMistake, parse
from stillroom.pipeline.recipe import load_chain
from stillroom.storage.errors import RecipeError

#: The recipe whose actors the launchers must have room for.
RECIPE = "recipes/cluster.yaml"


def problems(root: Path) -> list[str]:
    """Every problem of root/deploy as one line `file: what`; an empty list if all is well."""
    deploy = root / "deploy"
    names = sorted(path for path in deploy.rglob("*") if path.suffix in (".yaml", ".md", ".sbatch"))
    texts = {path.relative_to(deploy).as_posix(): path.read_text() for path in [*names, deploy / DOCKERFILE]}
    found: list[str] = []
    parsed: dict[str, Any] = {}
    for name, text in texts.items():
        if name.endswith(".yaml"):
            try:
                parsed[name] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                found.append(f"{name}: no YAML: {' '.join(str(error).split())}")
    recipes = {}
    for name in (name for name in parsed if name.startswith("recipes/")):
        try:
            recipes[name] = load_chain(deploy / name, files=False).plain
        except RecipeError as error:
            found.append(f"{name}: {error}")
    if found:  # the rest compares what can be read
        return found
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    site = Deployment(root, texts, parsed, project, recipes.get(RECIPE))
    return [line for check in _CHECKS for line in check(site)]


def _commands(site: Deployment) -> Iterator[str]:
    """Every command of stillroom and Ray that a file names: there, with those options, and recipes that are there."""
    scripts = {name: code_blocks(text) if name.endswith(".md") else text for name, text in site.texts.items()}
    found = [
        command for name, text in scripts.items() if not name.endswith(".yaml") for command in commands_in(name, text)
    ]
    found += commands_in(RAYJOB, str(at(site.parsed.get(RAYJOB), "spec.entrypoint")))
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        for line in at(site.parsed.get(CLUSTER), name) or []:
            found += commands_in(CLUSTER, line)
    started = {command.where for command in found if command.program == "stillroom" and command.words[:1] == ("teach",)}
    for name in sorted({RAYJOB, SLURM, "cluster/README.md"} - started):
        yield f"{name}: runs no `stillroom teach`"
    for command in found:
        wrong = _stillroom(site, command) if command.program == "stillroom" else _ray(command)
        if wrong:
            yield f"{command.where}: `{command.program} {' '.join(command.words)}`: {wrong}"


def _stillroom(site: Deployment, command: Command) -> str | None:
    if command.words == ("--version",):
        return None
    try:
        arguments = parse(command.words)
        if arguments.command not in RECIPE_COMMANDS:
            return None
        name = f"recipes/{Path(arguments.recipe).name}"
        if name not in site.texts:
            return f"there is no deploy/{name}"
        load_chain(site.root / "deploy" / name, arguments.overrides, files=False)
    except (UsageMistake, RecipeError) as mistake:
        return str(mistake)
    return None


def _ray(command: Command) -> str | None:
    known = dict(ray_cli.commands)
    known |= {f"job {name}": one for name, one in getattr(known.get("job"), "commands", {}).items()}
    size = 2 if command.words[0] == "job" else 1
    name, rest = " ".join(command.words[:size]), command.words[size:]
    if size == 2 and "job" not in known:  # it comes with Ray's dashboard, ray[default]
        return None
    if name not in known:
        return f"Ray has no command {name}"
    before, separator, _ = " ".join(rest).partition(" -- ")
    takes = _options(known[name])
    if name == "symmetric-run":
        if not separator:
            return "`--` must stand before the command to run"
        takes |= _options(known["start"]) - {"--head", "--node-ip-address", "--port", "--block"}
    unknown = [word for word in re.findall(r"(?<!\S)--[\w-]+", before) if word not in takes]
    return f"no such option: {', '.join(unknown)}" if unknown else None


def _options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


_RAY_VERSION = re.compile(r"(?:rayVersion: \"?|RAY_VERSION=|ray(?:\[\w+\])?==)([\d.]+\d)")


def _versions(site: Deployment) -> Iterator[str]:
    ours, rays = site.project["version"], set()
    needed = {need.name: need.specifier for need in map(Requirement, site.project["dependencies"])}
    for name, text in site.texts.items():
        for image in re.findall(r"(?<![\w./-])(?:[\w./:-]+/)?stillroom:\w[\w.]*\w", text):
            if image != f"stillroom:{ours}":
                yield f"{name}: image {image}, expected stillroom:{ours}, without a host"
        rays |= {
            (found, name) for found in re.findall(r"(?:rayVersion: \"?|RAY_VERSION=|ray(?:\[\w+\])?==)([\d.]+\d)", text)
        }
    for found, name in sorted(rays):
        if found not in needed["ray"]:
            yield f"{name}: Ray {found}, pyproject.toml wants {needed['ray']}"
    if len({found for found, _ in rays}) > 1:
        yield "Ray differs between files: " + ", ".join(f"{found} in {name}" for found, name in sorted(rays))
    instructions = site.texts[DOCKERFILE]
    for python in set(re.findall(r"PYTHON_VERSION=([\d.]+)", instructions)):
        if python not in SpecifierSet(site.project["requires-python"]):
            yield f"{DOCKERFILE}: Python {python}, pyproject.toml wants {site.project['requires-python']}"
    for base in re.findall(r"BASE_IMAGE=(\S+)", instructions):
        if re.match(r"[^/]*[.:][^/]*/", base):
            yield f"{DOCKERFILE}: {base} names a host"
    images = {
        at(site.parsed[RAYJOB], f"spec.rayClusterSpec.{group}.template.spec.containers.0.image")
        for group in ("headGroupSpec", "workerGroupSpecs.0")
    }
    if len(images | {at(site.parsed[CLUSTER], "docker.image")}) > 1:
        yield f"{RAYJOB}, {CLUSTER}: head, workers and launcher have different images"


_OFFERS: dict[str, Callable[[str, Any], Offer]] = {
    RAYJOB: rayjob_offer,
    CLUSTER: launcher_offer,
    SLURM: slurm_offer,
}


def _resources(site: Deployment) -> Iterator[str]:
    """The recipe's actors fit what each launcher offers, and its folders lie on what the pods share."""
    if site.recipe is None:
        yield f"{RECIPE}: there is none"
        return
    wanted, recipe = site.recipe.ray, site.recipe
    if wanted.address is None:
        yield f"{RECIPE}: ray.address is null: the driver would start a Ray of its own"
    driver = [str(recipe.run_dir), recipe.teacher.model, *(source.path for source in recipe.corpus.sources)]
    both = [recipe.teacher.model, recipe.store.path]
    for name, read in _OFFERS.items():
        try:
            offer = read(name, site.parsed.get(name, site.texts[name]))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            yield f"{name}: does not say how many GPUs and CPUs it has: {type(error).__name__} {error}"
            continue
        room = offer.actors(wanted.gpus_per_actor, wanted.cpus_per_actor)
        if wanted.actors > room:
            yield (f"{name}: {offer.workers} workers with {offer.gpus:g} GPUs and {offer.cpus:g} CPUs hold {room} "
                   f"actors, {RECIPE} has {wanted.actors}")  # fmt: skip
        for who, mounts, paths in (("head", offer.head_mounts, driver + both), ("worker", offer.worker_mounts, both)):
            for path in dict.fromkeys(paths):
                if mounts is not None and path.startswith("/") and not any(path.startswith(f"{m}/") for m in mounts):
                    yield f"{name}: {path} of {RECIPE} lies on no volume of the {who}"


def _paths(site: Deployment) -> Iterator[str]:
    for name, text in site.texts.items():
        for path in set(re.findall(r"(?<![\w/.])deploy/[\w./-]*\w", text)):
            if not (site.root / path).exists():
                yield f"{name}: there is no {path}"


_CHECKS = (rayjob, cluster, slurm, dockerfile, _commands, _versions, _resources, _paths)


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    found = problems(root)
    for line in found:
        print(f"deploy/{line}")
    if not found:
        print(f"deploy/: no problem found (against Ray {version('ray')})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
