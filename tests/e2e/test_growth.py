"""What a corpus that changes costs: only its unseen sequences, and no committed work."""

from pathlib import Path

import pytest

from stillroom.storage.store import open_store
from tests.e2e.runs import Setup, distil, rows, sentences, write_corpus

DOCUMENTS = sentences(3, 30)


@pytest.fixture(name="setup")
def _setup(tmp_path: Path) -> Setup:
    setup = Setup.make(tmp_path, DOCUMENTS)
    _, _, plan = distil(setup)
    assert plan.held == 0
    assert plan.pending_sequences == plan.sequences > 30
    return setup


def test_nothing_is_left_when_the_same_corpus_comes_again(setup: Setup) -> None:
    _, _, plan = distil(setup)
    assert plan.pending == ()
    assert plan.held == plan.sequences


def test_a_document_in_the_middle_costs_its_own_sequences(setup: Setup) -> None:
    before = open_store(str(setup.folder / "store")).committed()
    new = "anise anise rose rose mint mint thyme thyme glass"
    write_corpus(setup.folder / "corpus.jsonl", [*DOCUMENTS[:15], new, *DOCUMENTS[15:]])
    _, sources, plan = distil(setup)
    texts = {r.document for r in sources.manifest() if r.sequence.digest in plan.rows}
    assert texts == {15}
    after = open_store(str(setup.folder / "store")).committed()
    assert before.items() <= after.items()


def test_order_and_repetition_cost_nothing(setup: Setup) -> None:
    write_corpus(setup.folder / "corpus.jsonl", [*reversed(DOCUMENTS), *DOCUMENTS, *DOCUMENTS[:4]])
    _, sources, plan = distil(setup)
    assert plan.pending == ()
    assert len(sources.manifest()) > 2 * plan.sequences


def test_another_split_costs_nothing(setup: Setup) -> None:
    _, sources, plan = distil(setup, "corpus.heldout=0.5", "corpus.split_seed=7")
    assert plan.pending == ()
    assert 0.2 < sources.manifest().index().heldout.mean() < 0.8


def test_another_mask_costs_nothing(tmp_path: Path) -> None:
    pairs = [f'{{"prompt": "{a}", "response": "{b}"}}\n' for a, b in zip(DOCUMENTS[:10], DOCUMENTS[10:20], strict=True)]
    setup = Setup.make(tmp_path, DOCUMENTS)
    (tmp_path / "corpus.jsonl").write_text("".join(pairs))
    _, sources, _ = distil(setup, "corpus.train_on=responses")
    masked = int(sources.manifest().index().trained.sum())
    _, sources, plan = distil(setup, "corpus.train_on=all")
    assert plan.pending == ()
    assert int(sources.manifest().index().trained.sum()) > masked


def test_rows_do_not_depend_on_what_else_is_in_the_unit_but_by_noise(setup: Setup, tmp_path: Path) -> None:
    other = Setup.make(tmp_path / "other", DOCUMENTS[::-1], store__unit_tokens=512)
    distil(other)
    mine, theirs = (rows(open_store(str(s.folder / "store"))) for s in (setup, other))
    assert mine.keys() == theirs.keys()
    worst = max(abs(mine[d]["logits"] - theirs[d]["logits"]).max() for d in mine)
    # float32 under other batch shapes moves a logit by 1e-6; at the edge of a quantisation step that is one step.
    assert worst <= 1 / 8 + 1e-4
