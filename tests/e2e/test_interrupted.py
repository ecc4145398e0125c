"""Stopped anywhere, by anything: the same command finishes the job, and nothing shows that it was stopped."""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from stillroom.storage.errors import StillroomError
from stillroom.storage.records import ShardRef
from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, assert_equal_rows, children, kill_group, sentences, wait_for

pytestmark = pytest.mark.real

#: Enough small units that teaching takes seconds, and a kill comes in the middle of it.
DOCUMENTS = sentences(11, 900)
OVER: dict[str, Any] = {"store__unit_tokens": 128, "corpus__heldout": 0.02, "students__0__steps": 60}


@pytest.fixture(scope="module", name="undisturbed")
def _undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    setup = Setup.make(tmp_path_factory.mktemp("undisturbed"), DOCUMENTS, **OVER)
    printed = setup.run()
    assert "stillroom verify" in printed
    return setup


def committed(setup: Setup) -> Mapping[str, ShardRef]:
    try:
        return open_store(str(setup.folder / "store")).committed()
    except StillroomError:
        return {}


def total_units(setup: Setup) -> int:
    return len(open_store(str(setup.folder / "store")).planned())


def in_mid_teaching(setup: Setup) -> Callable[[], bool]:
    """A first commit is there: cheap to ask, as it is asked a hundred times a second."""
    return lambda: (setup.folder / "store" / "_delta_log" / "00000000000000000001.json").exists()


def in_mid_training(setup: Setup) -> Callable[[], bool]:
    log = setup.folder / "run" / "students" / "cut" / "log.jsonl"
    return lambda: log.exists() and log.read_text().count('"loss"') >= 10


def finishes_as_if_undisturbed(setup: Setup, undisturbed: Setup, before: Mapping[str, ShardRef]) -> None:
    ledger_before = sum(line["units_scored"] for line in setup.ledger())
    setup.run()
    after = committed(setup)
    assert before.items() <= after.items()
    assert_equal_rows(setup.folder / "store", undisturbed.folder / "store")
    assert setup.losses() == undisturbed.losses()
    # Every unit was scored for the log once: committed units are not scored again. A SIGKILL between a commit and
    # its ledger line may lose that line; it can never add one.
    scored = sum(line["units_scored"] for line in setup.ledger())
    assert scored <= len(after) == total_units(setup)
    assert scored - ledger_before == len(after) - len(before)


def stop_at(
    moment: Callable[[], bool], what: str, setup: Setup, stop: Callable[["subprocess.Popen[str]"], None]
) -> None:
    """Run the recipe and stop it at that moment; nothing of it is left running, whatever fails."""
    process = setup.start()
    try:
        wait_for(moment, process, what)
        stop(process)
    finally:
        if process.poll() is None:
            kill_group(process)


def interrupt(process: "subprocess.Popen[str]") -> None:
    """Ctrl-C: the terminal signals the whole group."""
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "continues where it stopped" in printed
    assert "Traceback" not in printed


def terminate(process: "subprocess.Popen[str]") -> None:
    """A scheduler's SIGTERM to the command alone is a Ctrl-C."""
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "continues where it stopped" in printed


def interrupt_impatiently(process: "subprocess.Popen[str]") -> None:
    """Ctrl-C again and again: what is scored is committed, and nothing of Ray stays behind."""
    below = psutil.Process(process.pid).children(recursive=True)
    for _ in range(6):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive


def kill_driver(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate(timeout=60)


def kill_actor(process: "subprocess.Popen[str]") -> None:
    victims = children(process, "ray::TeacherActor")
    assert victims
    victims[0].kill()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "an actor died" in printed


@pytest.mark.parametrize(
    "stop",
    [
        interrupt,
        *(
            pytest.param(stop, marks=pytest.mark.slow)
            for stop in (terminate, interrupt_impatiently, kill_driver, kill_actor)
        ),
    ],
)
def test_stopped_while_teaching(
    tmp_path: Path, undisturbed: Setup, stop: Callable[["subprocess.Popen[str]"], None]
) -> None:
    setup = Setup.make(tmp_path, DOCUMENTS, **OVER)
    stop_at(in_mid_teaching(setup), "the first commit", setup, stop)
    before = committed(setup)
    if stop is not kill_actor:
        assert 0 < len(before) < total_units(setup), "the stop came after the teaching: make it longer"
    finishes_as_if_undisturbed(setup, undisturbed, before)


def kill_student(process: "subprocess.Popen[str]") -> None:
    """The trainer's process alone: its parent says so and leaves."""
    children(process, "stillroom.pipeline.student")[0].kill()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1, printed
    assert "killed by signal 9" in printed


def kill_everything(process: "subprocess.Popen[str]") -> None:
    kill_group(process)


@pytest.mark.parametrize(
    "stop",
    [
        kill_student,
        *(pytest.param(stop, marks=pytest.mark.slow) for stop in (interrupt, terminate, kill_driver, kill_everything)),
    ],
)
def test_stopped_while_training(
    tmp_path: Path, undisturbed: Setup, stop: Callable[["subprocess.Popen[str]"], None]
) -> None:
    setup = Setup.make(tmp_path, DOCUMENTS, **OVER)
    stop_at(in_mid_training(setup), "the tenth step", setup, stop)
    assert 0 < len(setup.losses()) < len(undisturbed.losses()), "the stop came after the training: make it longer"
    finishes_as_if_undisturbed(setup, undisturbed, committed(setup))


def test_a_finished_run_says_so(undisturbed: Setup) -> None:
    ledger = undisturbed.ledger()
    printed = undisturbed.run()
    assert "no teacher is needed" in printed
    assert "is trained already" in printed
    assert undisturbed.ledger() == ledger
