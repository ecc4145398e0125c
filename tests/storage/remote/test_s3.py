"""Buckets: settings, what passes and what does not, and who wins. A real server, and a proxy that misbehaves."""

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from stillroom.storage.errors import CorruptShard, StoreError
from stillroom.storage.files import LocalFiles, find_stores, open_files, sha256_hex
from stillroom.storage.log import CommitLog
from stillroom.storage.records import Receipt
from stillroom.storage.remote.cache import cached_files
from stillroom.storage.remote.s3 import S3Settings, connect
from stillroom.storage.store import open_store
from tests.processes import COMMITTER, at_once
from tests.s3_proxy import Mischief, proxy
from tests.s3_server import ACCESS_KEY, BUCKET, READER_KEY, READER_SECRET, SECRET_KEY, S3Server
from tests.strategies import named_receipt as receipt

SCHEMA = pa.schema([pa.field("sequence", pa.string(), nullable=False)])
VARIABLES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ALLOW_HTTP", "AWS_PROFILE", "STILLROOM_S3_RETRY_S",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def change(environment: dict[str, str], **more: str) -> None:
        for name, value in (environment | more).items():
            monkeypatch.setenv(name, value)

    return change


@pytest.fixture
def root(s3_server: S3Server, use: Callable[..., None], tmp_path: Path) -> str:
    use(s3_server.environment)
    return f"s3://{BUCKET}/{tmp_path.name}"


def units(receipts: list[Receipt]) -> list[int]:
    return sorted(int(r.shard.unit, 16) for r in receipts)


# What is refused, at once and in one line


def one_line(error: BaseException, *secrets: str) -> str:
    text = str(error)
    assert "\n" not in text
    assert "\x1b" not in text
    assert "<" not in text, "no server's XML"
    assert len(text) < 700
    assert not [secret for secret in (SECRET_KEY, READER_SECRET, *secrets) if secret in text]
    return text


@pytest.mark.real
@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told_at_once(root: str, use: Callable[..., None], wrong: str) -> None:
    CommitLog.create(root, SCHEMA)
    use({wrong: "not-the-right-one"})
    started = time.monotonic()
    acts: list[Callable[[], object]] = [
        lambda: open_store(root), lambda: CommitLog.open(root), lambda: CommitLog.create(f"{root}/new", SCHEMA),
        lambda: open_files(root).write("a", b"1"), lambda: open_files(root).list(""),
        lambda: open_files(root).read("a"), lambda: find_stores(root),
    ]  # fmt: skip
    for act in acts:
        with pytest.raises(StoreError, match=r"cannot .*s3://cellar.*; check AWS_ACCESS_KEY_ID") as caught:
            act()
        one_line(caught.value, "not-the-right-one")
    assert time.monotonic() - started < 60, "each is tried again for 120 s where a failure may pass"


@pytest.mark.real
def test_a_reader_may_read_and_is_told_that_it_may_not_write(root: str, use: Callable[..., None]) -> None:
    CommitLog.create(root, SCHEMA).commit([receipt(1)])
    open_files(root).write("a", b"1")
    use({"AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET})
    assert open_files(root).read("a") == b"1"
    log = CommitLog.open(root)
    assert len(log.refs()) == 1
    assert log.commit([]) == []
    for act in (lambda: log.commit([receipt(2)]), lambda: open_files(root).write("b", b"1")):
        with pytest.raises(StoreError, match=r"cannot (commit to|write) s3://.*; check AWS_ACCESS_KEY_ID") as caught:
            act()
        one_line(caught.value)


@pytest.mark.real
def test_a_missing_bucket_is_told_at_once(root: str) -> None:
    for act in (
        lambda: open_store("s3://nobody/x"), lambda: open_files("s3://nobody/x").write("a", b"1"),
        lambda: open_files("s3://nobody/x").read("a"), lambda: open_files("s3://nobody/x").list("a"),
        lambda: CommitLog.create("s3://nobody/x", SCHEMA), lambda: CommitLog.open("s3://nobody/x"),
        lambda: find_stores("s3://nobody"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=r"nobody.*; create (it|the bucket nobody) or correct") as caught:
            act()
        one_line(caught.value)


@pytest.mark.real
def test_where_there_is_no_log(root: str) -> None:
    with pytest.raises(StoreError, match=r"s3://.*has no commit log"):
        CommitLog.open(f"{root}/nothing")


def test_an_unreachable_endpoint_is_told_in_time(use: Callable[..., None]) -> None:
    use({"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_ALLOW_HTTP": "true",
         "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "STILLROOM_S3_RETRY_S": "0.3"})  # fmt: skip
    started = time.monotonic()
    for act in (lambda: open_store("s3://cellar/x"), lambda: CommitLog.open("s3://cellar/x")):
        with pytest.raises(StoreError, match=r"gave up after \d+ attempts over \d s: check AWS_ENDPOINT_URL") as caught:
            act()
        one_line(caught.value)
    assert time.monotonic() - started < 60, "STILLROOM_S3_RETRY_S is 0.3, not the usual 120"


# What passes


START = """
import sys
import pyarrow as pa
from stillroom.storage.files import open_files
from stillroom.storage.log import CommitLog
from tests.strategies import named_receipt as receipt
def units(receipts):
    return sorted(int(r.shard.unit, 16) for r in receipts)
root = sys.argv[1]
"""


def client(code: str, *arguments: str) -> list[str]:
    """What a process of its own prints, line by line, with the settings as they are now."""
    done = subprocess.run(
        [sys.executable, "-c", START + code, *arguments],
        check=False, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


ALL_ACTS = """
files = open_files(root)
print(files.write("a/b", b"12345"), files.read("a/b"), files.open("a/b").read(), files.exists("a/b"), files.list("a"))
print([f.name for f in files.walk()], files.delete("a/b"), list(files.holders("x")))
log = CommitLog.create(root, pa.schema([("a", pa.string())]))
print(len(log.refs()), units(log.commit([receipt(1), receipt(2)])), len(CommitLog.open(root).refs()))
"""


@pytest.mark.real
def test_a_server_that_asks_to_slow_down_is_asked_again(
    s3_server: S3Server, root: str, use: Callable[..., None]
) -> None:
    """Every request that is new to the proxy is refused once."""
    known: set[tuple[str, str]] = set()

    def new(method: str, path: str) -> bool:
        return (method, path) not in known and not known.add((method, path))  # type: ignore[func-returns-value]

    mischief = Mischief(refuse=new, times=1000)
    with proxy(s3_server.endpoint, mischief) as endpoint:
        use({"AWS_ENDPOINT_URL": endpoint})
        assert client(ALL_ACTS, root) == [
            "None b'12345' b'12345' True ['a/b']",
            "['a/b'] None []",
            "0 [1, 2] 2",
        ]
    assert len(mischief.seen) >= 10
    assert {line.split()[0] for line in mischief.seen} >= {"GET", "PUT", "HEAD", "DELETE"}


def _log_entry(method: str, path: str) -> bool:
    return method == "PUT" and "/_delta_log/" in path and path.endswith(".json")


@pytest.mark.real
def test_a_commit_whose_answer_is_lost_counts_once(s3_server: S3Server, root: str, use: Callable[..., None]) -> None:
    """The entry stands in the log, the writer hears nothing: it looks, and is told that it committed."""
    CommitLog.create(root, SCHEMA).commit([receipt(1)])
    mischief = Mischief(lose=_log_entry)
    with proxy(s3_server.endpoint, mischief) as endpoint:
        use({"AWS_ENDPOINT_URL": endpoint})
        code = "log = CommitLog.open(root)\nprint(units(log.commit([receipt(n) for n in (1, 2, 3)])), len(log.refs()))"
        assert client(code, root) == ["[2, 3] 3"]
    assert len(mischief.seen) == 1, "no answer was lost: this test is void"
    assert len(DeltaTable(root, storage_options=s3_server_options(s3_server)).file_uris()) == 3


def s3_server_options(server: S3Server) -> dict[str, str]:
    return S3Settings.from_environment(server.environment).storage_options()


@pytest.mark.real
def test_a_commit_that_was_overtaken_is_not_taken_for_ones_own(
    s3_server: S3Server, root: str, use: Callable[..., None]
) -> None:
    """Another commits the same bytes, hence the same path, after we have read the log and before our entry arrives:
    the server must refuse to replace the entry, and only the token tells whose it is."""
    other = CommitLog.create(root, SCHEMA)
    other.commit([receipt(1)])
    overtook: list[Receipt] = []
    mischief = Mischief(delay=_log_entry, meanwhile=lambda: overtook.extend(other.commit([receipt(2)])))
    with proxy(s3_server.endpoint, mischief) as endpoint:
        use({"AWS_ENDPOINT_URL": endpoint})
        code = "print(units(CommitLog.open(root).commit([receipt(n) for n in (1, 2, 3)])))"
        assert client(code, root) == ["[3]"]
    assert units(overtook) == [2]
    assert len(other.refs()) == 3


# Who wins


@pytest.mark.real
def test_threads_that_commit_the_same_units_at_once(root: str) -> None:
    CommitLog.create(root, SCHEMA)

    def run(writer: int) -> list[str]:
        log = CommitLog.open(root)
        mine = [receipt(n, writer=writer) for n in range(4)] + [receipt(100 + writer, writer=writer)]
        return [r.shard.path for at in range(0, 5, 2) for r in log.commit(mine[at : at + 2])]

    with ThreadPoolExecutor(3) as pool:
        told = [path for done in pool.map(run, range(3)) for path in done]
    assert len(told) == 7
    assert sorted(told) == sorted(ref.path for ref in CommitLog.open(root).refs().values())


@pytest.mark.real
def test_processes_that_commit_the_same_unit_at_once(root: str) -> None:
    CommitLog.create(root, SCHEMA)
    told = "".join(at_once(COMMITTER, [(root, writer, 4) for writer in range(2)])).split()
    assert len(told) == 4
    assert sorted(told) == sorted(ref.path for ref in CommitLog.open(root).refs().values())


# The cache before a bucket, and the end of a process


@pytest.mark.real
def test_shards_come_through_the_cache(root: str, tmp_path: Path, use: Callable[..., None]) -> None:
    use({"STILLROOM_CACHE": str(tmp_path)})
    data = b"x" * 100_000
    name = f"shards/{'0' * 32}-{sha256_hex(data)}.parquet"
    files = open_files(root)
    files.write(name, data)
    assert cached_files(files).open(name).read() == data
    files.delete(name)
    assert cached_files(files).open(name).read() == data, "the copy stands for itself"
    other = f"shards/{'1' * 32}-{'ab' * 32}.parquet"
    files.write(other, data)
    with pytest.raises(CorruptShard, match=rf"{root}/{other} has sha256"):
        cached_files(files).open(other)
    assert isinstance(cached_files(LocalFiles(tmp_path)), LocalFiles)


LEAVER = """
import sys, threading
from stillroom.storage.files import open_files
files = open_files(sys.argv[1])
files.write("a", b"x" * 1000)
kept = files.open("a")
started = threading.Event()
def read_on():
    try:
        while files.read("a"):
            started.set()
    except BaseException:
        pass
threading.Thread(target=read_on, daemon=True).start()
started.wait()
print("leaving")
if sys.argv[2] == "error":
    raise SystemExit(3)
"""


@pytest.mark.real
@pytest.mark.parametrize(("how", "status"), [("plain", 0), ("error", 3)])
def test_a_process_ends_cleanly_while_a_thread_reads(root: str, how: str, status: int) -> None:
    """pyarrow's S3 client must be shut down before the process is; an open file and a busy thread do not matter."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVER, root, how], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, "leaving\n", "")


def test_a_connection_is_shared_by_all_who_have_its_settings(use: Callable[..., None]) -> None:
    use({"AWS_ENDPOINT_URL": "https://s3.example", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"})
    first = connect()
    assert connect() is first
    use({"AWS_SECRET_ACCESS_KEY": "c"})
    assert connect() is not first
