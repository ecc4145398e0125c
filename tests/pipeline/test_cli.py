"""The command line: exit codes, one-line errors, one JSON object on stdout, and a help that answers at once."""

import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stillroom.pipeline.arguments import RECIPE_COMMANDS, UsageMistake, parse
from stillroom.pipeline.cli import main
from stillroom.storage.store import Store
from tests.strategies import next_token_teacher, random_sequences, tiny_store

HEAVY = ("torch", "ray", "transformers", "pyarrow", "deltalake", "pydantic", "rich", "numpy", "yaml")
RECIPE = "name: first\nteacher: {model: org/teacher}\ncorpus: {sources: text.txt}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the still drips\n")
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


class TestGrammar:
    @pytest.mark.parametrize(
        "words",
        [
            ["run", "r.yaml", "a=1", "--json", "b=2"],
            ["run", "--json", "r.yaml", "a=1", "b=2"],
            ["run", "r.yaml", "--json", "a=1", "b=2"],
        ],
    )
    def test_options_stand_anywhere_between_overrides(self, words: list[str]) -> None:
        arguments = parse(words)
        assert (arguments.recipe, arguments.overrides, arguments.json) == ("r.yaml", ["a=1", "b=2"], True)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "no command; expected one of init, run, plan, generate, teach, train, evaluate, status, report, ls"),
            (["runn"], "unknown command runn (did you mean run?)"),
            (["zzz"], "unknown command zzz; expected one of init"),
            (["run"], "the following arguments are required: RECIPE"),
            (["run", "r.yaml", "--jsn"], "unrecognized argument --jsn"),
            (["run", "r.yaml", "--js"], "unrecognized argument --js"),
            (["--bogus", "run", "r.yaml"], "unrecognized argument --bogus"),
            (["ls", "a", "b"], "unrecognized argument b"),
            (["inspect", "s", "--tokens"], "--tokens needs --unit"),
            (["init", "model"], "init needs MODEL and CORPUS"),
        ],
    )
    def test_mistakes(self, words: list[str], message: str) -> None:
        with pytest.raises(UsageMistake) as caught:
            parse(words)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)

    def test_help_lists_the_commands_and_only_those(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            parse(["--help"])
        assert left.value.code == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ") and line[4] != " "]
        assert [word for word in (line.split()[0] for line in lines) if word.isalpha()] == [
            "init", "run", "plan", "generate", "teach", "train", "evaluate", "status", "report", "ls", "inspect",
            "verify", "gc", "transcode",
        ]  # fmt: skip

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            parse(["--version"])
        assert left.value.code == 0
        assert capsys.readouterr().out.startswith("stillroom 0.")


class TestErrors:
    def test_a_recipe_error_is_one_line_and_exit_code_2(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for command in RECIPE_COMMANDS:
            assert main([command, "recipe.yaml", "signal.topk.kk=3"]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err == "stillroom: error: command line: unknown key signal.topk.kk (did you mean k?)\n"

    def test_usage_is_exit_code_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["runn"]) == 2
        assert capsys.readouterr().err == "stillroom: error: unknown command runn (did you mean run?)\n"

    def test_a_missing_corpus_stops_what_reads_it(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Path("text.txt").unlink()
        for command in ("run", "plan", "teach"):
            assert main([command, "recipe.yaml"]) == 2
            assert "recipe.yaml:3: corpus.sources.0.path: no such file" in capsys.readouterr().err

    def test_a_store_that_is_none_is_exit_code_2(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for command in ("inspect", "verify", "gc", "ls"):
            assert main([command, "nowhere"]) == 2
            err = capsys.readouterr().err
            assert err.startswith("stillroom: error: ")
            assert err.count("\n") == 1

    def test_with_json_the_error_is_an_object_too(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["run", "none.yaml", "--json"]) == 2
        out, err = capsys.readouterr()
        assert json.loads(out)["kind"] == "RecipeError"
        assert err.strip().endswith(json.loads(out)["error"])

    def test_debug_shows_where(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["run", "none.yaml", "--debug"]) == 2
        assert "Traceback" in capsys.readouterr().err

    def test_debug_by_the_environment(
        self, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STILLROOM_DEBUG", "1")
        assert main(["run", "none.yaml"]) == 2
        assert "Traceback" in capsys.readouterr().err


class TestCommands:
    def test_init_then_the_recipe_is_read(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["init", "org/teacher", "text.txt", "-o", "new.yaml"]) == 0
        assert capsys.readouterr().out == ""
        assert main(["init", "org/teacher", "text.txt", "-o", "new.yaml"]) == 2
        assert "--force" in capsys.readouterr().err
        assert main(["init", "org/teacher", "text.txt", "-o", "new.yaml", "--force", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"recipe": "new.yaml"}

    def test_reference(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["init", "--reference"]) == 0
        assert "signal.topk.k  (whole number, at least 1; default 64)" in capsys.readouterr().out
        assert main(["init", "--reference", "--json"]) == 0
        assert {row["key"] for row in json.loads(capsys.readouterr().out)["fields"]} > {"signal.topk.k", "ray.actors"}

    def test_ls_of_an_empty_folder(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["ls", ".", "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == {"stores": []}
        assert err == "no store under .\n"

    def test_every_stage_has_its_function(self) -> None:
        for module, name in (("run", "run_recipe"), ("plan", "plan_command"), ("precompute", "teach_command"),
                             ("train", "train_command"), ("evaluate", "evaluate_command")):  # fmt: skip
            assert callable(getattr(importlib.import_module(f"stillroom.pipeline.{module}"), name))


class TestStores:
    """`ls`, `inspect` and `verify` on a store of three shards."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        sequences = random_sequences(np.random.default_rng(3), 30, shortest=10, longest=24)
        return tiny_store(tmp_path / "store", sequences, per_unit=10, teacher=next_token_teacher)

    def test_ls(self, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["ls", str(Path(store.uri).parent), "--json"]) == 0
        assert [found["shards"] for found in json.loads(capsys.readouterr().out)["stores"]] == [3]
        assert main(["ls", str(Path(store.uri).parent)]) == 0
        assert store.identity.teacher.split()[0] in capsys.readouterr().out

    def test_inspect(self, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", store.uri, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["identity"] == store.identity.id
        assert main(["inspect", store.uri]) == 0
        assert ["shards", "3"] in [line.split() for line in capsys.readouterr().out.splitlines()]

    def test_inspect_a_unit_with_and_without_its_tokens(self, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        unit = next(iter(store.committed()))
        assert main(["inspect", store.uri, "--unit", unit, "--json"]) == 0
        sequences = json.loads(capsys.readouterr().out)["sequences"]
        assert len(sequences) == 10
        assert all("positions" not in sequence for sequence in sequences)
        assert main(["inspect", store.uri, "--unit", unit, "--tokens", "--json"]) == 0
        assert all(sequence["positions"] for sequence in json.loads(capsys.readouterr().out)["sequences"])
        assert main(["inspect", store.uri, "--unit", unit, "--tokens"]) == 0
        assert "sequences 9: positions" in capsys.readouterr().out

    def test_verify_says_by_its_exit_code_whether_all_is_well(
        self, store: Store, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["verify", store.uri, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["problems"] == []
        path = Path(store.uri, next(iter(store.committed().values())).path)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert main(["verify", store.uri, "--json"]) == 1
        assert [problem["shard"] for problem in json.loads(capsys.readouterr().out)["problems"]] == [
            str(path.relative_to(store.uri))
        ]


@pytest.mark.real
class TestProcess:
    """As a user meets it: `python -m stillroom.pipeline` in a process of its own."""

    COMMAND = (sys.executable, "-m", "stillroom.pipeline")

    def test_help_answers_in_half_a_second(self) -> None:
        script = Path(sys.executable).with_name("stillroom")
        spent = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([script, "--help"], check=True, capture_output=True)
            spent.append(time.perf_counter() - start)
        assert statistics.median(spent) < 0.5

    def test_help_imports_nothing_of_weight(self) -> None:
        code = (
            "import sys\nfrom stillroom.pipeline.cli import main\n"
            "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
            f"print([name for name in {HEAVY} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_interrupted_is_exit_code_130(self, here: Path) -> None:
        os.mkfifo("pipe.yaml")
        process = subprocess.Popen([*self.COMMAND, "run", "pipe.yaml"], stderr=subprocess.PIPE, text=True)
        with Path("pipe.yaml").open("w"):  # opens when the process has opened it to read, and waits there
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err == "stillroom: interrupted; the same command continues where it stopped\n"

    def test_nobody_reads_the_output(self) -> None:
        process = subprocess.Popen(
            [*self.COMMAND, "init", "--reference"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        process.wait(timeout=60)
        assert "Traceback" not in err
        assert "Exception ignored" not in err
