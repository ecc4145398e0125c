"""Text to token ids and loss masks, in batches.

Enters: rendered documents and a fast tokenizer. Leaves: int32 ids and a bool mask for each. Costs: the tokenizer, and
offsets only for documents of which a part is learned.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillroom.pipeline.corpus.config import CorpusConfig
from stillroom.pipeline.corpus.render import Message, Rendered, Span, Template
from stillroom.storage.errors import RecipeError
from stillroom.storage.identity import canonical_json, real_vocabulary, tokenizer_digest
from stillroom.storage.records import Int32, digest128


@dataclass(frozen=True)
class Encoded:
    """input_ids: int32 [T]. mask: bool [T], True where the token is learned. T may be 0."""

    input_ids: Int32
    mask: NDArray[np.bool_]


class Encoder:
    """A tokenizer and what of it decides the ids.

    digest: `tokenizer_digest`. template_digest: of the chat template and its options, or None. vocabulary: V.
    fingerprint: digest of everything that ids and renderings depend on, the special tokens' placement included.

    Raises RecipeError for a tokenizer that cannot be used.
    """

    def __init__(self, config: CorpusConfig, tokenizer: Any) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise RecipeError(f"tokenizer {name} is a slow one, which knows no offsets: use one with a tokenizer.json")
        if config.append_eos and tokenizer.eos_token_id is None:
            raise RecipeError(f"tokenizer {name} has no end-of-sequence token: set `append_eos: false` in the corpus")
        serialised = tokenizer.backend_tokenizer.to_str()
        self._tokenizer = tokenizer
        self._options = config.chat_template_options
        self._eos = tokenizer.eos_token_id
        self._added = tokenizer.num_special_tokens_to_add()
        self.digest = tokenizer_digest(serialised)
        self.vocabulary = real_vocabulary(serialised)
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        self.template: Template | None = self._render if template else None
        self.template_digest = digest128(template.encode(), canonical_json(self._options)) if template else None
        self.fingerprint = _fingerprint(serialised, tokenizer, self.template_digest)

    def _render(self, messages: list[Message], opened: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, **self._options)
        )

    def text(self, input_ids: Int32) -> str:
        return str(self._tokenizer.decode(input_ids.tolist(), skip_special_tokens=True))

    def encode(self, documents: Sequence[Rendered]) -> list[Encoded]:
        """In the order given; one call of the tokenizer for each way of calling it."""
        encoded = [None if d.ids is None else _known(d.ids, d.unlearned) for d in documents]
        for special in (True, False):
            for whole in (True, False):
                chosen = [
                    i
                    for i, d in enumerate(documents)
                    if d.ids is None and d.special == special and (d.spans is None) == whole
                ]
                if chosen:
                    found = self._call([documents[i] for i in chosen], special=special, offsets=not whole)
                    for i, one in zip(chosen, found, strict=True):
                        encoded[i] = one
        return [one for one in encoded if one is not None]

    def _call(self, documents: list[Rendered], *, special: bool, offsets: bool) -> list[Encoded]:
        batch = self._tokenizer(
            [document.text for document in documents], add_special_tokens=special, return_offsets_mapping=offsets,
            padding=False, truncation=False, return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        found = []
        for i, document in enumerate(documents):
            ids = np.array(batch["input_ids"][i], dtype=np.int32)
            mask = np.ones(len(ids), dtype=np.bool_)
            if document.spans is not None:
                at = np.array(batch["offset_mapping"][i], dtype=np.int64).reshape(-1, 2)
                mask = mask_from_spans(at, document.spans)
            found.append(self._ended(document, ids, mask))
        return found

    def _ended(self, document: Rendered, ids: Int32, mask: NDArray[np.bool_]) -> Encoded:
        if not document.text or len(ids) <= (self._added if document.special else 0):
            return Encoded(ids[:0], mask[:0])
        if not document.eos:
            return Encoded(ids, mask)
        if ids[-1] == self._eos:  # by the tokenizer or the text itself: it ends the response, and is learned
            mask[-1] = True
            return Encoded(ids, mask)
        return Encoded(np.append(ids, np.int32(self._eos)), np.append(mask, True))


def _known(ids: Int32, unlearned: int) -> Encoded:
    return Encoded(ids, np.arange(len(ids)) >= unlearned)


def mask_from_spans(offsets: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """bool [T]: the tokens that hold at least one character of a span.

    offsets: int64 [T, 2], first and past-last character of each token. A token that straddles the border of a
    prompt and a response is learned with the response. Some tokenizers trim blanks from offsets, which leaves
    tokens of blanks alone with none: those are taken to reach back to the end of the token before.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    before = np.maximum.accumulate(np.concatenate([np.zeros(1, np.int64), ends]))[: len(ends)]
    starts = np.where(starts == ends, np.minimum(starts, before), starts)
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for first, last in spans:
        if first < last:
            mask |= (starts < last) & (ends > first) & (starts < ends)
    return mask


def _fingerprint(serialised: str, tokenizer: Any, template_digest: str | None) -> str:
    parts = {**json.loads(serialised), "truncation": None, "padding": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest128(canonical_json(parts), canonical_json(special), (template_digest or "").encode())
