"""What passes between a generator and those who learn from it: a response, how it was asked for, and what it is of.

Enters: nothing. Leaves: frozen records and the identity of a store of generations. Costs: nothing.

A response is a fact of teacher, prompt, decoding and seed, so it is never changed. What somebody thinks of it (scores,
kept or dropped, and why) is not part of it: a recipe's verdicts lie in a table of their own, in the run's folder.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from stillroom.storage.errors import FormatMismatch, IdentityMismatch
from stillroom.storage.identity import canonical_json
from stillroom.storage.records import Float32, Int32, Sequence, digest128

FORMAT_VERSION = 1

#: What ended a response: the end-of-sequence token, a stop string, or the most tokens that were allowed.
Finish = Literal["eos", "stop", "length"]
FINISHES = ("eos", "stop", "length")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the teacher is asked for responses. All of it decides what it says, so all of it is part of the identity.

    method: greedy; sample; or beam. n: responses per prompt. temperature, top_p, top_k: of sampling; top_k 0 is all.
    beams, length_penalty: of beam search, which ranks by total logprob / tokens ** length_penalty.
    max_tokens, min_tokens: of a response. stop: strings that end it. seed: of sampling; None where nothing is drawn.
    """

    method: Literal["greedy", "sample", "beam"]
    max_tokens: int
    n: int = 1
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    beams: int | None = None
    length_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return asdict(self) | {"stop": list(self.stop)}

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "Decoding":
        return Decoding(**{**fields, "stop": tuple(fields["stop"])})

    def in_words(self) -> str:
        """For people, without what is as it is anyway.

        >>> Decoding(method="sample", max_tokens=64, n=2, temperature=0.8, top_p=0.95, top_k=0, seed=1).in_words()
        'sampled, n = 2, T = 0.8, top-p 0.95, seed 1, up to 64 tokens'
        """
        said = ["greedy"]
        if self.method == "sample":
            said = ["sampled", f"n = {self.n}", f"T = {self.temperature:g}"]
            said += [f"top-p {self.top_p:g}"] if self.top_p not in (None, 1.0) else []
            said += [f"top-k {self.top_k}"] if self.top_k else []
            said += [f"seed {self.seed}"]
        if self.method == "beam":
            said = [f"beam search, best {self.n} of {self.beams}", f"length penalty {self.length_penalty:g}"]
        said += [
            f"{self.min_tokens} to {self.max_tokens} tokens" if self.min_tokens else f"up to {self.max_tokens} tokens"
        ]
        said += [f"stop at {' or '.join(map(repr, self.stop))}"] if self.stop else []
        return ", ".join(said)

    def sample_seed(self, prompt: str, sample: int) -> int:
        """Of one response, below 2⁶³: a function of the prompt's digest, the sample's number and the recipe's seed
        alone. So another order, unit size or number of actors makes the same requests."""
        parts = (prompt.encode(), sample.to_bytes(4, "little"), (self.seed or 0).to_bytes(8, "little", signed=True))
        return int(digest128(b"stillroom.sample.1", *parts)[:16], 16) >> 1


@dataclass(frozen=True, eq=False)
class Generation:
    """One response. No numbers in it depend on other responses.

    prompt_ids: int32 [P], P ≥ 1, template and system prompt included. sample: its number, from 0.
    response_ids: int32 [R] as they were generated, the end-of-sequence token and a stop string's tokens included.
    logprobs: float32 [R], nats, log p(token | all before it) under the teacher at T = 1, whatever it was drawn by.
    finish: what ended it. text: of the response, without special tokens and the stop string.
    """

    prompt_ids: Int32
    sample: int
    response_ids: Int32
    logprobs: Float32
    finish: Finish
    text: str

    @cached_property
    def prompt(self) -> str:
        """The prompt's digest: that of its ids as a sequence."""
        return Sequence(self.prompt_ids).digest

    @property
    def sequence(self) -> Sequence:
        """Prompt and response end to end, as a teacher scores them and a student reads them."""
        return Sequence(np.concatenate([self.prompt_ids, self.response_ids]))

    @property
    def mean_logprob(self) -> float:
        """Nats a token; 0 for an empty response."""
        return float(np.mean(self.logprobs, dtype=np.float64)) if len(self.logprobs) else 0.0


@dataclass(frozen=True)
class GenerationIdentity:
    """What a store of generations is of. The prompts are not part of it, as a corpus is not of a store of logits: their
    ids hold system prompt and template, so other ones make other prompts of the same store.

    teacher: a name for people; not hashed. weights, config, tokenizer, vocabulary: as in `storage.identity.Identity`.
    dtype: of the forward pass. quantisation: of the weights, by their folder or by the engine; None for none.
    """

    teacher: str
    weights: str
    config: str
    tokenizer: str
    vocabulary: int
    dtype: str
    quantisation: str | None
    decoding: Decoding

    def parts(self) -> dict[str, Any]:
        """What is hashed, by name."""
        fields = asdict(self)
        del fields["teacher"]
        return fields | {"decoding": self.decoding.as_dict()}

    @cached_property
    def id(self) -> str:
        """32 hex digits over all parts."""
        return digest128(b"stillroom.generations.1", canonical_json(self.parts()))

    def to_json(self) -> str:
        stated = {"id": self.id, "format": FORMAT_VERSION, "teacher": self.teacher}
        return json.dumps(stated | self.parts(), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "GenerationIdentity":
        """Raises FormatMismatch for another format, IdentityMismatch if it is damaged, KeyError, TypeError or
        ValueError if it is none."""
        fields = json.loads(text)
        stated, version = fields.pop("id"), fields.pop("format")
        if version != FORMAT_VERSION:
            raise FormatMismatch(f"the generations are of format {version}, this release reads {FORMAT_VERSION}")
        identity = GenerationIdentity(**{**fields, "decoding": Decoding.from_dict(fields["decoding"])})
        if identity.id != stated:
            raise IdentityMismatch(f"identity file is damaged: it states id {stated}, its parts give {identity.id}")
        return identity

    def require_equal(self, other: "GenerationIdentity", where: str) -> None:
        """Raises IdentityMismatch naming each part in which `other` (what is asked for) differs from what is held."""
        held, asked = self.parts(), other.parts()
        held |= {f"decoding.{key}": value for key, value in held.pop("decoding").items()}
        asked |= {f"decoding.{key}": value for key, value in asked.pop("decoding").items()}
        differing = [f"{key}: store {held[key]}, asked {asked[key]}" for key in held if held[key] != asked[key]]
        if differing:
            raise IdentityMismatch(
                f"the generations in {where} are other ones than this recipe asks for ({'; '.join(differing)}). "
                "Restore the recipe's value, or give them a generate.path of their own."
            )
