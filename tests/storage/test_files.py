"""files.py: whole or not at all, inside the store or not at all, and every failure named."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillroom.storage.errors import StoreError, StoreFull
from stillroom.storage.files import LocalFiles, check_name, open_files, sha256_hex
from tests.processes import on_small_disk

NOBODY = 65534


def test_written_bytes_come_back(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "new" / "store")
    files.write("a/b/c.bin", b"one")
    files.write("a/b/c.bin", memoryview(b"two"))
    assert files.read("a/b/c.bin") == b"two"
    assert files.open("a/b/c.bin").read() == b"two"
    assert files.exists("a/b/c.bin")
    assert not files.exists("a/b/d.bin")
    assert files.list("a/b") == ["a/b/c.bin"]
    assert files.list("a") == ["a/b"]
    assert files.list("nothing/here") == []
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "c.bin", "new", "store"], (
        "no temporary file is left"
    )


def test_missing_names_are_told(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    for read in (files.read, files.open):
        with pytest.raises(StoreError, match=r"cannot read .*gone\.bin: No such file or directory"):
            read("gone.bin")


@pytest.mark.parametrize("name", ["", ".", "/etc/passwd", "../x", "a/../../x", "a/..", "a\\b", "a\0b"])
def test_names_that_lead_out_of_the_store_are_refused(tmp_path: Path, name: str) -> None:
    files = LocalFiles(tmp_path / "store")
    for act in (files.read, files.open, files.exists, check_name, lambda n: files.write(n, b"x")):
        with pytest.raises(StoreError, match="leads out of the store"):
            act(name)
    assert list(tmp_path.iterdir()) == []


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_files(f"file://{tmp_path}").uri == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert open_files("here").uri == str(tmp_path / "here"), "a store's root does not move with the process"
    with pytest.raises(StoreError, match="scheme 'gopher' is not supported"):
        open_files("gopher://x/y")


def test_sha256_is_the_common_one() -> None:
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


WRITER = """
import os, sys
from pathlib import Path
from stillroom.storage.files import LocalFiles


real = os.fsync
def killed(descriptor):
    real(descriptor)
    os.kill(os.getpid(), 9)
os.fsync = killed
LocalFiles(Path(sys.argv[1])).write("shards/a.bin", b"x" * 100_000)
"""


@pytest.mark.real
def test_what_a_killed_writer_leaves_is_not_seen(tmp_path: Path) -> None:
    """kill -9 between the bytes and the rename: a temporary file stands there, and nobody lists or reads it."""
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = list((tmp_path / "shards").iterdir())
    assert len(left) == 1
    assert left[0].stat().st_size == 100_000
    files = LocalFiles(tmp_path)
    assert files.list("shards") == []
    assert not files.exists("shards/a.bin")
    files.write("shards/a.bin", b"again")
    assert files.list("shards") == ["shards/a.bin"]


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the kernel's own refusal in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    files.write("shards/a.bin", b"old")
    with _largest_file(4096), pytest.raises(StoreError, match=r"cannot write .*a\.bin: File too large"):
        files.write("shards/a.bin", b"x" * 100_000)
    assert files.read("shards/a.bin") == b"old"
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["a.bin"]


FULL = """
import sys
from pathlib import Path
from stillroom.storage.errors import StoreFull
from stillroom.storage.files import LocalFiles

root = Path(sys.argv[1])
files = LocalFiles(root)
files.write("shards/a.bin", b"x" * 50_000)
try:
    files.write("shards/b.bin", b"x" * 500_000)
except StoreFull as error:
    names = sorted(p.name for p in (root / "shards").iterdir())
    print(error, names, files.read("shards/a.bin") == b"x" * 50_000)
"""


@pytest.mark.real
def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    printed = on_small_disk(FULL, tmp_path, "256k")
    assert f"no room for 500,000 bytes at {tmp_path}/shards: free some space" in printed
    assert printed.rstrip().endswith("['a.bin'] True")


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Permissions bind everyone but root; as root, step down for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "store")
    files.write("shards/a.bin", b"x")
    (tmp_path / "store").chmod(0o000)
    try:
        with _as_nobody():
            for act, word in (
                (lambda: files.write("b.bin", b"x"), "write"),
                (lambda: files.read("shards/a.bin"), "read"),
                (lambda: files.open("shards/a.bin"), "read"),
                (lambda: files.exists("shards/a.bin"), "read"),
                (lambda: files.list("shards"), "list"),
            ):
                with pytest.raises(StoreError, match=rf"cannot {word} .*store.*: .*Permission denied"):
                    act()
    finally:
        (tmp_path / "store").chmod(0o700)
    assert files.read("shards/a.bin") == b"x"


def test_a_file_in_a_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError, match=r"cannot write .*store/shards/a\.bin") as caught:
        LocalFiles(tmp_path / "store").write("shards/a.bin", b"x")
    assert not isinstance(caught.value, StoreFull)


def test_free_bytes_are_those_of_the_disk_below(tmp_path: Path) -> None:
    free = LocalFiles(tmp_path / "not" / "yet" / "there").free_bytes()
    assert free is not None
    assert free == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.05)
