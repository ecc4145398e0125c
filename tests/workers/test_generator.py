"""How a generator is loaded, as it goes to another process."""

import json
from pathlib import Path

import pytest

from stillroom.storage.generations.records import Decoding
from stillroom.workers.generator import GeneratorSpec

GREEDY = Decoding(method="greedy", max_tokens=8)
DRAWN = Decoding(method="sample", max_tokens=8, n=3, temperature=0.7, top_p=0.9, top_k=5, stop=("\n", "é"), seed=2**40)


@pytest.mark.parametrize(
    "spec",
    [
        GeneratorSpec(folder=Path("teacher"), decoding=GREEDY),
        GeneratorSpec(folder=Path("/a b/ü"), decoding=DRAWN, quantization="fp8", threads=2, max_model_len=64),
    ],
    ids=["defaults", "all"],
)
def test_as_json_it_is_the_same(spec: GeneratorSpec) -> None:
    assert GeneratorSpec.from_json(spec.to_json()) == spec
    assert json.loads(spec.to_json())["folder"] == str(spec.folder)
