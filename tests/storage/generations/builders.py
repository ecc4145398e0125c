"""Generations for tests: made up, and as a store takes them."""

import numpy as np

from stillroom.storage.generations.records import Decoding, Generation, GenerationIdentity
from stillroom.storage.records import Sequence, Unit


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
