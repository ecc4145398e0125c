"""How the sequences of a unit share forward passes.

Enters: lengths. Leaves: lists of indices. Costs: nothing. A function of the lengths and the budget alone: the same
unit always gives the same batch shapes, and that is what makes its rows bit-equal from run to run.
"""

from collections.abc import Iterable, Sequence


def batches(lengths: Sequence[int], batch_tokens: int, *, border: int | None = None) -> list[list[int]]:
    """Indices into `lengths`, longest first, in batches of at most `batch_tokens` padded tokens.

    A batch's padded size is its longest length times its number of sequences. Equal lengths keep their order. A
    sequence longer than `batch_tokens` has a batch of its own: windows are the corpus's business, not ours.

    border: sequences longer than this never share a batch with others. Models with LongRoPE (Phi-3 of 128k) turn by
        other frequencies beyond it, by the batch's padded length: a long companion moved a short one's logits by 0.5.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    made: list[list[int]] = []
    for i in longest_first:
        longest = lengths[made[-1][0]] if made else 0
        apart = border is not None and lengths[i] <= border < longest
        if made and not apart and (len(made[-1]) + 1) * longest <= batch_tokens:
            made[-1].append(i)
        else:
            made.append([i])
    return made


def shapes(lengths: Sequence[int], groups: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """(sequences, padded tokens of each) of every batch."""
    return [(len(group), max(lengths[i] for i in group)) for group in groups]
