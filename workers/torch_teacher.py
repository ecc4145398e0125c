"""Any transformers causal LM as a teacher.

Enters: a `TeacherSpec`. Leaves: `TorchTeacher`, which turns sequences into `Signal` blocks. Costs: the weights, one
batch's hidden states, and one slice of logits [S, V] (64 MiB) with two such buffers or less; see workers/sliced.py.
"""

import gc
import platform
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from stillroom.storage.codecs.sampled import position_keys
from stillroom.storage.codecs.tail import tail_lse_at
from stillroom.storage.codecs.topk import nucleus
from stillroom.storage.errors import BadLogits, RecipeError, TeacherError, first_line
from stillroom.storage.records import Float32, Sequence, Signal, SignalSpec, TopK
from stillroom.workers import batching
from stillroom.workers.digests import hidden_width, identity_parts
from stillroom.workers.draws import begin_draw
from stillroom.workers.extract import CPU_CHUNK_BYTES, begin_extract
from stillroom.workers.halving import in_halves
from stillroom.workers.head import OutputHead, output_head
from stillroom.workers.hooks import Capture, Hooks, Span, require_attended
from stillroom.workers.loading import input_device, load, versions
from stillroom.workers.sliced import FEWEST_ROWS, SlicedModel
from stillroom.workers.source import cache_folder, load_tokenizer
from stillroom.workers.teacher import Scored, TeacherSpec
from stillroom.workers.transfer import to_device, to_host

SLICE_BYTES = 64 << 20


class TorchTeacher:
    """A `Teacher` (see workers/teacher.py). Raises TeacherError where the model cannot be one."""

    def __init__(self, spec: TeacherSpec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.spec = spec
        self.device = _device(spec.device)
        tokenizer = load_tokenizer(spec.folder, trust_remote_code=spec.trust_remote_code)
        self._parts = identity_parts(
            spec.folder, tokenizer.backend_tokenizer.to_str(), dtype=spec.dtype, quantisation=spec.quantisation,
            cache_dir=cache_folder(),
        )  # fmt: skip
        self._vocabulary = int(self._parts["vocabulary"])
        model = load(spec, self.device)
        self.device = input_device(model, self.device) if spec.split else self.device
        config = model.config.get_text_config()
        self._positions: int | None = getattr(config, "max_position_embeddings", None)
        self._border = _longrope_border(config)
        self._attention = str(config._attn_implementation)
        self._slice = spec.slice_positions or max(64, SLICE_BYTES // (4 * config.vocab_size))
        self._halved: dict[tuple[str, ...], list[list[int]]] = {}
        """The passes of units whose planned ones did not fit in memory, by the digests of their sequences."""
        self._model: SlicedModel | None = SlicedModel(model, device=self.device, vocabulary=self._vocabulary)
        if spec.compile:
            torch.compiler.reset()  # models of one class share a limit of 8 graphs, past which they silently stay eager
            self._model.body.compile(dynamic=True)
        self._layers = int(config.num_hidden_layers)
        self._hooks: dict[bool, Hooks] = {}

    @property
    def vocabulary(self) -> int:
        """V, the real one: one more than the largest id of the tokenizer."""
        return self._vocabulary

    @property
    def hidden_width(self) -> int:
        """D, the width of the final hidden state."""
        return hidden_width(self.spec.folder)

    def output_head(self) -> OutputHead:
        """What turns final hidden states into logits. Raises TeacherError where there is no such formula."""
        if self._model is None:
            raise TeacherError(f"teacher {self.spec.folder} was released; load it anew")
        return output_head(self._model)

    def identity_parts(self) -> dict[str, Any]:
        """All fields of an `Identity` but `teacher` and `signal`."""
        return dict(self._parts)

    def batches(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """The forward passes that `score` makes, as indices into `sequences`."""
        lengths = [len(s.input_ids) for s in sequences]
        return batching.batches(lengths, self.spec.batch_tokens, border=self._border)

    def score(self, sequences: Seq[Sequence], *, signal: SignalSpec) -> list[Signal]:
        """One block of R rows for each sequence, in the order given.

        Row r is of the model's `.logits[:, first_position + r]`, with the sequence alone in its context.
        Raises TeacherError (k or a length or an id out of range), BadLogits (with the sequence's digest).
        """
        return self.score_with_truth(sequences, signal=signal, positions={}).signals

    def score_with_truth(
        self, sequences: Seq[Sequence], *, signal: SignalSpec, positions: Mapping[str, Seq[int]]
    ) -> Scored:
        """As `score`, and in the same passes the whole vocabulary's logits at some positions, by sequence digest."""
        self._check(sequences, signal)
        signals: dict[int, Signal] = {}
        truth: dict[str, Float32] = {}

        def score(group: Seq[int]) -> Scored:
            return self._score_batch([sequences[i] for i in group], signal, positions)

        unit = tuple(s.digest for s in sequences)
        self._halved.pop(unit, None)  # of an earlier time, with less room
        planned = self.batches(sequences)
        ran = [part for group in planned for part in in_halves(group, score, alone=self.spec.ranks == 1)]
        for group, found in ran:
            signals.update(zip(group, found.signals, strict=True))
            truth |= found.truth
        if len(ran) > len(planned):
            self._halved[unit] = [list(group) for group, _ in ran]
        return Scored([signals[i] for i in range(len(sequences))], truth)

    def provenance(self, sequences: Seq[Sequence]) -> dict[str, Any]:
        """Versions, device, settings and this unit's batch shapes: no times, hosts or paths."""
        lengths = [len(s.input_ids) for s in sequences]
        groups = self._halved.get(tuple(s.digest for s in sequences), self.batches(sequences))
        return {
            "engine": "torch",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": _device_name(self.device),
            "dtype": self.spec.dtype,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "attention": self._attention,
            "compile": self.spec.compile,
            "threads": torch.get_num_threads(),
            "slice_positions": self._slice,
            "batch_shapes": [list(shape) for shape in batching.shapes(lengths, groups)],
            **versions(self.spec),
        }

    def attend_in_full(self) -> None:
        """As `attention` eager from here on, so that maps can be had of a teacher that runs another: rows shift within
        the noise band. Raises TeacherError where transformers cannot switch this architecture."""
        if self._model is None:
            raise TeacherError(f"teacher {self.spec.folder} was released; load it anew")
        model = self._model.model
        try:
            model.set_attn_implementation("eager")
        except (ValueError, ImportError) as error:
            raise TeacherError(f"attention of {self.spec.folder} cannot be made eager: {first_line(error)}") from error
        self._attention = str(model.config.get_text_config()._attn_implementation)

    def release(self) -> None:
        """Free the weights. The teacher is of no use afterwards."""
        self._model = None
        self._hooks = {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _score_batch(self, sequences: Seq[Sequence], signal: SignalSpec, positions: Mapping[str, Seq[int]]) -> Scored:
        if self._model is None:
            raise TeacherError(f"teacher {self.spec.folder} was released; load it anew to score more")
        ids_BT, mask_BT = _pad([s.input_ids for s in sequences])
        width = ids_BT.shape[1]
        rows = [range(i * width + s.first_position, i * width + len(s.input_ids)) for i, s in enumerate(sequences)]
        rows_N = np.concatenate([np.arange(r.start, r.stop) for r in rows])

        def name(start: int, row: int) -> str:
            i, t = divmod(int(rows_N[start + row]), width)
            return f"position {t} of sequence {sequences[i].digest}"

        keys_N = np.concatenate(
            [position_keys(s.digest, np.arange(s.first_position, len(s.input_ids))) for s in sequences]
        )
        wanted = [positions.get(s.digest, ()) for s in sequences]
        full_M = np.flatnonzero(np.isin(rows_N, [i * width + t for i, ts in enumerate(wanted) for t in ts]))
        spans = [Span(i, s.first_position, len(s.input_ids)) for i, s in enumerate(sequences)]
        capture = Capture(signal.layers, signal.attention, spans, width)
        with ExitStack() as stack:
            if signal.layers or signal.attention:
                stack.enter_context(capture.of(self._listening(self._model, maps=signal.attention is not None)))
            hidden_BTD = self._model.hidden(ids_BT, mask_BT)
        hidden_ND = hidden_BTD.flatten(0, 1)[to_device(torch.from_numpy(rows_N), hidden_BTD.device)]
        slices, full = [], []
        # All slices are queued, with the copies of what they give; only then is the first of them waited for.
        for start in range(0, len(hidden_ND), self._slice):
            part = slice(start, start + self._slice)
            logits_SV = self._model.logits(hidden_ND[part]) if signal.topk or signal.sampled or len(full_M) else None
            slices.append(self._begin(hidden_ND[part], logits_SV, signal, keys_N[part], partial(name, start)))
            inside = full_M[(full_M >= start) & (full_M < part.stop)] - start
            if logits_SV is not None and len(inside):
                inside_M = to_device(torch.from_numpy(inside), logits_SV.device)
                full.append(to_host(logits_SV[inside_M, : self._vocabulary]))
        layers_NnD = capture.layers(hidden_BTD, partial(name, 0))
        attention = capture.attention(partial(name, 0))
        blocks = [end() for end in slices]
        scored = replace(Signal.concatenate(blocks), layers=layers_NnD, attention=attention)
        ends = list(accumulate(len(r) for r in rows))
        borders = np.cumsum([0, *map(len, wanted)])
        full_MV = torch.cat([torch.empty(0, self._vocabulary), *(part.wait().float() for part in full)]).numpy()
        return Scored(
            [scored[end - len(r) : end] for r, end in zip(rows, ends, strict=True)],
            {s.digest: full_MV[borders[i] : borders[i + 1]] for i, s in enumerate(sequences) if len(wanted[i])},
        )

    def _listening(self, model: SlicedModel, *, maps: bool) -> Hooks:
        """Made when first asked for: it costs two passes, and few signals need them."""
        if self.spec.compile:
            raise TeacherError(
                "teacher.compile with signal.layers or signal.attention: hooks in a compiled pass are not supported; "
                "set it to false"
            )
        if maps and self.spec.split == "tensors":
            raise TeacherError(
                "signal.attention with teacher.split tensors: each rank computes the maps of its own heads only; use "
                "teacher.split layers"
            )
        if maps and self._attention != "eager":
            raise TeacherError(
                f"signal.attention needs attention that is computed in full, the teacher runs {self._attention}: set "
                "teacher.attention to eager"
            )
        if maps not in self._hooks:
            self._hooks[maps] = Hooks(
                model.body, layers=self._layers, vocabulary=self._vocabulary, device=self.device, maps=maps
            )
        return self._hooks[maps]

    def _begin(
        self,
        hidden_SD: Tensor,
        logits_SV: Tensor | None,
        signal: SignalSpec,
        keys_S: NDArray[np.uint64],
        name_row: Callable[[int], str],
    ) -> Callable[[], Signal]:
        """The signal of S positions from their final hidden states and, where it needs them, their logits.

        What is returned waits for it, and raises BadLogits.
        """
        topk = sampled = hidden = None
        chunk_bytes = CPU_CHUNK_BYTES if self.device.type == "cpu" else SLICE_BYTES
        if signal.topk:
            assert logits_SV is not None
            topk = begin_extract(
                logits_SV, k=signal.topk.k, vocabulary=self._vocabulary, chunk_bytes=chunk_bytes, name_row=name_row
            )
        if signal.sampled:
            assert logits_SV is not None
            sampled = begin_draw(
                logits_SV[:, : self._vocabulary],
                keys_S,
                draws=signal.sampled.draws,
                chunk_bytes=chunk_bytes,
                name_row=name_row,
            )
        if signal.hidden:
            hidden = to_host(hidden_SD)

        def end() -> Signal:
            return Signal(
                None if topk is None else self._cut(topk(), signal),
                None if sampled is None else sampled(),
                None if hidden is None else _finite(hidden.wait().float().numpy(), name_row),
            )

        return end

    def _cut(self, topk: TopK, signal: SignalSpec) -> TopK:
        """What of the k largest is kept."""
        assert signal.topk is not None
        if signal.topk.nucleus is None:
            return topk
        mass, temperature = signal.topk.nucleus.mass, signal.topk.nucleus.temperature
        tail = tail_lse_at(topk.tail_lse, 1 / temperature, self._vocabulary - signal.topk.k)
        return nucleus(topk, mass, temperature, tail)

    def _check(self, sequences: Seq[Sequence], signal: SignalSpec) -> None:
        k = signal.topk.k if signal.topk else 1
        if not 1 <= k < self._vocabulary:
            raise TeacherError(
                f"signal.topk.k is {k}, expected 1 to {self._vocabulary - 1} (the teacher's vocabulary less one)"
            )
        for s in sequences:
            if signal.attention is not None:
                require_attended(signal.attention, s)
            if self._positions is not None and len(s.input_ids) > self._positions:
                raise TeacherError(
                    f"sequence {s.digest} has {len(s.input_ids):,} tokens, the teacher's positions end at "
                    f"{self._positions:,}; set corpus.window to at most that"
                )
            lowest, highest = int(s.input_ids.min()), int(s.input_ids.max())
            if lowest < 0 or highest >= self._vocabulary:
                raise TeacherError(
                    f"sequence {s.digest} has ids {lowest}..{highest}, the teacher's vocabulary is "
                    f"0..{self._vocabulary - 1}; the corpus was tokenised with another tokenizer, prepare it anew"
                )


def _finite(hidden_SD: Float32, name_row: Callable[[int], str]) -> Float32:
    bad = np.flatnonzero(~np.isfinite(hidden_SD).all(axis=1))
    if len(bad):
        raise BadLogits(
            f"NaN or infinite hidden states at {len(bad)} of {len(hidden_SD)} positions, "
            f"the first is {name_row(int(bad[0]))}"
        )
    return hidden_SD


def _longrope_border(config: Any) -> int | None:
    """The length beyond which a model with LongRoPE turns by other frequencies; None without it.

    The other kinds that depend on the length ("dynamic") change beyond max_position_embeddings only.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set for the model, or one per kind of layer.
    for rope in [parameters] if "rope_type" in parameters else parameters.values():
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(
            f"teacher.device is {name}, but torch {torch.__version__} sees no GPU here; set it to cpu or auto"
        )
    return torch.device(name)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _pad(sequences: Seq[np.ndarray[Any, Any]]) -> tuple[Tensor, Tensor | None]:
    """ids int64 [B, T] and their mask, None where nothing is padded. Right padding with id 0, to B·T ≥ FEWEST_ROWS."""
    lengths_B = torch.tensor([len(ids) for ids in sequences])
    ids_BT = nn.utils.rnn.pad_sequence([torch.from_numpy(ids.astype(np.int64)) for ids in sequences], batch_first=True)
    ids_BT = nn.functional.pad(ids_BT, (0, max(0, -(-FEWEST_ROWS // len(sequences)) - ids_BT.shape[1])))
    if int(lengths_B.min()) == ids_BT.shape[1]:
        return ids_BT, None
    return ids_BT, (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
