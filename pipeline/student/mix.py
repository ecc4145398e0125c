"""Data mix: how much of each step is learned from which source of the corpus.

Enters: a `MixConfig`, a manifest that says which document is of which source, the number of steps. Leaves: packs with
other weights, or packs in another order. Costs: 8 bytes a step and source, 2 bytes a pack; by sampling a stream of each
source (thread, decoded row groups). No torch, no state: all follows from seed and step, a resumed run restores nothing.

By weight, with shares σ_s of the step, w_n the weights of the corpus and P_s the step's positions of source s:

    loss = Σ_s σ_s · L_s / Σ_s σ_s,   L_s = Σ_{n ∈ P_s} w_n loss_n / Σ_{n ∈ P_s} w_n   over sources with Σ w > 0

which is β · L_SeqKD + (1 − β) · L_GT where both are there. A source that the step lacks leaves its share to the others.

By sampling, sources take packs one after the other, of those left: source s takes pack n of the run, from 0, where

    ⌊E_s(n + 1) + u_s⌋ > ⌊E_s(n) + u_s⌋,   E_s(n) = Σ_{m < n left} σ_s / Σ_{r ≥ s} σ_r, at the step of pack m

(systematic sampling; Madow and Madow 1944), u_s in 0 … 1 from the seed: over seeds the probability is the share, and in
a run of two sources counts are never a whole pack off their expectation, whatever the schedule.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from stillroom.pipeline.student.mix_config import SLACK, MixConfig, require_sum
from stillroom.pipeline.student.schedules import at
from stillroom.storage.errors import StudentError
from stillroom.storage.manifest import Manifest, ManifestIndex
from stillroom.storage.order import mix as hashed
from stillroom.storage.records import Pack
from stillroom.storage.stream import Stream

#: Adds the step's numbers of all ranks; float64 [2, S].
Total = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def sources_of(manifest: Manifest) -> list[tuple[str, int]]:
    """(name, documents) of each source, in order: documents are numbered through them.

    Raises StudentError for a manifest that does not say.
    """
    found = manifest.meta.counts.get("sources")
    if not found:
        raise StudentError(
            f"mix: {manifest.path} was written before sources had names: remove it and run `stillroom teach` again, "
            "which reads the corpus anew into the same sequences and scores nothing twice"
        )
    return [(source["name"], source["documents"]) for source in found]


def source_of_rows(manifest: Manifest, index: ManifestIndex) -> NDArray[np.int64]:
    """Number of the source of each row, int64 [rows]."""
    stops = np.cumsum([documents for _, documents in sources_of(manifest)], dtype=np.int64)
    return np.searchsorted(stops, index.documents, side="right").astype(np.int64)


def shares_of(config: MixConfig, names: list[str], total_steps: int) -> NDArray[np.float64]:
    """Share of each source at each step, float64 [steps, S], rows of sum 1.

    Raises StudentError for names that the corpus lacks, and shares that add up to more than 1 at a step.
    """
    try:
        config.require_names(names)
        shares = np.zeros((total_steps, len(names)))
        for number, name in enumerate(names):
            if name in config.shares:
                shares[:, number] = [at(config.shares[name], step, total_steps) for step in range(total_steps)]
        sums = shares.sum(1)
        worst = int(np.abs(sums - 1).argmax() if len(config.shares) == len(names) else sums.argmax())
        require_sum(config.shares, float(sums[worst]), worst, whole=len(config.shares) == len(names))
    except ValueError as error:
        raise StudentError(str(error)) from error
    rest = np.where(sums < 1 - SLACK, 1 - sums, 0.0)
    for number, name in enumerate(names):
        if name not in config.shares:
            shares[:, number] = rest
    return cast(NDArray[np.float64], shares / shares.sum(1, keepdims=True))


def drawn(shares: NDArray[np.float64], *, packs: int, seed: int) -> NDArray[np.uint16]:
    """Source of every pack of the run, uint16 [steps · packs]. shares: float64 [steps, S]. packs: of a step."""
    found = np.zeros(len(shares) * packs, np.uint16)
    left = np.arange(len(found))
    rest = np.cumsum(shares[:, ::-1], axis=1)[:, ::-1]
    for source in range(shares.shape[1]):
        steps = left // packs
        with np.errstate(invalid="ignore"):
            part = np.nan_to_num(shares[steps, source] / rest[steps, source])
        passed = np.floor(np.cumsum(part) + _offset(seed, source))
        # Beside a part of 1 rounding has no say.
        taken = (np.diff(passed, prepend=0.0) > 0) | (part >= 1.0)
        found[left[taken]] = source
        left = left[~taken]
    return found


def _offset(seed: int, source: int) -> float:
    """In 0 … 1, a multiple of 2⁻²⁰: its sums with whole numbers are exact."""
    return int(hashed(hashed(np.array([seed], np.uint64)) ^ np.uint64(source))[0] >> np.uint64(44)) / 2**20


@dataclass(frozen=True)
class MixedStream:
    """Packs of the sources' own streams in the order `drawn` says: what a run needs of a stream.

    drawn: uint16 [packs of the run]. streams: opens a source's stream, given its number and which of its packs are
    wanted, counted over its epochs, rising. start: packs of the run already consumed, over all ranks; this process
    takes every world_size-th pack from the rank-th on.
    """

    drawn: NDArray[np.uint16]
    streams: Callable[[int, NDArray[np.int64]], Stream]
    start: int = 0
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[Pack]:
        mine = np.arange(self.start + self.rank, len(self.drawn), self.world_size)
        opened: dict[int, Iterator[Pack]] = {}
        with ExitStack() as stack:
            for source in np.unique(self.drawn[mine]).tolist():
                places = np.flatnonzero(self.drawn == source)
                wanted = np.flatnonzero(np.isin(places, mine, assume_unique=True))
                opened[source] = stack.enter_context(closing(cast(Any, iter(self.streams(source, wanted)))))
            for number in mine:
                yield next(opened[int(self.drawn[number])])

    def packs_per_epoch(self, epoch: int) -> int:
        raise AssertionError("sources have epochs of their own")

    def units(self, packs: int | None = None) -> set[str]:
        raise AssertionError("only of held-out packs")


@dataclass(frozen=True)
class Mix:
    """A run's mix. names: of the sources, in the manifest's order. source_of: of every row, int64 [rows].
    positions: that train in one pass over a source, int64 [S]. shares: float64 [steps, S]."""

    config: MixConfig
    names: list[str]
    source_of: NDArray[np.int64]
    positions: NDArray[np.int64]
    shares: NDArray[np.float64]

    @staticmethod
    def of(config: MixConfig, manifest: Manifest, total_steps: int) -> "Mix":
        """Raises StudentError for names that the corpus lacks, shares that add up to more than 1 at a step, and a
        source with a share that has nothing to train on."""
        names = [name for name, _ in sources_of(manifest)]
        shares, index = shares_of(config, names, total_steps), manifest.index()
        source_of, trains = source_of_rows(manifest, index), ~index.heldout
        positions = np.bincount(source_of[trains], weights=index.trained[trains], minlength=len(names)).astype(np.int64)
        for number, name in enumerate(names):
            if not positions[number] and shares[:, number].any():
                raise StudentError(
                    f"mix: source {name} has a share, and nothing to learn in the training split: set its share to 0, "
                    "or see corpus.heldout, limit_documents and limit_tokens"
                )
        return Mix(config, names, source_of, positions, shares)

    @property
    def samples(self) -> bool:
        """Whether packs are drawn from sources."""
        return self.config.by == "sampling"

    def stream(
        self,
        opened: Callable[[NDArray[np.bool_], NDArray[np.int64]], Stream],
        *,
        packs: int,
        seed: int,
        start: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> MixedStream:
        """By sampling. opened: a stream over these rows of the manifest (bool [rows]), these of its packs."""

        def of_source(source: int, wanted: NDArray[np.int64]) -> Stream:
            return opened(self.source_of == source, wanted)

        order = drawn(self.shares, packs=packs, seed=seed)
        return MixedStream(order, of_source, start=start, rank=rank, world_size=world_size)

    def weigh(
        self, packs: Sequence[Pack], step: int, total: Total = lambda sums: sums
    ) -> tuple[list[Pack], dict[str, Any]]:
        """The packs of a step as they are to be trained on, and the record for its line of the log.

        By weight every position's weight is multiplied by one factor of its source, so that the step's
        Σ weight · loss / Σ weight is the formula above; Σ weight stays what it was. total: where `packs` are this
        rank's part alone.
        """
        held = [self._held(pack) for pack in packs]
        sums = total(sum((found for _, found in held), np.zeros((2, len(self.names)))))
        shares = self.shares[step]
        record = {
            "shares": dict(zip(self.names, shares.tolist(), strict=True)),
            "trained": dict(zip(self.names, map(int, sums[1]), strict=True)),
        }
        if self.samples:
            return list(packs), record
        factors = factors_of(sums[0], shares)
        weighed = [
            replace(pack, weights=(pack.weights * factors[sources]).astype(np.float32))
            for pack, (sources, _) in zip(packs, held, strict=True)
        ]
        return weighed, record

    def _held(self, pack: Pack) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Source of each position that trains, int64 [M]; weight and number of positions by source, float64 [2, S]."""
        assert pack.rows is not None
        sources = self.source_of[pack.rows][pack.segment_ids[pack.positions]]
        size = len(self.names)
        return sources, np.stack(
            [
                np.bincount(sources, weights=pack.weights, minlength=size),
                np.bincount(sources, minlength=size).astype(np.float64),
            ]
        )


def factors_of(weights: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the positions of each source are multiplied by, float64 [S]: Σ over sources of factor · weight is Σ weight,
    and each has its share of it. weights: Σ of each source in the step; all factors are 0 where none has a share."""
    there = np.where(weights > 0, shares, 0.0)
    if not there.any():
        return np.zeros_like(shares)
    scaled = there / there.sum() * weights.sum()
    return cast(NDArray[np.float64], np.divide(scaled, weights, out=np.zeros_like(shares), where=weights > 0))


def mixed(
    mix: Mix | None, packs: Sequence[Pack], step: int, total: Total = lambda sums: sums
) -> tuple[list[Pack], dict[str, Any]]:
    """`Mix.weigh`; the record under the key `mix`, or none without a mix."""
    if mix is None:
        return list(packs), {}
    weighed, record = mix.weigh(packs, step, total)
    return weighed, {"mix": record}


def summary(mix: Mix, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What `result.json` says of a mix. records: the lines of the log.

    trained: positions by source; epochs: these by what one pass over the source has. lacking: by weight, steps without
    a position of a source that had a share: the others had it.
    """
    trained, lacking = dict.fromkeys(mix.names, 0), dict.fromkeys(mix.names, 0)
    for record in (line["mix"] for line in records if "mix" in line):
        for name, count in record["trained"].items():
            trained[name] += count
            lacking[name] += not count and record["shares"][name] > 0
    passes = zip(mix.names, mix.positions.tolist(), strict=True)
    return {
        "by": mix.config.by,
        "trained": trained,
        "epochs": {name: round(trained[name] / one, 3) if one else 0.0 for name, one in passes},
        **({} if mix.samples else {"lacking": lacking}),
    }


def notices(found: dict[str, Any], steps: int) -> list[str]:
    """Of a summary, a line each."""
    return [
        f"mix: {count:,} of {steps:,} steps had no position of {name}, and its share went to the others: raise "
        "batch_packs, or mix by sampling"
        for name, count in found.get("lacking", {}).items()
        if count
    ]
