"""Is every committed response what was committed, and is it one that its store can hold?

Enters: a store of generations. Leaves: `ResponseFindings`, which report and repair go by. Costs: one read of the store,
one shard of it in memory at a time, and 150 bytes a prompt.

What is checked beside digests, page checksums, plans and log: that every prompt of a unit has its n responses, each
once in the whole store; ids inside the vocabulary; logprobs that are logprobs; known reasons to end. A unit that is
dropped is made again by `stillroom generate`: seeds are of content, so the same requests are made.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stillroom.storage.care.audit import (
    WRITES_AGAIN,
    Action,
    Findings,
    Problem,
    account_problems,
    audit_plans,
    digest_problems,
    entry_problem,
    leftovers,
    log_problems,
    repair_of,
    state_problems,
)
from stillroom.storage.errors import CorruptShard, FormatMismatch, StoreError
from stillroom.storage.generations.records import Generation, GenerationIdentity
from stillroom.storage.generations.shard import SCHEMA, read_generations
from stillroom.storage.generations.store import GenerationStore
from stillroom.storage.log import CommitLog
from stillroom.storage.records import ShardRef, Unit
from stillroom.storage.shard import FOLDER

ProgressCall = Callable[[int, int], None]

#: Nats above 0 that rounding may give a token that is certain: float32's of a log-partition of 64.
_ROUNDING = 64 * 2.0**-23


@dataclass
class ResponseFindings(Findings):
    """responses, tokens: of the shards that could be read; tokens are generated ones. held: the unit of each prompt."""

    store: GenerationStore
    responses: int = 0
    tokens: int = 0
    held: dict[str, str] = field(default_factory=dict)

    kind = "generations"

    def counted(self) -> dict[str, Any]:
        return {"prompts": len(self.held), "responses": self.responses, "tokens": self.tokens}


def examine_generations(store: GenerationStore, progress: ProgressCall | None = None) -> ResponseFindings:
    """`verify.examine` of a store of generations. Raises StoreError where log or plans cannot be reached."""
    files = store.files
    sizes = {info.name: info.size_bytes for info in files.walk() if info.name.startswith(FOLDER + "/")}
    found = ResponseFindings(store, audit_plans(files, "planned anew by `stillroom generate`"), store.committed())
    found.problems += found.plans.problems
    found.problems += digest_problems(files)
    found.problems += account_problems(files)
    found.problems += log_problems(files, SCHEMA.names, WRITES_AGAIN)
    records = CommitLog.open(store.uri).records()
    for number, (_, ref) in enumerate(sorted(found.refs.items()), start=1):
        found.problems += _shard_problems(found, ref, sizes.get(ref.path), records.get(ref.path))
        if progress:
            progress(number, len(found.refs))
    if not found.problems:  # else it is explained
        found.problems += state_problems(store, WRITES_AGAIN)
    found.uncommitted_files = leftovers(sizes, found.refs)
    return found


def _shard_problems(
    found: ResponseFindings, ref: ShardRef, size_bytes: int | None, records: int | None
) -> Iterator[Problem]:
    """size_bytes: of the file, None where there is none. records: its prompts by the log."""
    uri = found.store.uri
    again = f"put back a copy of it, or {repair_of(uri)} and `stillroom generate` on the recipe make its unit again"

    def problem(text: str, action: Action | None = "drop", remedy: str = again) -> Problem:
        return Problem(ref.path, text, remedy, action, ref)

    if size_bytes is None:
        yield problem("the log names it, and it is not in the store")
        return
    try:
        responses = read_generations(found.store.files, found.store.identity, ref).responses
    except CorruptShard as error:
        yield problem(str(error))
        return
    except FormatMismatch as error:  # every shard may be so for another release: no reason to drop one
        yield problem(str(error), None, "read it with the release that wrote it, or generate into another path")
        return
    except StoreError as error:  # no permission, no network: that says nothing of what is in it
        yield problem(str(error), None, "see that the file can be reached, and run the same command again")
        return
    found.responses += len(responses)
    found.tokens += sum(len(response.response_ids) for response in responses)
    unit = _unit_of(responses)
    wrong = _wrong(responses, unit, found, ref)
    if wrong:
        yield problem(wrong)
        return
    found.held |= dict.fromkeys(unit.sequences, ref.unit)
    if ref.size_bytes != size_bytes or records != len(unit.sequences):
        yield entry_problem(ref, size_bytes, records, len(unit.sequences), "prompts", uri)
    if ref.unit not in found.plans.units:
        found.unplanned[ref.unit] = unit
        remedy = f"{repair_of(uri)} writes a plan from the shards' own prompts"
        yield problem("no saved plan names this unit", "replan", remedy)
    elif found.plans.units[ref.unit] != unit:
        remedy = f"move the plan that names this unit out of _stillroom/plans, and {repair_of(uri)} rebuilds it"
        yield problem("a saved plan gives its prompts other lengths than they have", None, remedy)


def _unit_of(responses: Seq[Generation]) -> Unit:
    """As a shard has it: its prompts in the order in which they first occur."""
    lengths = {response.prompt: len(response.prompt_ids) for response in responses}
    return Unit(tuple(lengths), tuple(lengths.values()), (0,) * len(lengths))


def _wrong(responses: Seq[Generation], unit: Unit, found: ResponseFindings, ref: ShardRef) -> str | None:
    """The first thing that a shard of intact bytes has wrong, in words."""
    twice = [key for key, count in Counter((r.prompt, r.sample) for r in responses).items() if count > 1]
    if twice:
        return f"prompt {twice[0][0]} has sample {twice[0][1]} twice (and {len(twice) - 1:,} more are)"
    if unit.id != ref.unit:
        return "its prompts are not those of its unit"
    identity = found.store.identity
    expected = [(prompt, sample) for prompt in unit.sequences for sample in range(identity.decoding.n)]
    if [(r.prompt, r.sample) for r in responses] != expected:
        return f"it has {len(responses):,} responses, expected {identity.decoding.n} of each prompt in the unit's order"
    elsewhere = [prompt for prompt in unit.sequences if prompt in found.held]
    if elsewhere:
        return (
            f"{len(elsewhere):,} of its prompts have responses in unit {found.held[elsewhere[0]]} already, the first "
            f"is {elsewhere[0]}: they would count twice"
        )
    lines = [
        f"prompt {r.prompt}, sample {r.sample}: {line}" for r in responses if (line := response_problem(r, identity))
    ]
    return lines[0] + (f" (and {len(lines) - 1:,} more of its responses)" if lines[1:] else "") if lines else None


def response_problem(response: Generation, identity: GenerationIdentity) -> str | None:
    """What one response has wrong, in words, or None."""
    for name, ids in (("prompt", response.prompt_ids), ("response", response.response_ids)):
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < identity.vocabulary:
            return f"an id of its {name} lies outside 0 … {identity.vocabulary - 1}"
    if not np.isfinite(response.logprobs).all():
        return "logprobs are not finite"
    if (response.logprobs > _ROUNDING).any():
        return f"a logprob of {float(response.logprobs.max()):g} is above 0"
    if len(response.response_ids) > identity.decoding.max_tokens:
        return f"{len(response.response_ids):,} tokens, at most {identity.decoding.max_tokens:,} were asked for"
    return None
