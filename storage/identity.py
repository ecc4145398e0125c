"""What defines the numbers in a store, hashed; and what a tokenizer is, hashed.

Enters: digests and settings. Leaves: `Identity`, whose `id` is the store's name for all that. Costs: nothing.

Provenance (library versions, device, batch shapes) is not here: it shifts numbers within the noise band and
is kept per shard.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from stillroom.storage.errors import IdentityMismatch
from stillroom.storage.records import SignalSpec, digest128


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

    teacher: a name for people; not hashed.
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

    def parts(self) -> dict[str, Any]:
        """What is hashed, by name."""
        parts = asdict(self)
        del parts["teacher"]
        return parts

    @property
    def id(self) -> str:
        """32 hex digits over all parts."""
        return digest128(b"stillroom.identity.1", canonical_json(self.parts()))

    def to_json(self) -> str:
        return json.dumps({"id": self.id, **asdict(self)}, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "Identity":
        fields = json.loads(text)
        stated = fields.pop("id")
        identity = Identity(**{**fields, "signal": SignalSpec(**fields["signal"])})
        if identity.id != stated:
            raise IdentityMismatch(f"identity file is damaged: it states id {stated}, its parts give {identity.id}")
        return identity

    def require_equal(self, other: "Identity", where: str) -> None:
        """Raise IdentityMismatch naming each part in which `other` (what is asked for) differs from this store."""
        mine, theirs = self.parts(), other.parts()
        differing = [f"{key}: store {mine[key]}, asked {theirs[key]}" for key in mine if mine[key] != theirs[key]]
        if differing:
            raise IdentityMismatch(
                f"store {where} holds other numbers than this recipe asks for ({'; '.join(differing)}). "
                "Restore the recipe's value, or give the new signal a store.path of its own."
            )


def real_vocabulary(tokenizer_json: str) -> int:
    """V: one more than the largest id that the tokenizer can produce.

    Model configs are often padded beyond it (Qwen: 152,064 against 151,669 and less); those columns carry
    untrained weights and must be cut before any softmax.
    """
    parts = json.loads(tokenizer_json)
    vocab = parts["model"]["vocab"]
    largest = max(vocab.values()) if isinstance(vocab, dict) else len(vocab) - 1
    return 1 + int(max([largest, *(token["id"] for token in parts.get("added_tokens") or [])]))
