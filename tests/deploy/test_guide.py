"""The guide does what it says: each page's blocks are run, in the order in which it has them, on a tiny teacher.

One run of the guide's own recipe is shared by all pages, as the guide has it. Blocks of `sh` and `python` are run, one
that begins with a file's name is written to it, and rows of the table of refusals must be refused in those words.
Blocks of `text` need a cluster or a GPU: their words are parsed and their recipes loaded. What the page about
generations says of `seqkd.yaml` is run on a smaller one in its place, by one start of a real vLLM.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.reading import Command, commands_in
from stillroom.pipeline.arguments import RECIPE_COMMANDS, parse
from stillroom.pipeline.recipe import load_chain
from tests.e2e.runs import kill_group, sentences, write_corpus
from tests.e2e.test_seqkd import RECIPE, SMALLER
from tests.tiny import tiny_teacher
from tests.workers.engines import NEEDED

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "deploy" / "guide"
FIRST = "README.md"
#: What one page may take where the machine is loaded (load 6: 400 s for the first two runs of stages.md).
PATIENCE_S = 800

_BLOCK = re.compile(r"^(```|~~~)(\w+)\n(.*?)^\1\n", flags=re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (\S+\.(?:yaml|py))\n")
_LINK = re.compile(r"\]\(([^)#]+)\)")
_REFUSED = re.compile(r"^\| `(stillroom [^`]+)` \| ([^|]+) \|", flags=re.MULTILINE)
#: What a page quotes of the product at the start of a row.
_QUOTED = re.compile(r'^\| [^|]*?"([^"|]+)"', flags=re.MULTILINE)


#: Plays a page: `steps` are (where, language, text).
_PLAY = """
import subprocess

names = {"__name__": "page"}
for where, language, text in steps:
    print("==", where, flush=True)
    if language == "python":
        exec(compile(text, where, "exec"), names)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
"""


@dataclass(frozen=True)
class Block:
    where: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (GUIDE / page).read_text(encoding="utf-8")
    return [
        Block(f"{page}:{text[: found.start()].count(chr(10)) + 1}", found[2], found[3])
        for found in _BLOCK.finditer(text)
    ]


def listed() -> list[str]:
    """The pages in the order of the table of contents."""
    return re.findall(r"^\| \[(\w+\.md)\]", (GUIDE / FIRST).read_text(encoding="utf-8"), flags=re.MULTILINE)


def refusals() -> list[tuple[str, str]]:
    return _REFUSED.findall((GUIDE / "troubleshooting.md").read_text(encoding="utf-8"))


@cache
def said() -> str:
    """Every piece of text in the product's code, one a line."""
    pieces = []
    for room in ("pipeline", "storage", "workers"):
        for path in sorted((ROOT / room).rglob("*.py")):
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            pieces += [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(pieces)


def test_every_page_is_listed_and_every_link_leads_somewhere() -> None:
    pages = sorted(path.name for path in GUIDE.glob("*.md"))
    assert sorted([FIRST, *listed()]) == pages
    for page in pages:
        for link in _LINK.findall((GUIDE / page).read_text(encoding="utf-8")):
            assert (GUIDE / link).exists(), f"{page}: {link}"


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    for page in [FIRST, *listed()]:
        text = (GUIDE / page).read_text(encoding="utf-8")
        found = blocks(page)
        assert len(re.findall(r"^(?:```|~~~)", text, flags=re.MULTILINE)) == 2 * len(found), page
        for block in found:
            assert block.language in ("sh", "python", "yaml", "text"), block.where
            if block.language == "yaml":
                assert _FILE.match(block.text), f"{block.where}: a recipe begins with its file's name"


def commands() -> list[Command]:
    kinds = ("sh", "text")
    found = [block for page in [FIRST, *listed()] for block in blocks(page) if block.language in kinds]
    return [
        Command(f"{block.where} ({block.language})", command.program, command.words)
        for block in found
        for command in commands_in(block.where, block.text)
    ]


def test_every_command_is_one() -> None:
    """The grammar of all of them; of those that are not run, the recipe and what is said over it, too."""
    assert len(commands()) > 20
    for command in commands():
        assert command.program == "stillroom", command.where
        arguments = parse(command.words)
        if command.where.endswith("(text)") and arguments.command in RECIPE_COMMANDS:
            load_chain(ROOT / arguments.recipe, arguments.overrides, files=False)


def test_what_the_guide_quotes_is_said() -> None:
    text = (GUIDE / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [phrase for whole in _QUOTED.findall(text) for phrase in whole.split(" … ")]
    assert len(quoted) >= 10
    for phrase in quoted:
        assert phrase.strip() in said(), phrase


class Reader:
    """Somebody who goes through a page with a shell and one Python session, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = os.environ | {
            "PATH": beside, "STILLROOM_CACHE": str(folder / "cache"), "COLUMNS": "200",
        }  # fmt: skip

    def read(self, page: str) -> str:
        """Writes the page's files, then runs its blocks in one process, in which names of Python live on to the end."""
        for block in blocks(page):
            if named := _FILE.match(block.text):
                (self.folder / named[1]).write_text(block.text, encoding="utf-8")
        steps = [(b.where, b.language, b.text) for b in blocks(page) if b.language in ("sh", "python")]
        (self.folder / "page.py").write_text(f"steps = {steps!r}\n{_PLAY}", encoding="utf-8")
        return self.run(sys.executable, "page.py", where=page)

    def run(self, *words: str, where: str, code: int = 0) -> str:
        process = subprocess.Popen(
            words, cwd=self.folder, env=self._environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=PATIENCE_S)
        except BaseException:
            kill_group(process)  # else what is left of it works on in the folder of the next tests
            raise
        assert (process.returncode != 0) == (code != 0), f"{where}: exit code {process.returncode}\n{printed}"
        return printed


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """The folder that the guide's first page asks for, and that page done."""
    folder = tmp_path_factory.mktemp("guide")
    # With tied embeddings a random teacher repeats what it reads, which `verify` takes for shifted rows.
    tiny_teacher(folder / "teacher", layers=4, tie_word_embeddings=False)
    write_corpus(folder / "texts.jsonl", sentences(0, 50, 60))
    write_corpus(folder / "notes.jsonl", sentences(1, 20, 60))
    tiny_teacher(folder / "other", vocabulary=300)
    smaller_seqkd(folder)
    made = Reader(folder)
    made.read(FIRST)
    return made


def smaller_seqkd(folder: Path) -> None:
    """`deploy/recipes/seqkd.yaml` with fewer and shorter responses of a tiny teacher, under the same name."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for word in (*SMALLER, "teacher.model=answering"):
        key, _, value = word.partition("=")
        *path, last = key.split(".")
        section: Any = recipe
        for name in path:
            section = section[int(name)] if isinstance(section, list) else section.setdefault(name, {})
        section[last] = yaml.safe_load(value)
    there = folder / RECIPE.relative_to(ROOT)
    there.parent.mkdir(parents=True)
    there.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for prompts in recipe["generate"]["prompts"]:
        (folder / prompts).write_bytes((ROOT / prompts).read_bytes())
    tiny_teacher(folder / "answering", head_dim=64)  # vLLM's attention on a CPU knows no heads of 8 channels


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=NEEDED) if page == "generations.md" else page for page in listed()]
)
def test_a_page_runs(reader: Reader, page: str) -> None:
    reader.read(page)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("command", "message"), refusals())
def test_a_refusal_is_one_line_in_these_words(reader: Reader, command: str, message: str) -> None:
    printed = reader.run(*shlex.split(command), where=command, code=1)
    last = printed.strip().splitlines()[-1]
    assert last.startswith("stillroom: error: ")
    assert message in last
