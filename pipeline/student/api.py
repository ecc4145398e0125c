"""The loss and the data of a student, for a training loop of one's own: plain PyTorch, Hugging Face's Trainer, others.

Enters: a corpus manifest and a snapshot (`stillroom` leaves them in a run's folder: `corpus.parquet` and
`students/<name>/snapshot.parquet`) and the fields of a recipe's `losses`. Leaves: a dataset of packs, batches as
dictionaries of tensors, the loss. Costs: what they cost in `stillroom train`; no teacher, no commit log.

    distillation = Distillation(manifest, snapshot, losses={"alpha": 0.7, "temperature": 2.0})
    loader = DataLoader(distillation.packs(seed=0), batch_size=4, collate_fn=distillation.collate)
    for batch in loader:
        distillation.loss(model, batch).backward()

Two whole examples are in deploy/examples, each run by a test.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from stillroom.pipeline.student.collate import Batch, collate
from stillroom.pipeline.student.config import LossConfig, require_determined
from stillroom.pipeline.student.forward import hidden_at, logits_at, model_inputs, student_head
from stillroom.pipeline.student.losses import LossSums, Objective, StudentHead, Targets
from stillroom.pipeline.student.teaching import Teaching, distillation_loss, distillation_loss_fused
from stillroom.storage.errors import RecipeError
from stillroom.storage.manifest import Manifest
from stillroom.storage.records import Pack
from stillroom.storage.snapshot import Snapshot
from stillroom.storage.stream import Stream

#: In a batch, before the name of a tensor of `Targets`.
TARGET = "target_"
#: What the loss ignores, in `labels`.
IGNORED = -100


class Packs(IterableDataset[Pack]):
    """Packs of a snapshot in the order of `stillroom train`, decoded in a thread; a `torch` dataset without a length.

    rank, world_size: this process takes every world_size-th pack. Where a loader has worker processes they share those
    of the rank; one thread decodes faster than most students train, so none are needed.
    """

    def __init__(self, stream: dict[str, Any], *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self._stream, self._rank, self._world_size = stream, rank, world_size

    def __iter__(self) -> Iterator[Pack]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        stream = Stream(
            **self._stream, rank=self._rank * workers + number, world_size=self._world_size * workers
        )  # fmt: skip
        with closing(cast(Any, iter(stream))) as packs:  # ends the thread where the loop is left early
            yield from packs


class Distillation:
    """One way to learn from a snapshot: a part of the store, output losses, temperature and alpha.

    manifest, snapshot: their paths. losses: as in a recipe, a mapping or a `LossConfig`; its numbers are fixed here, as
    the step of another trainer is not known: for a schedule make one of these per phase. window: tokens of a pack; the
    manifest's if left out. packing: several sequences per window, kept apart by their position ids; false: one a row.
    device: of the teacher's output head, where hidden states teach.

    Raises RecipeError for fields that are none, UnsupportedSignal where the store does not hold what they need,
    StoreError, CorruptShard.
    """

    def __init__(
        self,
        manifest: str | Path,
        snapshot: str | Path,
        *,
        losses: LossConfig | Mapping[str, Any] | None = None,
        window: int | None = None,
        packing: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        self.manifest, self.snapshot = Manifest.open(Path(manifest)), Snapshot.read(Path(snapshot))
        self.losses = _losses(losses)
        self.window = self.manifest.meta.window if window is None else window
        self.packing, self.vocabulary = packing, self.snapshot.identity.vocabulary
        self.teaching = Teaching.of(self.losses.signal, self.snapshot, torch.device(device))
        self.objective = Objective.of(self.losses)
        require_determined(self.losses, self.teaching.part)
        self._found: tuple[Any, StudentHead | str] | None = None

    def packs(
        self,
        *,
        heldout: bool = False,
        seed: int = 0,
        epochs: int | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Packs:
        """The training split (or the held-out one), endlessly or for so many epochs; start: packs consumed already."""
        stream = {
            "manifest": self.manifest, "snapshot": self.snapshot, "heldout": heldout, "window": self.window,
            "seed": seed, "pack": self.packing, "start": start, "epochs": epochs, "parts": self.teaching.reads,
        }  # fmt: skip
        return Packs(stream, rank=rank, world_size=world_size)

    def collate(self, packs: Sequence[Pack]) -> dict[str, Tensor]:
        """A batch of B packs with M trained positions: tensors only, so that any trainer can move them.

        input_ids [B, T], with position_ids [B, T] where packing is on, else attention_mask [B, T]: for the model.
        labels: int64 [B, T], the id at a place where it is learned, −100 elsewhere: what Hugging Face counts.
        keep: bool [B, T], the M positions from which those are predicted; target_…: `losses.Targets` there.
        """
        batch = collate(
            packs, packing=self.packing, temperature=self.objective.temperature, vocabulary=self.vocabulary
        )  # fmt: skip
        labels_BT = torch.full_like(batch.input_ids, IGNORED)
        labels_BT[:, 1:] = torch.where(batch.keep[:, :-1], batch.input_ids[:, 1:], IGNORED)
        found = {"input_ids": batch.input_ids, "labels": labels_BT, "keep": batch.keep}
        for name in ("position_ids", "attention_mask"):
            if (value := getattr(batch, name)) is not None:
                found[name] = value
        for field in fields(Targets):
            if (value := getattr(batch.targets, field.name)) is not None:
                found[TARGET + field.name] = value
        return found

    def loss(self, model: Any, batch: Mapping[str, Tensor], *, positions: Tensor | float | None = None) -> Tensor:
        """Mean loss of the batch, a scalar with a gradient; see `sums`.

        positions: what the sum is divided by, in place of the batch's own weight. With gradient accumulation give the
        number of all batches of the step, so that positions count alike whichever batch they are in.
        """
        if positions is None:
            weight = batch[TARGET + "weights"].sum()
            positions = torch.where(weight > 0, weight, 1.0)  # nothing to learn: a loss of 0
        return self.sums(model, batch).total / positions

    def sums(self, model: Any, batch: Mapping[str, Tensor]) -> LossSums:
        """Sums of weight · loss over the batch's positions: in all, of distillation, and of the text.

        model: a transformers causal LM, or one that is wrapped (DDP). Where the model's own head is
        known as a formula, head and loss are one, and the logits of the batch never exist at once; a wrapped model is
        called as a whole, and its logits at the trained positions are taken.
        """
        whole = _batch(batch)
        settings: dict[str, Any] = {
            "objective": self.objective, "vocabulary": self.vocabulary, "teaching": self.teaching,
        }  # fmt: skip
        if not hasattr(model, "get_output_embeddings"):
            logits_MV = model(**model_inputs(whole)).logits[whole.keep]
            return distillation_loss(logits_MV, whole.targets, **settings)
        head = self._head(model)
        if head is None:
            return distillation_loss(logits_at(model, whole), whole.targets, **settings)
        return distillation_loss_fused(hidden_at(model, whole), head, whole.targets, **settings)

    def _head(self, model: Any) -> StudentHead | None:
        """The model's head for the fused form, looked for once; None: the plain form."""
        if self.losses.fused is False:
            return None
        weight = getattr(model.get_output_embeddings(), "weight", None)
        if self._found is None or self._found[0] is not weight:
            self._found = weight, student_head(model, device=next(model.parameters()).device)
        found = self._found[1]
        return found if isinstance(found, StudentHead) else None


def _losses(given: LossConfig | Mapping[str, Any] | None) -> LossConfig:
    try:
        losses = given if isinstance(given, LossConfig) else LossConfig.model_validate(dict(given or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["losses", *map(str, first["loc"])])
        raise RecipeError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error
    if Objective.of(losses, 0, 2) != Objective.of(losses, 1, 2):
        raise RecipeError(
            "losses: a value changes with the step, which another trainer does not tell; give numbers, and make a "
            "Distillation per phase"
        )
    if not losses.distils:
        raise RecipeError("losses.alpha is 0: nothing is learned from the store")
    return losses


def _batch(given: Mapping[str, Tensor]) -> Batch:
    targets = {name.removeprefix(TARGET): value for name, value in given.items() if name.startswith(TARGET)}
    return Batch(
        given["input_ids"], given["keep"], given.get("position_ids"), given.get("attention_mask"), Targets(**targets)
    )
