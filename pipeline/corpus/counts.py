"""What an ingest read, kept and left out: nothing is dropped without a number here.

Enters: events. Leaves: numbers, a line and notices for people. Costs: nothing.
"""

from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field
from typing import Any

from stillroom.pipeline.corpus.readers import BadLine
from stillroom.storage.manifest import ManifestRow

_EXAMPLES = 20
#: Of what was left out, shown by name in a notice.
_NAMED = 3


def first_of(examples: Seq[str]) -> str:
    """For a notice: the first three of what was left out.

    >>> first_of(["a:3: no text"]), first_of(["a", "b", "c", "d"])
    ('the first is a:3: no text', 'the first are a; b; c')
    """
    named = examples[:_NAMED]
    return f"the first {'are' if named[1:] else 'is'} {'; '.join(named)}"


@dataclass
class Counts:
    """Running counts.

    documents: read, the empty ones included; heldout_documents, empty_documents: of these. forms: documents by form.
    sequences: rows of the manifest; duplicate_sequences: those whose ids an earlier one has; untrained_sequences:
        those of which nothing is learned. train_sequences, heldout_sequences: by split.
    tokens: of all sequences, context_tokens included. trained_tokens: positions that train or evaluate.
    unpredicted_tokens: to be learned, but first in a later window without overlap, so nothing predicts them.
    bad_lines, bad_examples: "source:line: reason", the first 20. blank_lines: between records.
    passed_files, passed_examples: in folders and globs, of no kind that can be read.
    stopped_at: the limit that ended the reading, or None. pairs_as: how pairs were rendered. retokenised_documents:
        generations of another tokenizer, taken as text. sources: name and number of documents of each source, in their
        order, so that a document's number says which it is of; empty in manifests of before sources had names.
    """

    pairs_as: str = "plain"
    documents: int = 0
    heldout_documents: int = 0
    empty_documents: int = 0
    forms: dict[str, int] = field(default_factory=dict)
    sequences: int = 0
    train_sequences: int = 0
    heldout_sequences: int = 0
    duplicate_sequences: int = 0
    untrained_sequences: int = 0
    tokens: int = 0
    context_tokens: int = 0
    trained_tokens: int = 0
    unpredicted_tokens: int = 0
    bad_lines: int = 0
    bad_examples: list[str] = field(default_factory=list)
    blank_lines: int = 0
    passed_files: int = 0
    passed_examples: list[str] = field(default_factory=list)
    stopped_at: str | None = None
    retokenised_documents: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)

    def add_document(self, form: str, *, heldout: bool, empty: bool) -> int:
        """Returns the document's number."""
        self.documents += 1
        self.forms[form] = self.forms.get(form, 0) + 1
        self.empty_documents += empty
        self.heldout_documents += heldout and not empty
        return self.documents - 1

    def add_sequence(self, row: ManifestRow) -> None:
        context = row.sequence.context
        self.sequences += 1
        self.heldout_sequences += row.heldout
        self.train_sequences += not row.heldout
        self.untrained_sequences += row.trained == 0
        self.tokens += len(row.mask)
        self.context_tokens += context
        self.trained_tokens += row.trained
        self.unpredicted_tokens += bool(row.window > 0 and context == 0 and row.mask[0])

    def add_bad(self, bad: BadLine) -> None:
        self.bad_lines += bad.records
        if len(self.bad_examples) < _EXAMPLES:
            self.bad_examples.append(f"{bad.source}:{bad.line}: {bad.reason}")

    def add_passed(self, name: str) -> None:
        self.passed_files += 1
        if len(self.passed_examples) < _EXAMPLES:
            self.passed_examples.append(name)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Counts":
        return Counts(**values)

    def line(self) -> str:
        """One line for a report."""
        forms = ", ".join(f"{count:,} {form}" for form, count in sorted(self.forms.items()))
        pairs = f", pairs as {self.pairs_as}" if "pairs" in self.forms else ""
        return (
            f"{self.documents:,} documents ({forms}{pairs}; {self.heldout_documents:,} held out), "
            f"{self.sequences:,} sequences, {self.tokens:,} tokens, {self.trained_tokens:,} of them learned"
        )

    def notices(self) -> list[str]:
        """What a user should know of, a line each; empty when all was plain."""
        bad, passed = first_of(self.bad_examples), first_of(self.passed_examples)
        said = [
            (self.bad_lines, f"{self.bad_lines:,} bad lines left out, {bad}"),
            (self.passed_files, f"{self.passed_files:,} files of other kinds passed over, {passed}"),
            (self.empty_documents, f"{self.empty_documents:,} empty documents left out"),
            (self.duplicate_sequences, f"{self.duplicate_sequences:,} sequences occur more than once"),
            (self.untrained_sequences, f"{self.untrained_sequences:,} sequences hold nothing to learn"),
            (
                self.unpredicted_tokens,
                f"{self.unpredicted_tokens:,} tokens begin a later window and are never predicted: "
                "an overlap of 1 or more would learn them",
            ),
            (self.heldout_documents == 0, "no document is held out: nothing to evaluate on"),
            (
                self.retokenised_documents,
                f"{self.retokenised_documents:,} generations were written with another tokenizer: their text is "
                "tokenised anew, the teacher's own ids are not used",
            ),
            (self.stopped_at is not None, f"reading stopped at {self.stopped_at}"),
        ]
        return [text for happened, text in said if happened]
