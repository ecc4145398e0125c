"""Generations for tests: made up, and as a store takes them."""

from collections.abc import Sequence as Seq

import numpy as np

from stillroom.storage.generations.records import Decoding, Generation, GenerationIdentity
from stillroom.storage.generations.shard import write_generations
from stillroom.storage.generations.store import GenerationStore, create_generations
from stillroom.storage.records import Receipt, Sequence, ShardRef, Unit


def decoding(**over: object) -> Decoding:
    fields = {"method": "sample", "max_tokens": 8, "n": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    return Decoding(**{**fields, **over})  # type: ignore[arg-type]


def identity(**over: object) -> GenerationIdentity:
    fields = {
        "teacher": "made up", "weights": "a" * 32, "config": "b" * 32, "tokenizer": "c" * 32, "vocabulary": 320,
        "dtype": "float32", "quantisation": None, "decoding": decoding(),
    }  # fmt: skip
    return GenerationIdentity(**{**fields, **over})  # type: ignore[arg-type]


def response(prompt: list[int], sample: int = 0, ids: tuple[int, ...] = (7, 8, 2), **over: object) -> Generation:
    fields = {
        "prompt_ids": np.array(prompt, np.int32), "sample": sample, "response_ids": np.array(ids, np.int32),
        "logprobs": -np.arange(1, len(ids) + 1, dtype=np.float32) / 8, "finish": "eos", "text": f"text {ids}",
    }  # fmt: skip
    return Generation(**{**fields, **over})  # type: ignore[arg-type]


def unit_of(prompts: list[list[int]]) -> Unit:
    sequences = [Sequence(np.array(p, np.int32)) for p in prompts]
    return Unit(
        tuple(s.digest for s in sequences), tuple(len(s.input_ids) for s in sequences), tuple(0 for _ in sequences)
    )


#: What the engine of `filled` says of itself.
ENGINE = {"engine": "vllm", "vllm": "0.1", "device": "cpu"}

#: Prompts of the units of `filled`.
UNITS = ([[1, 5, 9], [1, 6]], [[1, 7, 3, 4]])


def filled(uri: str, units: Seq[list[list[int]]] = UNITS, **over: object) -> GenerationStore:
    """A store of two responses to each prompt, the second of three tokens and cut off; a shard and a commit a unit."""
    store = create_generations(uri, identity(**over))
    store.save_plan([unit_of(prompts) for prompts in units])
    for prompts in units:
        assert put(store, prompts)
    return store


def both(prompts: list[list[int]]) -> list[Generation]:
    """One of two tokens and one of three, with 3 / 8 and 6 / 8 nats against them."""
    return [
        response(prompt, sample, ids, finish=finish)
        for prompt in prompts
        for sample, ids, finish in ((0, (7, 2), "eos"), (1, (7, 8, 11), "length"))
    ]


def put(
    store: GenerationStore, prompts: list[list[int]], responses: Seq[Generation] | None = None, engine: object = None
) -> ShardRef | None:
    """Write and commit a unit as an actor and a driver do; None where it was committed before."""
    unit = unit_of(prompts)
    said = both(prompts) if responses is None else responses
    ref = write_generations(store.files, store.identity, unit, said, ENGINE | {"torch": engine})
    done = store.commit([Receipt(ref, len(prompts), sum(unit.tokens), sum(len(r.response_ids) for r in said), 1, 1.0)])
    return ref if done else None
