"""What is sent to nodes is what a wheel would install, from wherever it runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.pipeline.ship import ROOMS, came_with_job, package_folder, write_package

ROOT = Path(__file__).parent.parent.parent


def files_under(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_the_tree_and_nothing_else(tmp_path: Path) -> None:
    package = write_package(tmp_path)
    assert package == tmp_path / "stillroom"
    assert [path.name for path in tmp_path.iterdir()] == ["stillroom"]
    tree = {
        f"{room}/{name}": data
        for room in ROOMS
        for name, data in files_under(ROOT / room).items()
        if "__pycache__" not in name
    }
    assert files_under(package) == tree


def test_an_older_one_is_replaced_and_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "stillroom").mkdir()
    (tmp_path / "stillroom" / "old.py").touch()
    (tmp_path / "recipe.yaml").touch()
    write_package(tmp_path)
    assert not (tmp_path / "stillroom" / "old.py").exists()
    assert (tmp_path / "recipe.yaml").exists()


def test_it_lasts_as_long_as_the_block() -> None:
    with package_folder() as package:
        assert (package / "workers" / "actor.py").exists()
    assert not package.parent.exists()


@pytest.mark.real
def test_it_runs_by_itself_from_where_ray_unpacks_it(tmp_path: Path) -> None:
    """`-P` and no site: only what is in that folder."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    words = [sys.executable, "-m", "stillroom.pipeline.ship", str(folder)]
    subprocess.run(words, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "from stillroom.pipeline import cli, ship\n"
        "print(cli.__file__, ship.came_with_job())"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [str(folder / "stillroom" / "pipeline" / "cli.py"), "True"]
    assert not came_with_job(), "this one did not"
