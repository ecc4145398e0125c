"""A real Ray cluster on this machine for tests: a head and nodes as processes of their own, on which stillroom is not
installed, with token authentication; and jobs submitted to it as users do.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import venv
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from stillroom.pipeline.progress_file import PROGRESS
from stillroom.pipeline.ship import write_package
from tests.e2e.runs import Setup

#: The head has no CPUs, so that no actor runs there.
_NODE = [
    "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
    "--node-ip-address=127.0.0.1", "--object-store-memory=80000000", "--block",
]  # fmt: skip


def bare_python(folder: Path) -> Path:
    """An interpreter with everything that is installed here but stillroom: of an editable install it sees the packages
    beside it, and not the finder that a .pth file of theirs would install."""
    venv.create(folder, symlinks=True)
    here = sysconfig.get_path("purelib")
    (next((folder / "lib").iterdir()) / "site-packages" / "others.pth").write_text(f"{here}\n")
    python = folder / "bin" / "python"
    done = subprocess.run(
        [str(python), "-c", "import ray, stillroom.pipeline"], capture_output=True, text=True, cwd="/"
    )
    assert "No module named 'stillroom" in done.stderr, f"{python} has stillroom: {done.stderr}"
    return python


class Cluster:
    """Started by the first `add`. folder: for logs and the bare interpreter. Ends with `stop`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._python = bare_python(folder / "bare")
        # Sockets lie in it, whose paths may have 107 bytes: a test's own folder is too long.
        self._scratch = Path(tempfile.mkdtemp(prefix="sr-"))
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._port, self._dashboard, client = free_ports(3)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PATH": f"{self._python.parent}:{os.environ['PATH']}",
            "STILLROOM_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        self._start(
            "--head", f"--port={self._port}", f"--ray-client-server-port={client}", "--num-cpus=0",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard}", f"--temp-dir={self._scratch}",
        )  # fmt: skip
        self._wait_until_it_answers()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def add(self, *words: str, cpus: int = 1) -> "subprocess.Popen[bytes]":
        """A node more; it joins while this returns."""
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}", *words)

    def kill(self, node: "subprocess.Popen[bytes]") -> None:
        """As a machine that loses its power: everything that runs on it."""
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        self._nodes.remove(node)

    def submit(self, setup: Setup, command: str = "teach", *overrides: str) -> "subprocess.Popen[str]":
        """`ray job submit` of a folder that holds the recipe, the text and stillroom; prints what the job prints."""
        folder = setup.folder / "job"
        folder.mkdir(exist_ok=True)
        for name in ("recipe.yaml", "corpus.jsonl"):
            shutil.copy(setup.folder / name, folder)
        write_package(folder)
        job = ["python", "-m", "stillroom.pipeline", command, "recipe.yaml", "corpus.sources=corpus.jsonl", *overrides]
        words = [
            "job",
            "submit",
            f"--address=http://127.0.0.1:{self._dashboard}",
            f"--working-dir={folder}",
            "--",
            *job,
        ]
        return subprocess.Popen(
            self._ray(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
        )

    def processes(self, word: str, node: "subprocess.Popen[bytes] | None" = None) -> list[psutil.Process]:
        """Of a node, or of all, those whose title or command holds `word`."""
        found = []
        for one in [node] if node is not None else self._nodes:
            for process in psutil.Process(one.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if word in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def stop(self) -> None:
        for node in reversed(list(self._nodes)):
            self.kill(node)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _ray(self, *words: str) -> list[str]:
        return [str(self._python), "-m", "ray.scripts.scripts", *words]

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        with (self._folder / f"node{len(self._nodes)}.log").open("ab") as log:
            node = subprocess.Popen(
                self._ray("start", *words, *_NODE), stdout=log, stderr=log, env=self.environment, cwd=self._folder
            )
        self._nodes.append(node)
        return node

    def _wait_until_it_answers(self) -> None:
        """The dashboard is what jobs are submitted to; it is the last to be there."""
        words = self._ray("job", "list", f"--address=http://127.0.0.1:{self._dashboard}")
        for _ in range(30):
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode == 0:
                return
        raise AssertionError(f"no answer from the head: {done.stderr}\n{(self._folder / 'node0.log').read_text()}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def progress(setup: Setup) -> dict[str, Any]:
    """What the store's progress file says; {} where there is none yet."""
    path = setup.folder / "store" / PROGRESS
    return dict(json.loads(path.read_text())) if path.exists() else {}


def driver(*words: str) -> list[str]:
    """`stillroom` of this interpreter, which has it."""
    return [sys.executable, "-m", "stillroom.pipeline", *words]
