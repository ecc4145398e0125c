"""A disk that takes nothing: `generate` says so in one line, before its engine starts."""

from pathlib import Path

import pytest

from tests.e2e.runs import Setup, sentences
from tests.pipeline.corpora import write_jsonl
from tests.processes import on_small_disk
from tests.workers.engines import NEEDED

#: Permissions do not bind root; a file system that is mounted to be read does. Argument: the folder on that one.
GENERATE = """
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from stillroom.pipeline.cli import main

folder = Path(sys.argv[1])
with redirect_stderr(StringIO()) as said:
    code = main(["generate", str(folder.parent / "run" / "recipe.yaml"), f"generate.path={folder / 'store'}"])
assert code == 1, code
assert "engine" not in said.getvalue() and "vLLM" not in said.getvalue(), said.getvalue()
print(said.getvalue().strip().splitlines()[-1])
"""


@pytest.mark.real
@NEEDED
def test_generations_have_nowhere_to_go(tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "mint"}])
    Setup.make(tmp_path / "run", sentences(1, 2), generate={"prompts": [str(prompts)], "decoding": {"max_tokens": 8}})
    (tmp_path / "disk").mkdir()
    line = on_small_disk(GENERATE, tmp_path / "disk", "1m,ro")
    assert line.startswith("stillroom: error: cannot write")
    assert "Read-only file system" in line
    assert str(tmp_path / "disk" / "store") in line
