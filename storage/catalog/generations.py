"""What `ls` and `inspect` say of a store of generations.

Enters: a store of generations. Leaves: JSON-able dictionaries, and rows for a table of 120 columns. Costs: log, plans
and the footers of at most 64 shards; `inspect` reads these shards whole.
"""

import json
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stillroom.storage.catalog.footers import columns_of, footer_of
from stillroom.storage.catalog.planned import planned_sums
from stillroom.storage.catalog.tables import fitted, relative, scaled
from stillroom.storage.catalog.views import texts_of
from stillroom.storage.errors import StillroomError, StoreError
from stillroom.storage.generations.records import FINISHES, Generation
from stillroom.storage.generations.shard import read_generations
from stillroom.storage.generations.store import GenerationStore, open_generations
from stillroom.storage.records import ShardRef

#: Shards that are looked into; of more, so many evenly spread over the units' ids.
SAMPLED_SHARDS = 64

_SHOWN_UNITS = 5


def summary(store: GenerationStore) -> dict[str, Any]:
    """A store in numbers. tokens: generated ones, by the footers; where there are more shards than are looked into,
    estimated by bytes, and `tokens_estimated` is true. An empty response counts as one token there.

    `problems` has a line where a footer cannot be read; what it would say is null then. Raises StoreError, CorruptShard
    where log or plans cannot be read.
    """
    refs, planned, identity = store.committed(), planned_sums(store.files), store.identity
    committed = np.isin(planned.units, np.array(list(refs), "S32"))
    prompts = int(planned.sequences[committed].sum())
    size = sum(ref.size_bytes for ref in refs.values())
    decoding = identity.decoding
    found: dict[str, Any] = {
        "kind": "generations",
        "store": store.uri,
        "identity": identity.id,
        "identity_in_words": f"{identity.teacher}, {identity.quantisation or identity.dtype}: {decoding.in_words()}",
        "teacher": identity.teacher,
        "dtype": identity.dtype,
        "quantisation": identity.quantisation,
        "decoding": decoding.as_dict(),
        "decoding_in_words": decoding.in_words(),
        "engine": None,
        "vocabulary": identity.vocabulary,
        "units": len(refs),
        "prompts": prompts,
        "responses": prompts * decoding.n,
        "tokens": None,
        "tokens_estimated": len(refs) > SAMPLED_SHARDS,
        "bytes": size,
        "bytes_per_token": None,
        "units_planned_not_committed": int((~committed).sum()),
        "problems": [],
    }
    try:
        found |= _by_footers(store, refs, size)
    except StillroomError as error:
        found["problems"].append(str(error))
    return found


def generation_rows(stores: Seq[dict[str, Any]], root: str, *, fold: bool = False) -> list[dict[str, str]]:
    """What stores of generations hold, for people, as a table at most 120 columns wide. stores, root, fold: as in
    `stores.table_rows`."""
    known = [store for store in stores if "error" not in store and store["kind"] == "generations"]
    rows = [
        {
            "store": relative(store["store"], root),
            "teacher": f"{_name(store['teacher'])} {store['quantisation'] or store['dtype']}",
            "decoding": store["decoding_in_words"],
            "engine": engine_in_words(store["engine"]),
            "units": str(store["units"]),
            "prompts": scaled(store["prompts"]).strip(),
            "responses": scaled(store["responses"]).strip(),
            "tokens": "–" if store["tokens"] is None else scaled(store["tokens"]).strip(),
            "size": f"{scaled(store['bytes'])}B",
        }
        for store in known
    ]
    return fitted(rows, ("teacher",), "decoding", fold=fold)


def engine_in_words(engine: Mapping[str, Any] | None) -> str:
    """Of what an engine said of itself: `vllm 0.11.0, cpu`."""
    if not engine:
        return "–"
    name = str(engine.get("engine", "unknown"))
    version = f" {engine[name]}" if name in engine else ""
    return f"{name}{version}" + (f", {engine['device']}" if engine.get("device") else "")


def inspect_generations(uri: str, unit: str | None = None, *, texts: int = 0, tokens: bool = False) -> dict[str, Any]:
    """A store of generations in numbers; with `unit` (an id or its beginning) that unit's responses.

    texts: so many responses are shown, spread over what was read; of a unit all, unless it is given. tokens: with each
    its ids and logprobs, and what they mean where the store has a token table.
    Raises NoStore, CorruptShard naming a shard that cannot be read, StoreError.
    """
    store = open_generations(uri)
    refs = store.committed()
    if unit is not None:
        return _unit(store, refs, unit, texts, tokens)
    found = summary(store)
    del found["decoding"]  # the identity's parts have it
    chosen = _spread(refs)
    responses = [
        response for ref in chosen for response in read_generations(store.files, store.identity, ref).responses
    ]
    found["engine_in_words"] = engine_in_words(found["engine"])
    found["identity_parts"] = store.identity.parts()
    found["first_units"] = sorted(refs)[:_SHOWN_UNITS]
    found |= _on_disk(store, refs)
    found["columns_bytes_per_token"] = _column_sizes(store, chosen, sum(len(r.response_ids) for r in responses))
    found["read_shards"] = len(chosen)
    found |= measured(responses)
    if texts:
        found["responses_shown"] = _shown(store, responses, texts, tokens)
    return found


def measured(responses: Seq[Generation]) -> dict[str, Any]:
    """Lengths in tokens, what ended the responses as shares of them, and logprobs in nats a token, over all tokens."""
    lengths = np.array([len(response.response_ids) for response in responses], np.int64)
    ends: Counter[str] = Counter(response.finish for response in responses)
    total = sum(float(np.sum(response.logprobs, dtype=np.float64)) for response in responses)
    if not responses:
        return {"response_tokens": None, "finish_share": None, "truncated_share": None, "mean_logprob": None}
    return {
        "response_tokens": {
            "mean": round(float(lengths.mean()), 2),
            "p50": float(np.percentile(lengths, 50)),
            "p95": float(np.percentile(lengths, 95)),
            "longest": int(lengths.max()),
        },
        "finish_share": {finish: round(ends[finish] / len(responses), 4) for finish in FINISHES},
        "truncated_share": round(ends["length"] / len(responses), 4),
        "mean_logprob": round(total / int(lengths.sum()), 4) if lengths.any() else None,
    }


def _spread(refs: Mapping[str, ShardRef]) -> list[ShardRef]:
    """At most SAMPLED_SHARDS, evenly over the ids, which are digests: a fixed random part."""
    units = sorted(refs)
    step = max(1.0, len(units) / SAMPLED_SHARDS)
    return [refs[units[int(at * step)]] for at in range(min(len(units), SAMPLED_SHARDS))]


def _by_footers(store: GenerationStore, refs: Mapping[str, ShardRef], size: int) -> dict[str, Any]:
    chosen = _spread(refs)
    footers = [footer_of(store, ref) for ref in chosen]
    columns = [named for footer in footers for named in columns_of(footer)]
    counted = sum(column.num_values for name, column in columns if name == "response_ids")
    read = sum(ref.size_bytes for ref in chosen)
    tokens = counted if len(chosen) == len(refs) else round(counted * size / read)
    per_token = round(size / tokens, 2) if tokens else None
    return {"tokens": tokens, "bytes_per_token": per_token, "engine": _engine(footers[0]) if footers else None}


def _column_sizes(store: GenerationStore, refs: Seq[ShardRef], tokens: int) -> dict[str, float]:
    """Bytes a generated token."""
    sizes: Counter[str] = Counter()
    for ref in refs:
        for name, column in columns_of(footer_of(store, ref)):
            sizes[name] += column.total_compressed_size
    return {name: round(size / max(tokens, 1), 3) for name, size in sizes.items()}


def _on_disk(store: GenerationStore, refs: Mapping[str, ShardRef]) -> dict[str, Any]:
    """All files of the store by what they are, leftovers of stopped writers too."""
    held = {ref.path for ref in refs.values()}
    sizes = dict.fromkeys(("shards", "leftover_shards", "log", "plans", "other"), 0)
    for info in store.files.walk():
        kind = ("shards" if info.name in held else "leftover_shards") if info.name.startswith("shards/") else "other"
        kind = {"_delta_log": "log", "_stillroom/plans": "plans"}.get(info.name.rpartition("/")[0], kind)
        sizes[kind] += info.size_bytes
    return {"on_disk": {f"{name}_bytes": size for name, size in sizes.items()}}


def _unit(store: GenerationStore, refs: Mapping[str, ShardRef], unit: str, texts: int, tokens: bool) -> dict[str, Any]:
    matches = [u for u in refs if u.startswith(unit)]
    if len(matches) != 1:
        raise StoreError(f"store {store.uri}: {len(matches)} committed units begin with {unit!r}, expected one")
    ref = refs[matches[0]]
    read = read_generations(store.files, store.identity, ref)
    return {
        "store": store.uri,
        "kind": "generations",
        "unit": matches[0],
        "path": ref.path,
        "engine": read.engine,
        **measured(read.responses),
        "responses_shown": _shown(store, read.responses, texts or len(read.responses), tokens),
    }


def _shown(store: GenerationStore, responses: Seq[Generation], count: int, tokens: bool) -> list[dict[str, Any]]:
    """`count` of them, always the same at random. A prompt is text by the store's token table, or null without one."""
    meanings = texts_of(store.files)
    # Not every so-maniest: that would be the same sample of every prompt.
    chosen = np.random.default_rng(0).permutation(len(responses))[:count]
    return [_one(responses[at], meanings, tokens) for at in sorted(chosen.tolist())]


def _one(response: Generation, meanings: Seq[str] | None, tokens: bool) -> dict[str, Any]:
    def text(ids: Seq[int]) -> str | None:
        return None if meanings is None else "".join(meanings[i] for i in ids)

    said: dict[str, Any] = {
        "prompt_digest": response.prompt,
        "prompt": text(response.prompt_ids.tolist()),
        "sample": response.sample,
        "finish": response.finish,
        "response_tokens": len(response.response_ids),
        "total_logprob": round(float(np.sum(response.logprobs, dtype=np.float64)), 4),
        "response": response.text,
    }
    if tokens:
        said["prompt_ids"] = response.prompt_ids.tolist()
        pairs = zip(response.response_ids.tolist(), response.logprobs.tolist(), strict=True)
        said["tokens"] = [
            {"id": i, **({} if meanings is None else {"text": meanings[i]}), "logprob": round(logprob, 4)}
            for i, logprob in pairs
        ]
    return said


def _engine(footer: pq.FileMetaData) -> dict[str, Any] | None:
    try:
        engine = json.loads((footer.metadata or {})[b"stillroom"])["engine"]
    except (KeyError, TypeError, ValueError):
        return None  # `verify` says so
    return engine if isinstance(engine, dict) else None


def _name(teacher: str) -> str:
    return teacher.rstrip("/").rpartition("/")[2]
