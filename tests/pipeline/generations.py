"""Kept generations without an engine: a store and a table of verdicts made by hand."""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from stillroom.pipeline.corpus.verdicts import KEPT, Verdict, write_verdicts
from stillroom.storage.generations.records import Generation
from stillroom.storage.generations.shard import write_generations
from stillroom.storage.generations.store import create_generations
from stillroom.storage.identity import tokenizer_digest
from stillroom.storage.records import Receipt
from tests.storage.generations.builders import identity, response, unit_of


def kept_by_hand(folder: Path, tokenizer: Any, prompts: Seq[str] = ("thyme",)) -> list[Generation]:
    """Two responses to each prompt in `folder`/generations, spelt a letter a token, and `folder`/verdicts.parquet,
    which keeps all of them."""
    said = "mint and rose"
    letters = [i for c in said for i in tokenizer(c, add_special_tokens=False)["input_ids"]]
    digest = tokenizer_digest(tokenizer.backend_tokenizer.to_str())
    store = create_generations(str(folder / "generations"), identity(tokenizer=digest))
    ids = [tokenizer(f"<|start|>user\n{p}<|end|>\n<|start|>assistant\n")["input_ids"] for p in prompts]
    unit = unit_of(ids)
    found = [response(prompt, s, (*letters[s:], 2), text=said[s:]) for prompt in ids for s in range(2)]
    store.save_plan([unit])
    ref = write_generations(store.files, store.identity, unit, found, {})
    store.commit([Receipt(ref, len(ids), sum(unit.tokens), 0, len(found), 1.0)])
    verdicts = [Verdict(g.prompt, g.sample, g.sequence.digest, unit.id, 1, 0.0, 0.0, None, None, KEPT) for g in found]
    meta = {
        "store": store.uri,
        "identity": store.identity.id,
        "tokenizer": digest,
        "prompts": str(folder / "prompts.parquet"),
    }
    write_verdicts(folder / "verdicts.parquet", verdicts, meta)
    return found
