"""Python processes of tests: several that begin at the same moment, and one on a disk that is small."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: For `at_once`: commits the first `sys.argv[3]` named receipts to a log, one by one, and says which it made count.
COMMITTER = """
import sys
from stillroom.storage.log import CommitLog
from tests.strategies import named_receipt as receipt
log, writer, count = CommitLog.open(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    for done in log.commit([receipt(number, writer=writer)]):
        print(done.shard.path)
"""


def at_once(code: str, arguments: Iterable[tuple[object, ...]]) -> list[str]:
    """What each process printed after "ready"; all go on from there when the last has said so, and must end with 0."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for words in arguments
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return printed


def on_small_disk(code: str, folder: Path, size: str) -> str:
    """What a process prints that is told `folder`, where it finds a tmpfs of that size; more options of `mount` may
    follow the size: "1m,ro".

    Mounted in a namespace of its own, so that nothing needs cleaning up; the test is skipped where nobody may.
    """
    mount = f'mount -t tmpfs -o size={size} none "{folder}" && exec "$0" "$@"'
    for namespace in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        try:
            probe = subprocess.run([*namespace, "sh", "-c", mount, "true"], check=False, capture_output=True)
        except FileNotFoundError:
            break
        if probe.returncode == 0:
            done = subprocess.run(
                [*namespace, "sh", "-c", mount, sys.executable, "-c", code, str(folder)],
                check=False, capture_output=True, text=True, cwd=ROOT,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout
    pytest.skip("neither root nor user namespaces may mount a tmpfs here")
