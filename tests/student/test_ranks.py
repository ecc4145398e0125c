"""Processes that train one student together: as one would, stopped, resumed by others, and broken."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from stillroom.pipeline.student.config import StudentJob
from stillroom.storage.snapshot import Snapshot
from tests.student.features.test_runs import CURRICULUM, narrow
from tests.student.features.world import build_inner_world
from tests.student.test_process import until
from tests.student.test_session import go, log_of
from tests.student.world import World, build_world

pytestmark = pytest.mark.real

#: Of sums over positions in another order, in float32: losses, weights after a few steps.
LOSS, WEIGHT = 1e-4, 2e-4

#: In each process before it starts: rank 1 loses its way in the third step.
POISON = """
import os, math
from stillroom.pipeline.student import trainer
whole, calls = trainer.Trainer._whole, []
def poisoned(self, *given):
    found = whole(self, *given)
    calls.append(found)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        found["loss"] = found["loss"] * math.nan
    return found
trainer.Trainer._whole = poisoned
"""


def start(job: StudentJob, folder: Path, *launcher: str) -> "subprocess.Popen[str]":
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *(launcher or ("-m",)), "stillroom.pipeline.student", str(path)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@contextmanager
def ranks(job: StudentJob, folder: Path, prologue: str, world: int = 2) -> Iterator[list["subprocess.Popen[str]"]]:
    """The processes by themselves, as torchrun would start them."""
    path = folder / "job.json"
    path.write_text(job.model_dump_json())
    code = f"{prologue}\nimport runpy, sys\nsys.argv = ['student', {str(path)!r}]\n"
    code += "runpy.run_module('stillroom.pipeline.student', run_name='__main__')"
    meeting = {"STILLROOM_RENDEZVOUS": f"file://{folder}/meeting", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    _, err = process.communicate(timeout=400)
    assert process.returncode == code, err
    return err


def rank_of(launcher: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    (found,) = [p for p in psutil.Process(launcher.pid).children() if p.environ()["RANK"] == str(rank)]
    return found


def together(world: World, run_dir: Path, processes: int, **fields: Any) -> StudentJob:
    return world.job(run_dir, **fields).model_copy(update={"processes": processes, "rank_timeout_s": 60.0})


def close_to(run_dir: Path, one: Path) -> None:
    """The same records but for rounding, the same packs, the same weights but for rounding."""
    found, expected = log_of(run_dir), log_of(one)
    measured = {"loss", "kd", "ce", "features", "grad_norm", "kl", "perplexity", "teacher_mass", "student_mass"}
    rounded = measured | {"ece", "top1", "top5"}  # the three change where two ids are as likely
    exact = [{k: v for k, v in record.items() if k not in rounded} for record in found]
    assert exact == [{k: v for k, v in record.items() if k not in rounded} for record in expected]
    for record, other in zip(found, expected, strict=True):
        assert record.get("features", {}) == pytest.approx(other.get("features", {}), rel=LOSS)
        for name in (measured - {"features"}) & record.keys():
            assert record[name] == (other[name] and pytest.approx(other[name], rel=LOSS)), name
    weights = load_file(one / "export" / "model.safetensors")
    for name, tensor in load_file(run_dir / "export" / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0.0, atol=WEIGHT)


def test_two_processes_train_as_one_does(world: World, tmp_path: Path) -> None:
    """Three packs a step: one of the two has two of them, in turn."""
    fields: dict[str, Any] = {"steps": 4, "batch_packs": 3, "eval_packs": 3}
    two = start(together(world, tmp_path / "two", 2, **fields), tmp_path)
    go(world.job(tmp_path / "one", **fields))
    err = finish(two)
    assert err.count("step 4/4") == err.count("trained, exported") == 1, "one of them alone speaks"
    assert "Warning" not in err
    close_to(tmp_path / "two", tmp_path / "one")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    same = {"packs", "tokens", "trained_positions", "skipped_steps", "bindings", "parameters"}
    assert {key: results[0][key] for key in same} == {key: results[1][key] for key in same}


@pytest.mark.slow
def test_a_run_goes_on_under_another_number_of_processes(world: World, tmp_path: Path) -> None:
    """2, stopped by a signal to one rank; then 1, stopped; then 3 under torchrun. Epochs that end inside a step."""
    fields: dict[str, Any] = {"epochs": 3, "batch_packs": 3, "eval_packs": 2, "checkpoint_every": 2}
    go(world.job(tmp_path / "one", **fields))
    job = together(world, tmp_path / "run", 2, **fields)

    two = start(job, tmp_path)
    until(two, "step 3/")
    rank_of(two, 1).send_signal(signal.SIGTERM)
    assert "with a checkpoint; the same command goes on" in finish(two, 130)

    alone = start(job.model_copy(update={"processes": 1}), tmp_path)
    until(alone, "going on after step")
    until(alone, "tokens/s")
    alone.send_signal(signal.SIGTERM)
    finish(alone, 130)

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m")
    finish(start(job, tmp_path, *torchrun))
    close_to(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_what_is_learned_beside_the_student_is_shared_too(tmp_path: Path) -> None:
    """Phases that use the matrices, and phases in which they have no gradient and must stay as they are."""
    world = build_inner_world(tmp_path / "world")
    fields = {"model": {"from": str(narrow(tmp_path / "student"))}, "steps": None, "batch_packs": 3, **CURRICULUM}
    finish(start(together(world, tmp_path / "two", 2, **fields), tmp_path))
    go(world.job(tmp_path / "one", **fields))
    close_to(tmp_path / "two", tmp_path / "one")
    files = (tmp_path / name / "checkpoints" / "step-00000010" / "model.safetensors" for name in ("one", "two"))
    one, two = (load_file(file) for file in files)
    matrices = [name for name in one if name.startswith("features.")]
    assert matrices
    for name in matrices:
        torch.testing.assert_close(two[name], one[name], rtol=0.0, atol=WEIGHT)


@pytest.mark.slow
def test_ctrl_c_stops_all_and_two_processes_resume_bit_equal(tmp_path: Path) -> None:
    """gpt2 has dropout: random numbers of two processes follow from the step."""
    world = build_world(tmp_path / "world", arch="gpt2")
    finish(start(together(world, tmp_path / "whole", 2), tmp_path))
    cut = together(world, tmp_path / "cut", 2)
    stopped = start(cut, tmp_path)
    until(stopped, "step 3/")
    stopped.send_signal(signal.SIGINT)
    finish(stopped, 130)
    finish(start(cut, tmp_path))
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    whole, again = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_loss_of_one_rank_that_is_not_finite_is_met_by_all(world: World, on_nan: str, tmp_path: Path) -> None:
    job = world.job(tmp_path / "run", steps=4, on_nan=on_nan, eval_packs=1)
    (tmp_path / "run").mkdir()
    with ranks(job, tmp_path, POISON) as both:
        errs = [finish(process, 1 if on_nan == "stop" else 0) for process in both]
    records = [record for record in log_of(tmp_path / "run") if record["kind"] == "step"]
    if on_nan == "skip":
        assert [record["skipped"] for record in records] == [False, False, True, False]
        assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_steps"] == 1
        return
    assert len(records) == 2
    go(world.job(tmp_path / "one", steps=3, eval_packs=1))
    (third,) = [record for record in log_of(tmp_path / "one") if record["kind"] == "step" and record["step"] == 3]
    for err in errs:
        blamed = re.search(r"step 3: loss nan.*packs (\S+) \(epoch/number\), sequences (\w+)", err)
        assert blamed is not None, err
        (unit,) = Snapshot.read(world.snapshot).units_of([blamed[2]])
        assert f"; units {unit}; packs" in err
        assert blamed[1] == f"{third['epoch']}/{third['packs'][1]}"
        assert blamed[2] == third["sequences"][1]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_or_silent_ends_the_others(world: World, broken: signal.Signals, tmp_path: Path) -> None:
    """And the run goes on from its checkpoint, here with one process."""
    job = together(world, tmp_path / "run", 2, steps=40, checkpoint_every=2, eval_packs=1)
    launcher = start(job.model_copy(update={"rank_timeout_s": 5.0}), tmp_path)
    until(launcher, "step 3/")
    rank_of(launcher, 1).send_signal(broken)
    err = finish(launcher, 1)
    last = err.splitlines()[-1]
    if broken is signal.SIGKILL:
        assert last == "error: rank 1 of 2 was killed by signal 9; the same command goes on from its last checkpoint"
    else:
        assert re.match(r"error: rank 0 of 2: another rank has ended, or has not answered for 5 s", last)
    assert "Traceback" not in err
    go(world.job(tmp_path / "run", steps=40, checkpoint_every=2, eval_packs=1))
    steps = [record["step"] for record in log_of(tmp_path / "run") if record["kind"] == "step"]
    assert steps == list(range(1, 41))


@pytest.mark.slow
def test_ranks_that_wait_for_teachers_are_stopped_together(world: World, tmp_path: Path) -> None:
    """No unit after the first ever comes; one rank alone is asked to stop."""
    whole = Snapshot.read(world.snapshot)
    held = {whole.units[0].id: whole.refs[whole.units[0].id]}
    Snapshot(whole.uri, whole.identity, whole.units, held).write(tmp_path / "open.parquet")
    job = together(world, tmp_path / "run", 2).model_copy(update={"snapshot": tmp_path / "open.parquet"})
    launcher = start(job, tmp_path)
    until(launcher, "waiting for unit")
    rank_of(launcher, 1).send_signal(signal.SIGTERM)
    finish(launcher, 130)
