"""What a student's output is held to: every loss on the stored signal and on the text.

targets        what positions are trained on, and the sums that come out
divergences    one formula each, on log-probabilities
buckets        K kept ids and one bucket for all others
hard           cross-entropy on the text, with label smoothing
objective      weights, temperature and alpha of a step
sparse, fused  output head and loss in slices of positions, gradients written directly
"""

from stillroom.pipeline.student.losses.buckets import Buckets, bucket_kl
from stillroom.pipeline.student.losses.fused import StudentHead, fused_loss
from stillroom.pipeline.student.losses.hard import cross_entropy
from stillroom.pipeline.student.losses.objective import Objective, sparse_loss
from stillroom.pipeline.student.losses.targets import SLICE_ELEMENTS, LossSums, Targets, combine, slices

__all__ = [
    "SLICE_ELEMENTS",
    "Buckets",
    "LossSums",
    "Objective",
    "StudentHead",
    "Targets",
    "bucket_kl",
    "combine",
    "cross_entropy",
    "fused_loss",
    "slices",
    "sparse_loss",
]
