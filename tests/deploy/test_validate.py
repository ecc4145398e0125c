"""The files below deploy/ pass their checks, and each check can fail: one change, one named problem."""

import re
import shutil
from pathlib import Path

import pytest

from deploy.reading import commands_in, read_dockerfile
from deploy.validate import problems

ROOT = Path(__file__).parent.parent.parent
RAYJOB, CLUSTER, SLURM, DOCKERFILE, RECIPE = (
    "kuberay/rayjob.yaml", "cluster/cluster.yaml", "slurm/teach.sbatch", "Dockerfile", "recipes/cluster.yaml",
)  # fmt: skip


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of what is checked; the rooms are there by name alone."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for room in ("pipeline", "storage", "workers"):
        (tmp_path / room).mkdir()
    return tmp_path


def change(root: Path, name: str, old: str, new: str) -> None:
    path = root / "deploy" / name
    text = path.read_text()
    assert re.search(old, text, flags=re.MULTILINE), f"{old!r} is not in {name}: the test has lost its object"
    path.write_text(re.sub(old, new, text, count=1, flags=re.MULTILINE))


def test_deploy_as_it_is() -> None:
    assert problems(ROOT) == []


# file, what is replaced (a pattern), by what, and a pattern of the problem that must be named
CHANGES = [
    (RAYJOB, "^spec:", "spec: [", "rayjob.yaml: no YAML"),
    (RAYJOB, "ray.io/v1$", "ray.io/v1alpha1", "apiVersion cannot be 'ray.io/v1alpha1'"),
    (RAYJOB, "kind: RayJob", "kind: RayCluster", "kind cannot be 'RayCluster'"),
    (RAYJOB, "name: stillroom-teach", "name: Stillroom_Teach", "metadata.name cannot be"),
    (RAYJOB, "^  entrypoint: .*", "", "spec.entrypoint cannot be None"),
    (RAYJOB, "K8sJobMode$", "KubernetesMode", "spec.submissionMode cannot be"),
    (RAYJOB, "shutdownAfterJobFinishes: true", "shutdownAfterFinish: true", "unknown shutdownAfterFinish"),
    (RAYJOB, "AfterJobFinishes: true", "AfterJobFinishes: false", "shutdownAfterJobFinishes cannot be"),
    (RAYJOB, "enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", "enableInTreeAutoscaling cannot be"),
    (RAYJOB, "mode: token", "mode: disabled", "authOptions.mode cannot be 'disabled'"),
    (RAYJOB, 'num-cpus: "0"', "num-cpus: 0", "rayStartParams cannot be"),
    (RAYJOB, "maxReplicas: 4", "maxReplicas: 0\n        minReplicas: 1", "expected 0 ≤ minReplicas"),
    (RAYJOB, "maxReplicas: 4", "maxReplicas: 3", "hold 6 actors, recipes/cluster.yaml has 8"),
    (RAYJOB, 'limits: {cpu: "8"', 'limits: {cpu: "3"', "requests and limits differ"),
    (RAYJOB, "- name: shared\n", "- name: sharing\n", "shared is mounted and is no volume"),
    (RAYJOB, "mountPath: /shared}", "mountPath: /data}", "lies on no volume of the head"),
    (RAYJOB, r"(ray-worker[\s\S]*)mountPath: /shared}", r"\1mountPath: /data}", "lies on no volume of the worker"),
    (RAYJOB, "nvidia.com/gpu: \"2\"}\n +limits: .*", 'nvidia.com/gpu: "2"}', "does not say how many GPUs"),
    (RAYJOB, "entrypoint: stillroom teach", "entrypoint: stillroom teech", "unknown command teech"),
    (RAYJOB, "entrypoint: stillroom teach", "entrypoint: stillroom teach --bar", "unrecognized argument --bar"),
    (RAYJOB, "stillroom/cluster.yaml", "stillroom/clusters.yaml", "there is no deploy/recipes/clusters.yaml"),
    (RAYJOB, "stillroom/cluster.yaml", "stillroom/cluster.yaml signal.topk.kk=3", r"signal\.topk\.kk"),
    (RAYJOB, "entrypoint: stillroom teach", "entrypoint: stillroom plan", "rayjob.yaml: runs no `stillroom teach`"),
    (RAYJOB, "image: stillroom:0.1.0", "image: stillroom:0.0.9", "image stillroom:0.0.9, expected stillroom:0.1.0"),
    (RAYJOB, "image: stillroom:0.1.0", "image: ray:1", "have different images"),
    (RAYJOB, "image: stillroom:0.1.0", "image: registry.example:5000/a/stillroom:0.1.0", "without a host"),
    (RAYJOB, 'rayVersion: "2.60.0"', 'rayVersion: "2.61.0"', "Ray differs between files"),
    (CLUSTER, "idle_timeout_minutes: 10", "idle_timeout: 10", "'idle_timeout' was unexpected"),
    (CLUSTER, "resources: {CPU: 8, GPU: 1}", "resources: {CPU: 8, GPU: 0.5}", "is not of type 'integer'"),
    (CLUSTER, "resources: {CPU: 8, GPU: 1}", "resources: {CPU: 8}", "does not say how many GPUs"),
    (CLUSTER, "head_node_type: head", "head_node_type: heads", "head_node_type heads is none of head, gpu"),
    (CLUSTER, "^max_workers: 8", "max_workers: 7", "hold 7 actors, recipes/cluster.yaml has 8"),
    (CLUSTER, "ray start --address", "ray begin --address", "worker_start_ray_commands starts no Ray"),
    (CLUSTER, "ray start --head --port", "ray start --head --ports", "no such option: --ports"),
    (CLUSTER, "--volume /shared:/shared", "--volume /shared:/data", "lies on no volume"),
    (CLUSTER, ".*RAY_AUTH_MODE=token", "", "do not ask for a token"),
    (SLURM, "^fi$", "", "teach.sbatch: bash: line"),
    (SLURM, "--nodes=2", "--nodes=1", "hold 4 actors, recipes/cluster.yaml has 8"),
    (SLURM, "--gpus-per-node=4", "--gres=gpu", "does not say how many GPUs"),
    (SLURM, "--ntasks-per-node=1", "--ntasks-per-node=4", "wants one task on each node"),
    (SLURM, "^export RAY_AUTH_MODE=token", "", "export RAY_AUTH_MODE=token"),
    (SLURM, "ray symmetric-run --address", "ray symetric-run --address", "Ray has no command symetric-run"),
    (SLURM, "--min-nodes", "--wait-for", "no such option: --wait-for"),
    (SLURM, "--num-cpus=", "--head --num-cpus=", "no such option: --head"),
    (SLURM, "    -- bash", "    bash", "`--` must stand before"),
    (SLURM, "recipes/cluster.yaml", "recipes/none.yaml", "there is no deploy/recipes/none.yaml"),
    (SLURM, "stillroom.pipeline teach", "stillroom.pipeline verify", "teach.sbatch: runs no `stillroom teach`"),
    (DOCKERFILE, "^USER stillroom", "USER root", "must not run as root"),
    (DOCKERFILE, "^USER stillroom", "", "must not run as root"),
    (DOCKERFILE, "^WORKDIR", "WORKDIRS", "is no instruction with words"),
    (DOCKERFILE, "^ARG BASE", "RUN true\nARG BASE", "RUN stands before the first FROM"),
    (DOCKERFILE, "--from=wheel", "--from=wheels", "COPY from wheels, which is no stage"),
    (DOCKERFILE, "^COPY --from=wheel /wheel /wheel", "COPY pipeline /app", "must hold the wheel, not the tree"),
    (DOCKERFILE, r"/wheel/\*.whl", "stillroom", "installs no wheel"),
    (DOCKERFILE, "^COPY storage storage", "COPY store storage", "COPY store: not in the project"),
    ("Dockerfile.dockerignore", "^!storage$", "", "COPY storage: Dockerfile.dockerignore does not let it through"),
    (DOCKERFILE, "^CMD .*", 'ENTRYPOINT ["stillroom"]', "no ENTRYPOINT"),
    (DOCKERFILE, "RAY_VERSION=2.60.0", "RAY_VERSION=2.49.0", r"Ray 2.49.0, pyproject.toml wants >=2.50"),
    (DOCKERFILE, "PYTHON_VERSION=3.12", "PYTHON_VERSION=3.10", "Python 3.10, pyproject.toml wants >=3.11"),
    (DOCKERFILE, "BASE_IMAGE=nvidia", "BASE_IMAGE=registry.example/nvidia", "names a host"),
    (RECIPE, "actors: 8", "actor: 8", r"recipes/cluster.yaml: .*actor"),
    (RECIPE, "actors: 8", "actors: 9", "hold 8 actors, recipes/cluster.yaml has 9"),
    (RECIPE, "gpus_per_actor: 1", "gpus_per_actor: 2", "hold 4 actors"),
    (RECIPE, "cpus_per_actor: 2", "cpus_per_actor: 5", "2 GPUs and 8 CPUs hold 4 actors"),
    (RECIPE, "address: auto", "address: null", "ray.address is null"),
    (RECIPE, "path: /shared/stores", "path: /scratch/stores", "/scratch/stores/teacher-top64 of .* lies on no volume"),
    ("recipes/demo.yaml", "^corpus:", "corpora:", r"recipes/demo.yaml: .*corpora"),
    ("slurm/README.md", "stillroom ls /shared", "stillroom ls --tree /shared", "unrecognized argument --tree"),
    ("cluster/README.md", "ray job submit", "ray job start", "Ray has no command job start"),
    ("cluster/README.md", "--no-wait", "--detach", "no such option: --detach"),
    ("cluster/README.md", "ray down deploy", "ray down --all deploy", "no such option: --all"),
    ("cluster/README.md", "ray.actors=4", "ray.actor=4", r"ray\.actor"),
    ("kuberay/README.md", "deploy/recipes/cluster.yaml", "deploy/recipes/k8s.yaml", "there is no deploy/recipes/k8s"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "problem"), CHANGES)
def test_a_change_is_told(copied: Path, name: str, old: str, new: str, problem: str) -> None:
    change(copied, name, old, new)
    found = problems(copied)
    assert [line for line in found if re.search(problem, line)], found


def test_a_recipe_that_is_gone(copied: Path) -> None:
    (copied / "deploy" / RECIPE).unlink()
    assert "recipes/cluster.yaml: there is none" in problems(copied)


def test_commands_within_commands() -> None:
    script = (
        'STORE="${STORE:-/a b}"\nray exec x.yaml \'stillroom ls $STORE\' && stillroom gc "${STORE}" \\\n  --dry-run\n'
    )
    found = [(command.program, command.words) for command in commands_in("a", script)]
    assert found == [
        ("ray", ("exec", "x.yaml", "stillroom ls /a b")),
        ("stillroom", ("ls", "/a", "b")),
        ("stillroom", ("gc", "/a b", "--dry-run")),
    ]


def test_dockerfile_stages() -> None:
    text = "# a\nARG A=1\nFROM a AS one\nRUN x \\\n  # in between\n  && y\nFROM b\nUSER z\n"
    found = [(one.name, one.words, one.stage) for one in read_dockerfile(text)]
    assert found == [
        ("ARG", "A=1", -1),
        ("FROM", "a AS one", 0),
        ("RUN", "x && y", 0),
        ("FROM", "b", 1),
        ("USER", "z", 1),
    ]
    with pytest.raises(ValueError, match="there is no FROM"):
        read_dockerfile("ARG A=1\n")
