"""What is installed is what is in the tree: every module, nothing else, under `stillroom.` only."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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
