"""Small corpora on disk for the corpus tests, and what a manifest says about them."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from stillroom.pipeline.corpus.config import CorpusConfig
from stillroom.pipeline.corpus.counts import Counts
from stillroom.pipeline.corpus.ingest import ingest
from stillroom.storage.manifest import Manifest, ManifestRow


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """One record per line; a str is written as it is, for lines that are no JSON."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def ingested(tokenizer: Any, folder: Path, sources: Any, **settings: Any) -> Manifest:
    """Ingest with nothing held out unless said; `sources` as a recipe gives them, relative to `folder`."""
    config = CorpusConfig(**{"sources": sources, "heldout": 0, "window": 64, **settings})
    return ingest(config, tokenizer, out=folder / "out" / "manifest.parquet", root=folder)


def counts(manifest: Manifest) -> Counts:
    return Counts.from_dict(manifest.meta.counts)


def texts(tokenizer: Any, manifest: Manifest) -> list[str]:
    """Each row decoded."""
    return [tokenizer.decode(row.sequence.input_ids.tolist()) for row in manifest]


def learned(tokenizer: Any, row: ManifestRow) -> str:
    """The learned tokens of a row decoded; stretches joined by `|`."""
    pieces, open_piece = [[]], False  # type: list[list[int]], bool
    for token, on in zip(row.sequence.input_ids.tolist(), row.mask.tolist(), strict=True):
        if on:
            pieces[-1].append(token)
        elif open_piece:
            pieces.append([])
        open_piece = on
    return "|".join(tokenizer.decode(piece) for piece in pieces if piece)


def by_document(manifest: Manifest) -> dict[int, list[ManifestRow]]:
    documents: dict[int, list[ManifestRow]] = defaultdict(list)
    for row in manifest:
        documents[row.document].append(row)
    return documents
