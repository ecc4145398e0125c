"""A store of generations: committed shards of responses under one root, with the log and plans of every store.

Enters: a URI, and an identity where it is new. Leaves: plans, commits, responses. Costs: opening reads the identity and
the log.

    <root>/_stillroom/generations.json    what the responses are of
    <root>/_stillroom/plans/              which prompt belongs to which unit
    <root>/_delta_log/, shards/           as in a store of logits

A unit is of prompts: each has n responses, which are committed together.
"""

from collections.abc import Container, Iterator

from stillroom.storage.errors import IdentityMismatch, NoStore, StoreError
from stillroom.storage.files import GENERATIONS_MARK as MARK
from stillroom.storage.files import STORE_MARK, Files, open_files
from stillroom.storage.generations.records import GenerationIdentity
from stillroom.storage.generations.shard import SCHEMA, StoredUnit, missing, read_generations
from stillroom.storage.log import CommitLog
from stillroom.storage.shard import FOLDER as SHARDS
from stillroom.storage.store import Store, UnitStore, open_store, read_identity


class GenerationStore(UnitStore):
    """Made by `open_generations` or `create_generations`."""

    def __init__(self, files: Files, identity: GenerationIdentity, log: CommitLog) -> None:
        super().__init__(files, log)
        self.identity = identity

    def units(self, wanted: Container[str] | None = None) -> Iterator[StoredUnit]:
        """Committed units by id; of those in `wanted` only, if given. Raises CorruptShard, StoreError."""
        self._log.require_whole()
        for unit, ref in sorted(self.committed().items()):
            if wanted is not None and unit not in wanted:
                continue
            if not self.files.exists(ref.path):
                raise missing(StoreError(f"cannot read {self.uri}/{ref.path}: there is no such file"), self.files)
            yield read_generations(self.files, self.identity, ref)


def open_generations(uri: str) -> GenerationStore:
    """Raises NoStore if there are none at `uri`, IdentityMismatch, FormatMismatch if their identity is damaged,
    StoreError."""
    files = open_files(str(uri))
    if not files.exists(MARK):
        raise NoStore(f"{files.uri} holds no generations: it has no {MARK}; `stillroom generate` makes one")
    return GenerationStore(files, read_identity(files, MARK, GenerationIdentity.from_json), CommitLog.open(files.uri))


def open_any(uri: str) -> Store | GenerationStore:
    """The store at `uri`, of whichever kind. Raises NoStore if there is none, and as `open_store` does."""
    return open_generations(uri) if holds_generations(open_files(str(uri))) else open_store(uri)


def holds_generations(files: Files) -> bool:
    """Whether they are a store of generations. Raises StoreError where that cannot be seen."""
    return not files.exists(STORE_MARK) and files.exists(MARK)


def create_generations(uri: str, identity: GenerationIdentity) -> GenerationStore:
    """Open the generations at `uri`, or found them.

    Raises IdentityMismatch, naming the parts that differ, if other ones live there, or a store of logits; StoreError if
    it cannot be written, or has shards but no log.
    """
    files = open_files(str(uri))
    if files.exists(STORE_MARK):
        raise IdentityMismatch(f"{files.uri} is a store of logits: give generations a generate.path of their own")
    if files.exists(MARK):
        held = read_identity(files, MARK, GenerationIdentity.from_json)
        held.require_equal(identity, files.uri)
        if files.list(SHARDS):
            return GenerationStore(files, held, CommitLog.open(files.uri))
    else:
        files.write(MARK, identity.to_json().encode())
    log = CommitLog.create(files.uri, SCHEMA)
    held = read_identity(files, MARK, GenerationIdentity.from_json)  # another founder may have been a moment later
    held.require_equal(identity, files.uri)
    return GenerationStore(files, held, log)
