"""A recipe whose store is an object store, through the whole command line against a real server."""

import json
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from stillroom.pipeline.cli import main
from stillroom.storage.care.verify import verify_store
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.store import open_store
from tests.e2e.runs import PATIENCE_S, Setup, assert_equal_rows, kill_group, rows, sentences, wait_for
from tests.s3_server import BUCKET, S3Server
from tests.s3_server import s3_server as s3_server

pytestmark = [pytest.mark.real, pytest.mark.slow]

DOCUMENTS = sentences(81, 30)
STORE = f"s3://{BUCKET}/recipes/store"
OVER: dict[str, Any] = {
    # A random teacher whose head is its embedding repeats what it reads, and `verify` takes its rows for shifted ones.
    "teacher": {"tie_word_embeddings": False},
    "signal": {"topk": {"k": 8}, "sampled": None, "hidden": {"dtype": "int8"}},
    "students__0__steps": 4,
    "students__0__warmup_steps": 1,
}


@pytest.fixture(scope="module", name="environment")
def _environment(s3_server: S3Server) -> Any:
    """Of this process, as a user sets it: actors and students inherit it, nothing hands it on."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module", name="distilled")
def _distilled(tmp_path_factory: pytest.TempPathFactory, environment: None) -> Setup:
    setup = Setup.make(tmp_path_factory.mktemp("bucket"), DOCUMENTS, store__path=STORE, **OVER)
    setup.run()
    return setup


@pytest.fixture(name="said")
def _said(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> dict[str, Any]:
        capfd.readouterr()
        code = main([*words, "--json"])
        out, err = capfd.readouterr()
        assert code == 0, out + err
        found: dict[str, Any] = json.loads(out)
        return found

    return run


def test_the_run_is_that_of_a_folder(distilled: Setup, tmp_path: Path) -> None:
    """Rows, losses and identity; no part of the store lies in the run's folder."""
    teacher = str(distilled.folder / "teacher")
    local = Setup.make(tmp_path, DOCUMENTS, teacher__model=teacher, **(OVER | {"teacher": None}))
    local.run()
    assert_equal_rows(STORE, tmp_path / "store")
    assert open_store(STORE).identity == open_store(str(tmp_path / "store")).identity
    assert distilled.losses() == local.losses()
    assert not list((distilled.folder / "run").rglob("shards"))
    summary = json.loads((distilled.folder / "run" / "summary.json").read_text())
    assert summary["store"] == STORE
    snapshot = Snapshot.read(distilled.folder / "run" / "students" / "cut" / "snapshot.parquet")
    assert snapshot.uri == STORE


def test_the_same_command_does_nothing(distilled: Setup) -> None:
    refs, ledger = open_store(STORE).committed(), distilled.ledger()
    printed = distilled.run()
    assert "no teacher is needed" in printed
    assert "is trained already" in printed
    assert open_store(STORE).committed() == refs
    assert distilled.ledger() == ledger


def test_the_commands_that_look_after_a_store(distilled: Setup, said: Any, tmp_path: Path) -> None:
    inspected = said("inspect", STORE)
    assert inspected["tiers"] == ["topk", "hidden"]
    assert {row["tier"] for row in inspected["fidelity"]} == {"topk", "hidden"}
    listed = said("ls", f"s3://{BUCKET}/recipes")["stores"]
    assert [found["store"] for found in listed] == [STORE]
    assert listed[0]["tokens"] == inspected["tokens"] > 0
    assert said("verify", STORE)["problems"] == []
    assert said("gc", STORE, "--dry-run")["removed"] == []
    copy = tmp_path / "copy"
    moved = said("transcode", STORE, str(copy))
    assert moved["tokens"] == inspected["tokens"]
    assert_equal_rows(STORE, copy)
    assert said("verify", str(copy))["problems"] == []


def test_it_grows(distilled: Setup) -> None:
    """The calibration lies in the bucket, and new rows are scaled by it."""
    before, identity = rows(open_store(STORE)), open_store(STORE).identity
    documents = [*DOCUMENTS, *sentences(82, 8)]
    (distilled.folder / "corpus.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    distilled.run("teach")
    after = open_store(STORE)
    assert after.identity == identity
    assert before.keys() < rows(after).keys()


def test_a_server_killed_twice_while_teaching(s3_server: S3Server, environment: None, tmp_path: Path) -> None:
    """SIGKILL after a first commit and after a later one, with units left each time: the run finishes by itself, and
    its rows are those of a folder."""
    store, log = f"s3://{BUCKET}/killed/store", f"{BUCKET}/killed/store/_delta_log"
    documents, client = sentences(84, 600), s3_server.client()
    setup = Setup.make(tmp_path / "bucket", documents, store__path=store, store__unit_tokens=128)

    def entries() -> int:
        """Of the log: the first founds the store, each of the others is a commit. Asked past the code under test."""
        return len(client.get_file_info(pafs.FileSelector(log, allow_not_found=True)))

    seen, left = 1, []
    process = setup.start("teach")
    try:
        for kill in ("first", "second"):
            wait_for(lambda: entries() > seen, process, f"a commit before the {kill} kill")  # noqa: B023
            held = open_store(store)
            left.append(len(held.planned()) - len(held.committed()))
            s3_server.restart()
            seen = entries()
        printed, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            kill_group(process)
    assert process.returncode == 0, printed
    assert min(left) > 0, "teaching was over before a kill"
    assert entries() > seen, "nothing was committed after the second kill"
    local = Setup.make(
        tmp_path / "local", documents, teacher__model=str(setup.folder / "teacher"), store__unit_tokens=128
    )
    local.run("teach")
    assert_equal_rows(store, tmp_path / "local" / "store")
    refs = open_store(store).committed()
    assert len(refs) == len(open_store(store).planned())
    # With tied embeddings a random teacher repeats what it reads, which `verify` takes for shifted rows.
    assert [p for p in verify_store(store)["problems"] if "rows look shifted" not in p["problem"]] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "another"}, "AWS"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
)
def test_a_wrong_environment_is_one_line(
    tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], said: str
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    setup = Setup.make(tmp_path, DOCUMENTS[:4], store__path=f"s3://{BUCKET}/never")
    printed = setup.run(code=1)
    lines = [line for line in printed.splitlines() if "error" in line]
    assert len(lines) == 1, printed
    assert lines[0].startswith("stillroom: error: ")
    assert said in lines[0]
    assert "Traceback" not in printed
