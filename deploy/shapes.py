"""Each file for a launcher by itself: the fields, values and instructions that its reader wants.

Enters: a `Deployment`. Leaves: lines `file: what`. Costs: milliseconds, and one `bash -n`.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import ray

from deploy.reading import options_of, read_dockerfile
from stillroom.pipeline.recipe import Recipe

RAYJOB, CLUSTER, SLURM, DOCKERFILE = "kuberay/rayjob.yaml", "cluster/cluster.yaml", "slurm/teach.sbatch", "Dockerfile"

# Fields of ray.io/v1, as of KubeRay 1.7; those of a pod are Kubernetes' own.
_RAYJOB_FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
             "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
             "preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes",
             "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"},
    "spec.rayClusterSpec": {"authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
                            "headGroupSpec", "headServiceAnnotations", "historyServerOptions", "managedBy",
                            "networkPolicy", "rayVersion", "suspend", "tlsOptions", "upgradeStrategy",
                            "workerGroupSpecs"},
    "spec.rayClusterSpec.autoscalerOptions": {"args", "command", "env", "envFrom", "idleTimeoutSeconds", "image",
                                              "imagePullPolicy", "resources", "securityContext", "upscalingMode",
                                              "version", "volumeMounts"},
    "spec.rayClusterSpec.headGroupSpec": {"enableIngress", "headService", "ingressOptions", "labels", "rayStartParams",
                                          "resources", "serviceType", "template"},
    "spec.rayClusterSpec.workerGroupSpecs.0": {"groupName", "idleTimeoutSeconds", "labels", "maxReplicas",
                                               "minReplicas", "numOfHosts", "priority", "rayStartParams", "replicas",
                                               "resources", "scaleStrategy", "suspend", "template"},
}  # fmt: skip
_RAYJOB_VALUES: dict[str, Callable[[Any], bool]] = {
    "apiVersion": lambda value: value == "ray.io/v1",
    "kind": lambda value: value == "RayJob",
    "metadata.name": lambda value: bool(re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", str(value))),
    "spec.entrypoint": lambda value: isinstance(value, str) and bool(value),
    "spec.submissionMode": lambda value: value in ("K8sJobMode", "HTTPMode", "SidecarMode"),
    "spec.shutdownAfterJobFinishes": lambda value: value is True,
    "spec.ttlSecondsAfterFinished": lambda value: isinstance(value, int) and value >= 0,
    "spec.backoffLimit": lambda value: isinstance(value, int) and value >= 0,
    "spec.rayClusterSpec.rayVersion": lambda value: isinstance(value, str),
    "spec.rayClusterSpec.authOptions.mode": lambda value: value == "token",
    "spec.rayClusterSpec.enableInTreeAutoscaling": lambda value: value is True,
    "spec.rayClusterSpec.headGroupSpec.rayStartParams": lambda value: _texts(value),
    "spec.rayClusterSpec.workerGroupSpecs.0.rayStartParams": lambda value: _texts(value),
    "spec.rayClusterSpec.workerGroupSpecs.0.groupName": lambda value: isinstance(value, str),
}


@dataclass(frozen=True)
class Deployment:
    """Everything that is compared. texts: by path below deploy/; parsed: the YAML of them."""

    root: Path
    texts: dict[str, str]
    parsed: dict[str, Any]
    project: dict[str, Any]
    recipe: Recipe | None


def rayjob(site: Deployment) -> Iterator[str]:
    job = site.parsed.get(RAYJOB)
    for path, fields in _RAYJOB_FIELDS.items():
        section = at(job, path)
        unknown = set(section) - fields if isinstance(section, dict) else {"(missing)"}
        if unknown:
            yield f"{RAYJOB}: {path or 'document'}: unknown {', '.join(sorted(unknown))}"
    for path, right in _RAYJOB_VALUES.items():
        if not right(at(job, path)):
            yield f"{RAYJOB}: {path} cannot be {at(job, path)!r}"
    least, now, most = (
        at(job, f"spec.rayClusterSpec.workerGroupSpecs.0.{name}") for name in ("minReplicas", "replicas", "maxReplicas")
    )
    if not all(isinstance(number, int) for number in (least, now, most)) or not 0 <= least <= now <= most:
        yield f"{RAYJOB}: expected 0 ≤ minReplicas ≤ replicas ≤ maxReplicas, got {least}, {now}, {most}"
    for path in ("headGroupSpec", "workerGroupSpecs.0"):
        pod = at(job, f"spec.rayClusterSpec.{path}.template.spec") or {}
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod.get("containers", []):
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            if mounted - volumes:
                yield f"{RAYJOB}: {path}: {', '.join(sorted(mounted - volumes))} is mounted and is no volume"
            asked, most = (container.get("resources", {}).get(kind) for kind in ("requests", "limits"))
            if asked != most:
                yield f"{RAYJOB}: {path}: requests and limits differ; KubeRay tells Ray the limits"


def cluster(site: Deployment) -> Iterator[str]:
    config = site.parsed.get(CLUSTER)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    for error in jsonschema.Draft7Validator(schema).iter_errors(config):
        yield f"{CLUSTER}: {'.'.join(map(str, error.absolute_path))}: {error.message[:120]}"
    head, kinds = at(config, "head_node_type"), at(config, "available_node_types") or {}
    if head not in kinds:
        yield f"{CLUSTER}: head_node_type {head} is none of {', '.join(kinds)}"
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not any("ray start" in line for line in at(config, name) or []):
            yield f"{CLUSTER}: {name} starts no Ray"
    if "--env RAY_AUTH_MODE=token" not in (at(config, "docker.run_options") or []):
        yield f"{CLUSTER}: docker.run_options do not ask for a token (--env RAY_AUTH_MODE=token)"


def slurm(site: Deployment) -> Iterator[str]:
    script = site.texts[SLURM]
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if checked.returncode:
        yield f"{SLURM}: {' '.join(checked.stderr.split())}"
    if options_of(script).get("ntasks-per-node") != "1":
        yield f"{SLURM}: `ray symmetric-run` wants one task on each node (--ntasks-per-node=1)"
    if not re.search(r"^export RAY_AUTH_MODE=token$", script, flags=re.MULTILINE):
        yield f"{SLURM}: other users reach the nodes: export RAY_AUTH_MODE=token"


def dockerfile(site: Deployment) -> Iterator[str]:
    try:
        instructions = read_dockerfile(site.texts[DOCKERFILE])
    except ValueError as error:
        yield f"{DOCKERFILE}: {error}"
        return
    ignoring = site.root / "deploy" / f"{DOCKERFILE}.dockerignore"
    sent = ignoring.read_text().splitlines() if ignoring.exists() else []
    last = max(instruction.stage for instruction in instructions)
    stages = [re.search(r" AS (\w+)$", i.words, flags=re.IGNORECASE) for i in instructions if i.name == "FROM"]
    names = {stage[1] for stage in stages if stage}
    for instruction in (i for i in instructions if i.name in ("COPY", "ADD")):
        *sources, _ = (word for word in instruction.words.split() if not word.startswith("--"))
        origin = re.search(r"--from=(\S+)", instruction.words)
        if origin and origin[1] not in names:
            yield f"{DOCKERFILE}: COPY from {origin[1]}, which is no stage"
        if not origin and instruction.stage == last:
            yield f"{DOCKERFILE}: {instruction.words}: the image must hold the wheel, not the tree"
        for source in sources if not origin else []:
            if not (site.root / source).exists():
                yield f"{DOCKERFILE}: COPY {source}: not in the project"
            if f"!{source}" not in sent:
                yield f"{DOCKERFILE}: COPY {source}: {DOCKERFILE}.dockerignore does not let it through"
    final = [i for i in instructions if i.stage == last]
    users = [i.words for i in final if i.name == "USER"]
    if not users or users[-1] in ("root", "0"):
        yield f"{DOCKERFILE}: the image must not run as root"
    if not any(i.name == "RUN" and ".whl" in i.words for i in final):
        yield f"{DOCKERFILE}: the image installs no wheel"
    if any(i.name == "ENTRYPOINT" for i in instructions):
        yield f"{DOCKERFILE}: KubeRay and the cluster launcher start a shell: no ENTRYPOINT"


def at(value: Any, path: str) -> Any:
    """The value at a dotted path, list positions as numbers; None if it is not there."""
    for key in path.split(".") if path else []:
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
