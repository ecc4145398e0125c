"""The student as its own process: without a teacher's libraries, interrupted, and killed."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillroom.pipeline.student.config import StudentJob
from tests.student.test_session import log_of
from tests.student.world import World, build_world

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


def stop(process: "subprocess.Popen[str]", how: signal.Signals, step: int) -> str:
    """Once it has said that this step is done; returns what it said after."""
    until(process, f"step {step}/")
    process.send_signal(how)
    err = finish(process, -how if how is signal.SIGKILL else 130)
    assert ("with a checkpoint" in err) == (how is not signal.SIGKILL), err
    return err


def require_same_end(run_dir: Path, whole: Path, how: str) -> None:
    """Log, result and weights, to the bit."""
    assert log_of(run_dir) == log_of(whole), how
    results = [json.loads((folder / "result.json").read_text()) for folder in (run_dir, whole)]
    for result in results:
        del result["seconds"], result["seconds_waited"], result["export"]
    assert results[0] == results[1], how
    found, expected = (load_file(folder / "export" / "model.safetensors") for folder in (run_dir, whole))
    assert found.keys() == expected.keys(), how
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name}, {how}"


def test_killed_and_interrupted_runs_end_as_an_undisturbed_one(world: World, tmp_path: Path) -> None:
    """One run, stopped three times, each time at a step drawn from those that are left."""
    finish(start(job(world, tmp_path / "whole"), tmp_path))
    cut, seed = job(world, tmp_path / "cut"), 6
    steps: list[int] = []
    generator = random.Random(seed)
    for number, how in enumerate((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)):
        steps.append(generator.randrange(max(steps, default=4) + 1, 14 + 6 * number))
        process = start(cut, tmp_path)
        if number:
            until(process, "going on after step")
        stop(process, how, steps[-1])
    finish(start(cut, tmp_path))
    require_same_end(tmp_path / "cut", tmp_path / "whole", f"stopped after steps {steps} of seed {seed}")


@pytest.fixture(scope="module", name="undisturbed")
def _undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    """gpt2, whose dropout has a generator that must come back too, and a whole run of it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    world = build_world(folder / "world", arch="gpt2")
    finish(start(job(world, folder / "whole", eval_every=7), folder))
    return world, folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_stopped_at_any_step_a_run_ends_with_the_same_weights(
    how: signal.Signals, seed: int, undisturbed: tuple[World, Path], tmp_path: Path
) -> None:
    """A kill may come before the first checkpoint: the run then starts over."""
    world, whole = undisturbed
    step = random.Random(f"{how.name}/{seed}").randrange(1, 17)
    said = f"{how.name} after step {step}, seed {seed}"
    cut = job(world, tmp_path / "cut", eval_every=7)
    stop(start(cut, tmp_path), how, step)
    assert step <= len([r for r in log_of(cut.run_dir) if r["kind"] == "step"]) < 30, said
    finish(start(cut, tmp_path))
    require_same_end(cut.run_dir, whole, said)


def test_a_finished_run_says_so_at_once(world: World, tmp_path: Path) -> None:
    finished = world.job(tmp_path / "run", steps=1)
    finish(start(finished, tmp_path))
    no_torch = "import sys\nsys.modules['torch'] = None"
    assert "already trained" in finish(start(finished, tmp_path, no_torch))
