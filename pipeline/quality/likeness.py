"""How like two sets of texts are: a student's answers and its teacher's responses.

Enters: texts. Leaves: BLEU and ROUGE-L. Costs: a pass over the words; importing sacrebleu and rouge-score, an extra.

Where a prompt has several responses, each is a reference: BLEU counts the n-grams of all of them, and ROUGE-L is that
of the response that is most like the answer.
"""

import importlib.util
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from stillroom.storage.errors import StillroomError


@dataclass(frozen=True)
class Likeness:
    """bleu: of all answers together, 0 … 100 (Papineni et al. 2002; sacrebleu, Post 2018). bleu_signature: how it was
    counted. rouge_l: mean over the answers of the F-measure of the longest common subsequence, 0 … 1 (Lin 2004), of
    words of the letters a … z and digits: of other scripts it sees nothing."""

    bleu: float
    bleu_signature: str
    rouge_l: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_installed() -> None:
    """Raises StillroomError, with the extra to install, where a package is missing. Imports nothing of them."""
    missing = [name for name, module in (("sacrebleu", "sacrebleu"), ("rouge-score", "rouge_score"))
               if importlib.util.find_spec(module) is None]  # fmt: skip
    if missing:
        raise StillroomError(
            f"evaluate.answers needs {' and '.join(missing)}, not installed here: pip install 'stillroom[answers]', or "
            "leave evaluate.answers out"
        )


def likeness(answers: Seq[str], references: Seq[Seq[str]]) -> Likeness:
    """references: of each answer, one or more. There must be an answer."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU()
    # By their number: the first of each answer, then the second, with None where there is none.
    by_number: list[list[str | None]] = [list(column) for column in zip_longest(*references)]
    score = bleu.corpus_score(list(answers), by_number)
    each = [rouge_l(answer, told) for answer, told in zip(answers, references, strict=True)]
    return Likeness(float(score.score), str(bleu.get_signature()), sum(each) / len(each))


def rouge_l(answer: str, references: Seq[str]) -> float:
    """Of the reference that gives the most. 0 … 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)
