"""What is installed is what is in the tree: every module, nothing else, under `stillroom.` only."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.tiny import WORDS, tiny_teacher

ROOT = Path(__file__).parent.parent
ROOMS = ("pipeline", "storage", "workers")
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree: setuptools leaves a build folder behind, and would reuse an old one."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed that wheel."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


class Environment:
    """A new virtual environment that holds the wheel, and what the wheel depends on, and no other stillroom."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv" / "bin" / "python"
        # The dependencies, by links: installing torch anew would take minutes and a network.
        (folder / "dependencies").mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if "stillroom" not in path.name and path.suffix != ".pth":
                (folder / "dependencies" / path.name).symlink_to(path)
        site = folder / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        (site / "dependencies.pth").write_text(f"{folder / 'dependencies'}\n")

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`python words…` of this environment, in an empty folder of its own, with nothing of ours in PYTHON*."""
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        command = [str(self.python), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=clean)

    def stillroom(self, *words: str) -> str:
        done = self.run("-m", "stillroom.pipeline", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("environment"))
    before = made.run("-c", "import numpy, stillroom")
    assert "No module named 'stillroom'" in before.stderr, "the environment is not empty"
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "install", "-q", "--no-deps", "--no-index"]
    done = made.run(*pip, str(wheel))
    assert done.returncode == 0, done.stderr
    return made


def run_installed(installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code away from the tree, with the installed wheel before everything else."""
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}"
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=installed)


def test_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tree = {
        f"stillroom/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sorted(tree - held) == [], "in the tree, not in the wheel: list it in pyproject.toml, [tool.setuptools]"
    assert sorted(held - tree) == [], "in the wheel, not in the tree"


def test_wheel_holds_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


def test_rooms_are_importable_under_stillroom_only(installed: Path) -> None:
    found = run_installed(
        installed,
        "import stillroom.storage, stillroom.pipeline.cli as c; print(stillroom.storage.__file__, c.__file__)",
    )
    assert [path.startswith(str(installed)) for path in found.stdout.split()] == [True, True], found.stderr
    for room in ROOMS:
        bare = run_installed(installed, f"import {room}")
        assert bare.returncode == 1
        assert f"No module named '{room}'" in bare.stderr


def test_installed_command(installed: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    done = run_installed(installed, "from stillroom.pipeline.cli import main; main(['--version'])")
    assert (done.returncode, done.stdout) == (0, f"stillroom {version}\n"), done.stderr


def test_public_names_of_storage(installed: Path) -> None:
    done = run_installed(
        installed, "import stillroom.storage as s; [getattr(s, name) for name in s.__all__]; print('ok')"
    )
    assert done.stdout == "ok\n", done.stderr


class TestEmptyEnvironment:
    """`python -m stillroom.pipeline`, from the wheel alone, in a folder that holds nothing of the project."""

    def test_it_is_the_wheel_that_runs(self, environment: Environment) -> None:
        found = environment.run("-c", "import stillroom.pipeline, sys; print(stillroom.pipeline.__file__, *sys.path)")
        assert found.stdout.startswith(str(environment.folder / "venv")), found.stderr
        assert str(ROOT) not in [path.rstrip("/") for path in found.stdout.split()]
        assert "usage: stillroom" in environment.stillroom("--help")

    def test_installed_script(self, environment: Environment) -> None:
        done = subprocess.run([environment.python.parent / "stillroom", "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout.split()[0]) == (0, "stillroom"), done.stderr

    def test_init_teach_and_ls(self, environment: Environment) -> None:
        """From no recipe to a store: the actor is a process of Ray's own, and finds the wheel too."""
        teacher = tiny_teacher(environment.folder / "teacher")
        corpus = environment.folder / "corpus.txt"
        corpus.write_text(WORDS * 3)
        environment.stillroom("init", str(teacher), str(corpus), "-o", "recipe.yaml")
        small = ["teacher.dtype=float32", "corpus.window=64", "fidelity.positions=8", "store.min_free_bytes=0"]
        taught = json.loads(environment.stillroom("teach", "recipe.yaml", *small, "--json"))
        assert taught["sequences"] > 0
        assert taught["units_scored"] == 1
        (store,) = json.loads(environment.stillroom("ls", "--json"))["stores"]
        assert store["sequences"] == taught["sequences"]
