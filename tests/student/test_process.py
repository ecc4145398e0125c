"""The student as its own process: without a teacher's libraries, interrupted, and killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.student.config import StudentJob
from tests.student.test_session import log_of
from tests.student.world import World

pytestmark = pytest.mark.real

#: Importing one of these fails in the process; asking whether they are installed does not.
BLOCKED = """
import sys
from importlib.machinery import ModuleSpec

class Blocked:
    names = ("ray", "vllm", "deltalake", "stillroom.workers")
    def find_spec(self, name, path=None, target=None):
        if name in self.names or name.startswith(tuple(n + "." for n in self.names)):
            return ModuleSpec(name, self)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        raise ImportError(f"{module.__name__} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def start(job: StudentJob, folder: Path, prologue: str = "") -> "subprocess.Popen[str]":
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    code = f"{prologue}\nimport runpy, sys\nsys.argv = ['student', {str(path)!r}]\n"
    code += "runpy.run_module('stillroom.pipeline.student', run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", code] if prologue else [
        sys.executable, "-m", "stillroom.pipeline.student", str(path)
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def until(process: "subprocess.Popen[str]", words: str) -> None:
    """Read the process's lines until one has these words."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"{words!r} never came:\n{''.join(seen)}")


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return err


def job(world: World, run_dir: Path, **fields: Any) -> StudentJob:
    return world.job(run_dir, steps=30, checkpoint_every=4, **fields)


def test_it_runs_with_the_teachers_libraries_blocked(world: World, tmp_path: Path) -> None:
    err = finish(start(world.job(tmp_path / "run", steps=2), tmp_path, BLOCKED))
    assert "trained, exported" in err
    probe = subprocess.run(
        [sys.executable, "-c", f"{BLOCKED}\nimport deltalake"], capture_output=True, text=True, check=False
    )
    assert "deltalake is blocked" in probe.stderr


def test_killed_and_interrupted_runs_end_as_an_undisturbed_one(world: World, tmp_path: Path) -> None:
    finish(start(job(world, tmp_path / "whole"), tmp_path))
    cut = job(world, tmp_path / "cut")

    killed = start(cut, tmp_path)
    until(killed, "step 10/")
    os.kill(killed.pid, signal.SIGKILL)
    finish(killed, -signal.SIGKILL)

    interrupted = start(cut, tmp_path)
    until(interrupted, "going on after step")
    until(interrupted, "step 14/")
    os.kill(interrupted.pid, signal.SIGINT)
    assert "with a checkpoint" in finish(interrupted, 130)

    terminated = start(cut, tmp_path)
    until(terminated, "step 20/")
    os.kill(terminated.pid, signal.SIGTERM)
    finish(terminated, 130)

    finish(start(cut, tmp_path))
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("cut", "whole")]
    for result in results:
        del result["seconds"], result["seconds_waited"], result["export"]
    assert results[0] == results[1]


def test_a_finished_run_says_so_at_once(world: World, tmp_path: Path) -> None:
    finished = world.job(tmp_path / "run", steps=1)
    finish(start(finished, tmp_path))
    no_torch = "import sys\nsys.modules['torch'] = None"
    assert "already trained" in finish(start(finished, tmp_path, no_torch))
