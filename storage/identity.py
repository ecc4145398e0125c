"""What defines the numbers in a store, hashed; and what a tokenizer is, hashed.

Enters: digests and settings. Leaves: `Identity`, whose `id` is the store's name for all that. Costs: nothing.

Provenance (library versions, device, batch shapes) is not here: it shifts numbers within the noise band and
is kept per shard.
"""

import json
from dataclasses import dataclass
from typing import Any

from stillroom.storage.errors import FormatMismatch, IdentityMismatch
from stillroom.storage.records import SignalSpec, digest128

#: Of the files that this release writes in new stores. Format 1 knew the plain top-k tier alone; its stores are read,
#: and grow in their own format. A store with layers or attention maps is of format 3, and no other is: releases that
#: do not know these parts say so, and read all other stores.
FORMAT_VERSION = 2
LAYERS_FORMAT = 3
READABLE_FORMATS = (1, 2, 3)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def tokenizer_digest(tokenizer_json: str) -> str:
    """Digest of what decides which ids a text becomes and what an id means.

    tokenizer_json: the fast tokenizer's own serialisation (`tokenizer.json`). Truncation, padding and the
    post-processor are left out: they do not change an id's meaning, and training code sets them freely.
    """
    parts = json.loads(tokenizer_json)
    kept = {key: parts.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return digest128(b"stillroom.tokenizer.1", canonical_json(kept))


@dataclass(frozen=True)
class Identity:
    """The parts of a store's identity.

    teacher: a name for people; not hashed. format: of the store's files; not hashed, and kept for the store's life.
    weights: digest of the teacher's weight files. config: digest of its architecture.
    tokenizer: `tokenizer_digest`. vocabulary: V, the real one, padded columns of the head left out.
    dtype: of the forward pass. quantisation: of the weights, or None. signal: what is kept.
    """

    teacher: str
    weights: str
    config: str
    tokenizer: str
    vocabulary: int
    dtype: str
    quantisation: str | None
    signal: SignalSpec
    format: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.signal.layers or self.signal.attention:
            object.__setattr__(self, "format", LAYERS_FORMAT)
        elif self.format == LAYERS_FORMAT:  # they were dropped by a transcoding
            object.__setattr__(self, "format", FORMAT_VERSION)

    def parts(self) -> dict[str, Any]:
        """What is hashed, by name."""
        names = ("weights", "config", "tokenizer", "vocabulary", "dtype", "quantisation")
        return {name: getattr(self, name) for name in names} | {"signal": self._signal()}

    def _signal(self) -> dict[str, Any]:
        """Format 1 knew one tier: its k and gap_step stood for themselves."""
        fields = self.signal.as_dict()
        return {key: fields["topk"][key] for key in ("k", "gap_step")} if self.format == 1 else fields

    @property
    def id(self) -> str:
        """32 hex digits over all parts."""
        return digest128(b"stillroom.identity.1", canonical_json(self.parts()))

    def to_json(self) -> str:
        stated = {"id": self.id, "format": self.format, "teacher": self.teacher, "teacher_digest": _named(self.teacher)}
        return json.dumps(stated | self.parts(), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "Identity":
        """Raises FormatMismatch for a format that this release does not read, IdentityMismatch if it is damaged,
        KeyError, TypeError or ValueError if it is no identity, or one of numbers that no teacher has."""
        try:
            fields = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deep") from None
        stated = fields.pop("id")
        # The id does not cover a name. Stores of before have no digest of it.
        if (named := fields.pop("teacher_digest", None)) is not None and named != _named(fields["teacher"]):
            raise IdentityMismatch(f"identity file is damaged: teacher {fields['teacher']!r} is not what was written")
        version = fields.setdefault("format", 1)  # which did not state it
        if version not in READABLE_FORMATS:
            raise FormatMismatch(f"the store is of format {version}, this release reads {READABLE_FORMATS}")
        signal = {"topk": fields["signal"]} if version == 1 else fields["signal"]
        identity = Identity(**{**fields, "signal": SignalSpec.from_dict(signal)})
        if identity.format != version:
            raise IdentityMismatch(f"identity file is damaged: format {version} does not have such a signal")
        # Format 1 hashes k and gap_step alone: anything else beside them would not change its id.
        if identity.id != stated or identity.parts()["signal"] != fields["signal"]:
            raise IdentityMismatch(f"identity file is damaged: it states id {stated}, its parts give {identity.id}")
        _require_possible(identity)
        return identity

    def require_equal(self, other: "Identity", where: str) -> None:
        """Raise IdentityMismatch naming each part in which `other` (what is asked for) differs from this store."""
        mine, theirs = (i.parts() | {"signal": i.signal} for i in (self, other))  # in no format's words
        words: dict[str, tuple[Any, Any]] = {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}
        if "signal" in words:
            words["signal"] = self.signal.in_words(), other.signal.in_words()
            if len(set(words["signal"])) == 1:  # words leave out what is seldom asked for
                words["signal"] = self.signal.as_dict(), other.signal.as_dict()
        differing = [f"{key}: store {held}, asked {asked}" for key, (held, asked) in words.items()]
        if differing:
            raise IdentityMismatch(
                f"store {where} holds other numbers than this recipe asks for ({'; '.join(differing)}). "
                "Restore the recipe's value, or give the new signal a store.path of its own."
            )


def _named(teacher: Any) -> str:
    return digest128(b"stillroom.teacher.1", str(teacher).encode())


def _require_possible(identity: Identity) -> None:
    """Raises ValueError for types and sizes that cannot be: everything that is read is measured by them."""
    topk, sampled, hidden = identity.signal.topk, identity.signal.sampled, identity.signal.hidden
    layers, attention = identity.signal.layers, identity.signal.attention
    words = (identity.teacher, identity.weights, identity.config, identity.tokenizer, identity.dtype)
    if not all(isinstance(word, str) for word in words):
        raise ValueError("a name or digest of its is no text")
    _require_number("vocabulary", identity.vocabulary, 2, 2**31 - 1)  # ids are int32
    if topk:
        _require_number("k", topk.k, 1, identity.vocabulary - 1)
        if topk.layout not in ("plain", "packed"):
            raise ValueError(f"layout is {topk.layout!r}, expected plain or packed")
        given = [topk.gap_step] if topk.gap_step is not None else []
        given += [topk.nucleus.mass, topk.nucleus.temperature] if topk.nucleus else []
        if not all(isinstance(x, int | float) and 0 < x < 1e6 for x in given):
            raise ValueError(f"its gap_step or nucleus is none: {given}")
    if sampled:
        _require_number("draws", sampled.draws, 1, 2**15 - 1)  # counts are int16
    if hidden:
        _require_number("width", hidden.width, 1, 2**20)
    if layers:
        _require_number("width", layers.width, 1, 2**20)
    if attention:
        _require_number("max_tokens", attention.max_tokens, 1, 2**20)
        _require_number("head_count", attention.rows, 1, 2**16)
    for part in (layers, attention):
        for layer in part.layers if part else ():
            _require_number("layer", layer, 0, 2**16)


def _require_number(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected {least} … {most:,}")


def real_vocabulary(tokenizer_json: str) -> int:
    """V: one more than the largest id that the tokenizer can produce.

    Model configs are often padded beyond it (Qwen: 152,064 against 151,669 and less); those columns carry
    untrained weights and must be cut before any softmax.
    """
    parts = json.loads(tokenizer_json)
    vocab = parts["model"]["vocab"]
    largest = max(vocab.values()) if isinstance(vocab, dict) else len(vocab) - 1
    return 1 + int(max([largest, *(token["id"] for token in parts.get("added_tokens") or [])]))
