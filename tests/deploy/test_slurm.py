"""What `teach.sbatch` makes of an allocation: words for srun, a token, and the exit code of what has really run.

Slurm and Ray are stood in for by scripts in PATH; what is tested is the batch script. With the real `ray symmetric-run`
it would stop every Ray of this user on this machine.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "deploy" / "slurm" / "teach.sbatch"

# srun drops its own options; ray runs what stands after `--`; python is the teacher's driver.
SRUN = 'echo "srun $*" >> "$SEEN"; while [[ "$1" == --* ]]; do shift; done; "$@"'
RAY = 'echo "ray $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*" >> "$SEEN"; while [[ "$1" != -- ]]; do shift; done; shift; "$@"'
PYTHON = f'[[ "$1" == -c ]] && exec {sys.executable} "$@"; echo "python $*" >> "$SEEN"; exit "${{CODE:-0}}"'


class Allocation:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = folder / "seen"
        (folder / "bin").mkdir()
        (folder / "bin" / "activate").write_text("")
        for name, body in (("srun", SRUN), ("ray", RAY), ("python", PYTHON)):
            self.stand_in(name, body)

    def stand_in(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def submit(self, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "SEEN": str(self.seen),
            "TMPDIR": str(self.folder), "VENV": str(self.folder), "RECIPE": "/a folder/recipe.yaml",
            "HEAD_IP": "10.0.0.1", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8",
        }  # fmt: skip
        return subprocess.run(["bash", SCRIPT], env=given | environment, capture_output=True, text=True)


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


def test_the_command_reaches_ray_with_address_nodes_and_token(allocation: Allocation) -> None:
    done = allocation.submit()
    assert done.returncode == 0, done.stderr
    srun, ray, python = allocation.seen.read_text().splitlines()
    assert "--ntasks=2 --ntasks-per-node=1 --cpus-per-task=8" in srun
    assert ray.startswith("ray token 64 symmetric-run --address 10.0.0.1:6379 --min-nodes 2 --num-cpus=8")
    assert python == "python -m stillroom.pipeline teach /a folder/recipe.yaml"


def test_the_exit_code_is_that_of_teach(allocation: Allocation) -> None:
    assert allocation.submit(CODE="2").returncode == 2


def test_a_node_that_fails_later_does_not_undo_a_run(allocation: Allocation) -> None:
    allocation.stand_in("srun", f"( {SRUN} ); exit 1")
    assert allocation.submit().returncode == 0


def test_a_ray_that_does_not_start_is_no_success(allocation: Allocation) -> None:
    """`ray symmetric-run` ends with 0 then, and the command has not run."""
    allocation.stand_in("ray", "echo 'Failed to start Ray' >&2; exit 0")
    done = allocation.submit()
    assert done.returncode == 1
    assert "the command has not run to its end" in done.stderr
    assert not list(allocation.folder.glob("tmp.*")), "the status file stays behind"
