"""The corpus source `generations`: responses that a recipe keeps, read where they lie, as the ids that were generated.

Enters: a table of verdicts. Leaves: one record per kept response, prompts in the order of the table. Costs: the
verdicts in memory, and one unit of responses.

Ids are carried, never made again from text: a tokenizer may cut a text in other pieces than the teacher wrote. Only for
another tokenizer than the teacher's is the text tokenised, which the counts say.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from stillroom.pipeline.corpus.verdicts import read_verdicts
from stillroom.storage.errors import IdentityMismatch, RecipeError
from stillroom.storage.generations.records import Generation
from stillroom.storage.generations.store import open_generations
from stillroom.storage.manifest import GENERATIONS

#: How a source's path begins that names a table of verdicts.
PREFIX = GENERATIONS
#: The one field of a record.
FIELD = "generation"


@dataclass(frozen=True)
class Kept:
    """A response that is kept. tokenizer: digest of the one whose ids it is of. prompts: the table of the prompts'
    texts, for another tokenizer."""

    generation: Generation
    tokenizer: str
    prompts: "PromptTexts"


class PromptTexts:
    """What prompts say, read when first asked for. path: as `pipeline.prompts` writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._texts: dict[str, tuple[str, str | None]] | None = None

    def said(self, prompt: str) -> tuple[str, str | None]:
        """(text, conversation as JSON or None where it is a document's). Raises RecipeError where it is not there."""
        if self._texts is None:
            try:
                table = pq.read_table(self._path, columns=["prompt", "text", "messages"], use_threads=False)
            except OSError as error:
                raise RecipeError(
                    f"{self._path} is not there, and another tokenizer than the teacher's needs the prompts' texts: "
                    "run `stillroom generate` again"
                ) from error
            prompts, texts, messages = (table[name].to_pylist() for name in table.column_names)
            self._texts = dict(zip(prompts, zip(texts, messages, strict=True), strict=True))
        return self._texts[prompt]


def kept_responses(path: Path) -> Iterator[tuple[int, Kept]]:
    """(row of the table of verdicts, from 1, response) of those that are kept.

    Raises RecipeError if there is no table, IdentityMismatch if its store holds other generations by now,
    CorruptShard, StoreError.
    """
    table, meta = read_verdicts(path)
    store = open_generations(meta["store"])
    if store.identity.id != meta["identity"]:
        raise IdentityMismatch(
            f"{path} is about generations of identity {meta['identity']}, {store.uri} holds {store.identity.id}: run "
            "`stillroom generate` again"
        )
    numbers = range(1, len(table) + 1)
    keys: list[tuple[str, int]] = list(zip(table["prompt"].to_pylist(), table["sample"].to_pylist(), strict=True))
    wanted = {key: number for key, number, kept in zip(keys, numbers, table["kept"].to_pylist(), strict=True) if kept}
    units = set(pc.unique(table.filter(table["kept"])["unit"]).to_pylist())
    texts = PromptTexts(Path(meta["prompts"]).with_suffix(".texts.parquet"))
    for stored in store.units(units):
        for response in stored.responses:
            number = wanted.get((response.prompt, response.sample))
            if number is not None:
                yield number, Kept(response, meta["tokenizer"], texts)
