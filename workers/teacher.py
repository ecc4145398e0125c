"""What a teacher is, whatever runs it.

Enters: a `TeacherSpec`, picklable and free of torch. Leaves: the `Teacher` protocol that actors and drivers speak.
Costs: nothing; importing this module loads no framework.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from stillroom.storage.records import Float32, Sequence, Signal, SignalSpec

Dtype = Literal["float32", "bfloat16", "float16"]
Quantisation = Literal["int8", "int4", "fp8"]
Split = Literal["layers", "tensors"]


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """How a teacher is loaded and run."""

    folder: Path
    """Folder with config.json, safetensors and tokenizer.json: what `source.resolve_model` returns."""

    dtype: Dtype = "float32"
    """Of the forward pass. Part of the identity. A CPU without bf16 instructions is faster in float32."""

    quantisation: Quantisation | None = None
    """Weights of 8 or 4 bits, made by torchao when the model is loaded; None as they lie in the folder. Part of the
    identity."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1" …; "auto" is cuda where there is one. In a Ray actor "cuda" is the GPU it was given."""

    attention: str | None = None
    """Transformers' `attn_implementation`: "sdpa", "eager", "flash_attention_2" …; None is its choice for the model."""

    batch_tokens: int = 4096
    """Padded tokens per forward pass. Part of what fixes the batch shapes, hence the last bits of the rows."""

    slice_positions: int | None = None
    """Positions whose logits are in memory at once; None is what fits in 64 MiB of float32 [·, V], at least 64."""

    threads: int | None = None
    """CPU threads of the process; None leaves torch's choice. Changes no bit of the rows (heads of 16 channels up)."""

    trust_remote_code: bool = False
    """Whether code that lies in the model's folder may run."""

    compile: bool = False
    """torch.compile for the model's body. Pays on a GPU with long runs; shifts rows within the noise band."""

    split: Split | None = None
    """How one copy of the model is spread. layers: over the GPUs of one process; tensors: over `ranks` processes; None:
    it is on one device. Shifts rows within the noise band."""

    ranks: int = 1
    """Processes that are one teacher, for split "tensors"."""


@dataclass(frozen=True)
class Scored:
    """What a pass over some sequences gave.

    signals: one block per sequence, in the order given. truth: by sequence digest, float32 [n, V] raw logits of the
    whole vocabulary at the positions asked for, in rising order.
    """

    signals: list[Signal]
    truth: dict[str, Float32]


@dataclass(frozen=True)
class TruthRequest:
    """Positions of a unit whose logits are kept in full. positions: rising, by sequence digest. alone: sequences
    among them that are scored once more in a batch of one, for the noise band."""

    positions: Mapping[str, Seq[int]] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()


class Teacher(Protocol):
    """Scores sequences in isolation. Not thread-safe; one per process."""

    @property
    def vocabulary(self) -> int:
        """V, the real one."""

    def identity_parts(self) -> dict[str, Any]:
        """The fields of `storage.identity.Identity` that the teacher knows: all but `teacher` and `signal`."""

    def batches(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """The forward passes that `score` makes of a unit, as indices into it."""

    def score(self, sequences: Seq[Sequence], *, signal: SignalSpec) -> list[Signal]:
        """One block of R rows per sequence, in the order given: positions first_position … T − 1.

        signal: what is kept. Logits and hidden states are exact; rounding them is the codec's.

        Raises TeacherError for a sequence beyond the model's positions, BadLogits naming the sequences.
        """

    def score_with_truth(
        self, sequences: Seq[Sequence], *, signal: SignalSpec, positions: Mapping[str, Seq[int]]
    ) -> Scored:
        """As `score`, and in the same passes the whole vocabulary's logits at some positions, by sequence digest.

        positions: rising, within first_position … T − 1.
        """

    def provenance(self, sequences: Seq[Sequence]) -> dict[str, Any]:
        """What may shift the rows of this unit within the noise band. Equal runs give equal dicts."""

    def release(self) -> None:
        """Free the device's memory. The teacher is of no use afterwards."""
