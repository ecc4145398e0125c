"""What a store has cost and what it has been good for: one small file for each teaching run and each trained student.

Enters: a `TaughtRun` as it goes, a `Use` when a student is done. Leaves: JSON files in the store, and `Reuse`: the
teacher hours that they add up to. Costs: one file of 300 bytes to write, one to read for each of them.

    _stillroom/taught/<32 hex digits>.json    a teaching run; written anew at each of its commits
    _stillroom/uses/<32 hex digits>.json      a student that learned from the store

Files and not lines of one: an object store cannot append, and writers on several machines need not know one another.
They count for nothing but the account: a store without them is whole, and what is not known is null. Each states a
digest of what it says (`seal`), so that a flipped bit does not change the account unseen.
"""

import json
import re
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, TypeVar

from stillroom.storage.errors import CorruptShard
from stillroom.storage.files import Files
from stillroom.storage.identity import canonical_json
from stillroom.storage.records import digest128

USES, TAUGHT = "_stillroom/uses", "_stillroom/taught"

_NAME = re.compile(rf"(?:{USES}|{TAUGHT})/[0-9a-f]{{32}}\.json")


@dataclass(frozen=True)
class Use:
    """A student that was trained from the store.

    student: its name. run: the recipe's. finished_at: ISO 8601, UTC. signal: the part that taught. temperature: T.
    sequences: of the corpus's training split. tokens: read by the student, again in every epoch; those of its
        evaluations are not counted. trained_positions: of these, with a loss. epochs: passes over the training split.
    """

    student: str
    run: str
    finished_at: str
    signal: str
    temperature: float
    sequences: int
    tokens: int
    trained_positions: int
    steps: int
    epochs: float | None


@dataclass(frozen=True)
class TaughtRun:
    """What a teaching run has committed so far.

    run: the recipe's name. finished_at: of its last commit, ISO 8601, UTC. tokens: scored and committed.
    actor_seconds: in which its actors scored, encoded and wrote these, added up over actors. wall_s: from starting
        the actors, loading included, to the last commit. actors: how many were held all that time. device: theirs.
    """

    run: str
    finished_at: str
    units: int
    sequences: int
    tokens: int
    actor_seconds: float
    wall_s: float
    actors: int
    device: str


@dataclass(frozen=True)
class Reuse:
    """What the ledgers add up to; None where something that it takes is not known.

    teaching_runs, uses: accounted for; a use is a trained student. students: their names, each once. last_use: ISO
        8601, UTC. tokens_read: by all of them.
    passes: tokens_read in passes over what the store holds.
    teacher_hours_spent: Σ actors · wall_s, so that loading and waiting count against us.
    teacher_hours_live: what a teacher would have worked had it scored every token that a student read, at the speed
        measured here while it worked, tokens / actor_seconds.
    teacher_hours_saved: live − spent; negative until it pays. break_even_passes: over the store's tokens, where
        live = spent.
    """

    teaching_runs: int
    uses: int
    students: tuple[str, ...]
    last_use: str | None
    tokens_read: int
    passes: float | None
    teacher_hours_spent: float | None
    teacher_hours_live: float | None
    teacher_hours_saved: float | None
    break_even_passes: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "students": list(self.students)}


Record = TypeVar("Record", Use, TaughtRun)


def utc_now() -> str:
    """ISO 8601 to the second, such as 2026-11-24T08:39:42Z."""
    return utc_of(time.time())


def utc_of(time_s: float) -> str:
    """As `utc_now`, of seconds since 1970, such as a file's time."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seal(stated: dict[str, Any]) -> bytes:
    """JSON of a side file, with `digest`: BLAKE2b-128 over the canonical JSON of everything else."""
    held = {key: value for key, value in stated.items() if key != "digest"}
    return (json.dumps(held | {"digest": _digest(held)}, ensure_ascii=False, indent=2) + "\n").encode()


def unseal(data: bytes) -> dict[str, Any]:
    """What was sealed; what has no digest is taken as it is. Raises ValueError where it is not what it was."""
    held = json.loads(data)
    if not isinstance(held, dict):
        raise ValueError("it is no JSON object")
    stated = held.pop("digest", None)
    if stated is not None and stated != _digest(held):
        raise ValueError("its content is not what its digest says")
    return held


def _digest(held: dict[str, Any]) -> str:
    return digest128(b"stillroom.side.1", canonical_json(held))


def has_use(files: Files, key: str) -> bool:
    """Whether a use is entered. Raises StoreError."""
    return files.exists(f"{USES}/{_checked(key)}.json")


def record_use(files: Files, key: str, use: Use) -> bool:
    """Enter a use under its key, 32 hex digits; False if it is there already: said twice it counts once.

    key: of the training, such as the digest of its result's bytes. Raises StoreFull, StoreError.
    """
    if has_use(files, key):
        return False
    files.write(f"{USES}/{key}.json", seal(asdict(use)))
    return True


def record_taught(files: Files, key: str, taught: TaughtRun) -> None:
    """Enter what a teaching run has done so far in place of what it had. key: of the run, 32 hex digits.

    Raises StoreFull, StoreError.
    """
    files.write(f"{TAUGHT}/{_checked(key)}.json", seal(asdict(taught)))


def load_uses(files: Files) -> list[Use]:
    """By time. Raises CorruptShard naming the file that is no use."""
    return sorted(_load(files, USES, Use), key=lambda use: use.finished_at)


def load_taught(files: Files) -> list[TaughtRun]:
    """By time. Raises CorruptShard naming the file that is no teaching run."""
    return sorted(_load(files, TAUGHT, TaughtRun), key=lambda taught: taught.finished_at)


def reuse(uses: Seq[Use], taught: Seq[TaughtRun], *, store_tokens: int) -> Reuse:
    """store_tokens: committed. What was spent is known only where the runs account for all of them: shards that were
    transcoded or copied here were taught elsewhere."""
    read = sum(use.tokens for use in uses)
    tokens, working_s = sum(run.tokens for run in taught), sum(run.actor_seconds for run in taught)
    speed = tokens / working_s if working_s > 0 and tokens > 0 else None
    whole = bool(taught) and tokens >= store_tokens
    spent = sum(run.actors * run.wall_s for run in taught) / 3600 if whole else None
    live = read / speed / 3600 if speed else None
    return Reuse(
        teaching_runs=len(taught),
        uses=len(uses),
        students=tuple(dict.fromkeys(use.student for use in uses)),
        last_use=max((use.finished_at for use in uses), default=None),
        tokens_read=read,
        passes=read / store_tokens if store_tokens else None,
        teacher_hours_spent=spent,
        teacher_hours_live=live,
        teacher_hours_saved=None if live is None or spent is None else live - spent,
        break_even_passes=spent * 3600 * speed / store_tokens if spent is not None and speed and store_tokens else None,
    )


def _checked(key: str) -> str:
    if not re.fullmatch("[0-9a-f]{32}", key):
        raise ValueError(f"key {key!r}, expected 32 hex digits")
    return key


def account_files(files: Files) -> Iterable[str]:
    """Names of the files of the account. Raises StoreError."""
    return (name for folder in (USES, TAUGHT) for name in files.list(folder) if _NAME.fullmatch(name))


def check_account_file(files: Files, name: str) -> None:
    """Raises CorruptShard naming the file where it is damaged."""
    if name.startswith(USES):
        _read(files, name, Use)
    else:
        _read(files, name, TaughtRun)


def _load(files: Files, folder: str, kind: type[Record]) -> Iterable[Record]:
    return (_read(files, name, kind) for name in files.list(folder) if _NAME.fullmatch(name))


def _read(files: Files, name: str, kind: type[Record]) -> Record:
    try:
        held = unseal(files.read(name))
        # A later release may say more; what this one counts must be there, and be of its type.
        return kind(**{field.name: _typed(held[field.name], field.type) for field in fields(kind)})
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptShard(
            f"{files.uri}/{name} cannot be read ({' '.join(str(error).split())}): put back a copy of it, or remove "
            "it, and what it says is no longer counted"
        ) from error


def _typed(value: Any, kind: Any) -> Any:
    """Raises TypeError or ValueError where a value is not of its field's type, or is a negative or infinite number."""
    accepted: tuple[type, ...] = {str: (str,), int: (int,), float: (int, float)}.get(kind, (int, float, type(None)))
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise TypeError(f"{value!r} where {getattr(kind, '__name__', kind)} is expected")
    if isinstance(value, int | float) and not 0 <= value < float("inf"):
        raise ValueError(f"{value!r} where a number of 0 and more is expected")
    return value
