"""What was measured of a model folder, kept beside the run: measured again only where what it depends on changed.

Enters: all that the numbers depend on, and a module that measures. Leaves: `measured/<name>.json` of a run's folder,
what is in it, and the seconds that measuring took. Costs: a look at a few files; where something changed, the module's
process.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from stillroom.storage.errors import StillroomError
from stillroom.storage.files import LocalFiles

FOLDER = "measured"


def stamps(files: list[Path]) -> dict[str, list[int]]:
    """Size and time of change (ns) by name; of files of one folder."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}


def weights_of(folder: Path) -> dict[str, list[int]]:
    """`stamps` of a model's weights."""
    return stamps(list(folder.glob("*.safetensors")))


def held(run_dir: Path, name: str, of: dict[str, Any]) -> dict[str, Any] | None:
    """What is kept under this name, if it depends on just that."""
    path = run_dir / FOLDER / f"{name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return dict(found["measured"]) if found["of"] == of else None


def keep(run_dir: Path, name: str, of: dict[str, Any], measured: dict[str, Any], *, wall_s: float) -> None:
    """Write it down, atomically. wall_s: that measuring took; nothing depends on it."""
    kept = {"of": of, "measured": measured, "wall_s": round(wall_s, 3)}
    LocalFiles(run_dir / FOLDER).write(f"{name}.json", json.dumps(kept).encode())


def run_module(module: str, request: dict[str, Any], what: str) -> str:
    """Run `python -m module` on a JSON request; what it prints on stdout. what: is measured, for the message.

    Raises StillroomError with the last line of a process that fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(request), capture_output=True, text=True, check=False,
        errors="replace",
    )  # fmt: skip
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise StillroomError(f"{what} failed: {last[0]}")
    return done.stdout
