"""What is refused, before anything is written and in one line; the command's words and report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.pipeline.arguments import UsageMistake, parse
from stillroom.pipeline.cli import main
from stillroom.storage.errors import StillroomError, StoreError, UsageError
from stillroom.storage.records import HiddenSpec, NucleusSpec, SampledSpec, Sequence, SignalSpec, TopKSpec
from stillroom.storage.store import create_store
from stillroom.storage.surgery.changes import Changes, changed_signal
from stillroom.storage.surgery.transcode import REPORTS, transcode
from tests.storage.surgery.transcoding import hashes, require_sound, topk_identity
from tests.strategies import tiny_identity, tiny_store, unit_of

ALL = SignalSpec(TopKSpec(8, 1 / 8), SampledSpec(9), HiddenSpec(6, "bfloat16"))
NUCLEUS = SignalSpec(TopKSpec(8, 1 / 8, NucleusSpec(0.9)))
TOPK = SignalSpec(TopKSpec(8, 1 / 8))

REFUSED = [
    (TOPK, Changes(k=9), "k cannot grow from 8 to 9: .* signal.topk.k 9"),
    (TOPK, Changes(k=0), "k is 0, expected 1 to 8"),
    (TOPK, Changes(gap_step=1 / 16), "gap step 1/16 is finer than the store's 1/8: .* signal.topk.gap_step 1/16"),
    (TOPK, Changes(gap_step=None), "gap step none is finer .* signal.topk.gap_step null"),
    (TOPK, Changes(gap_step=5.0), "gap step is 5 nats, expected above 0 and at most 4"),
    (TOPK, Changes(gap_step=0.0), "gap step is 0 nats"),
    (TOPK, Changes(gap_step=float("nan")), "gap step is nan nats"),
    (TOPK, Changes(only=("sampled",)), "part sampled is not in the store, .* draws need .* signal.sampled"),
    (TOPK, Changes(only=("topk", "hidden")), "part hidden is not in the store, .* signal.hidden"),
    (TOPK, Changes(only=("logits",)), "no part 'logits', expected topk, sampled, hidden"),
    (TOPK, Changes(drop=("hidden",)), "part hidden cannot be dropped"),
    (TOPK, Changes(drop=("topk",)), r"no part of top-8 \(1/8 nat\) would be left; keep topk"),
    (TOPK, Changes(nucleus=NucleusSpec(1.0)), "nucleus 1@1: expected a mass between 0 and 1"),
    (TOPK, Changes(nucleus=NucleusSpec(0.9, 11.0)), "nucleus 0.9@11: .* a temperature of 1 to 10"),
    (NUCLEUS, Changes(nucleus=NucleusSpec(0.95)), "nucleus 0.95@1 may need ids that .* 0.9@1 did not keep"),
    (NUCLEUS, Changes(nucleus=NucleusSpec(0.8, 2.0)), "nucleus 0.8@2 may need ids"),
    (SignalSpec(sampled=SampledSpec(9)), Changes(k=4), "of the topk part, which is not in the store"),
    (SignalSpec(sampled=SampledSpec(9)), Changes(layout="packed"), "of the topk part, which is not in the store"),
    (ALL, Changes(k=4, drop=("topk",)), "of the topk part, which is to be left out"),
    (ALL, Changes(gap_step=None, only=("hidden",)), "of the topk part, which is to be left out"),
]  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(("spec", "changes", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
    def test_what_the_data_do_not_allow(self, spec: SignalSpec, changes: Changes, message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            changed_signal(spec, changes)
        assert "\n" not in str(caught.value)

    def test_before_anything_is_written(self, here: Path, sequences: list[Sequence]) -> None:
        source = tiny_store(here / "source", sequences)
        with pytest.raises(UsageError):
            transcode([source.uri], str(here / "result"), Changes(k=9))
        assert not (here / "result").exists()

    @pytest.mark.parametrize("name", ["source", "source/", "source/inside", ".", "link", "other/../source"])
    def test_a_source_is_no_destination(self, here: Path, sequences: list[Sequence], name: str) -> None:
        source = tiny_store(here / "source", sequences)
        (here / "link").symlink_to(source.uri)
        before = hashes(source.uri)
        with pytest.raises(UsageError, match="a source is never changed"):
            transcode([source.uri], f"{here}/{name}", Changes(k=2))
        assert hashes(source.uri) == before

    def test_an_empty_source(self, here: Path) -> None:
        create_store(str(here / "source"), tiny_identity())
        with pytest.raises(StoreError, match="has nothing committed"):
            transcode([str(here / "source")], str(here / "result"))

    def test_a_gap_that_no_code_holds_names_its_unit(self, here: Path, sequences: list[Sequence]) -> None:
        """float32 holds any gap, int16 codes of a small step do not."""

        def steep(sequence: Sequence, vocabulary: int) -> Any:
            return np.tile(-1000.0 * np.arange(vocabulary), (sequence.rows, 1))

        identity = topk_identity(4, None)
        source = tiny_store(here / "source", sequences[:2], identity=identity, teacher=steep)
        with pytest.raises(StoreError, match=f"unit {unit_of(sequences[:2]).id} cannot be written as top-4"):
            transcode([source.uri], str(here / "result"), Changes(gap_step=1 / 64))


class TestCommand:
    def test_options_stand_anywhere(self) -> None:
        for words in ("a b c --k 3", "a b --k 3 c", "--k 3 a b c", "a --k 3 b c"):
            arguments = parse(["transcode", *words.split()])
            assert (arguments.sources, arguments.destination, arguments.k) == (["a", "b"], "c", 3)
        assert parse(["transcode", "a", "b"]).gap_step == "same"
        assert parse(["transcode", "a", "b", "--gap-step", "1/4"]).gap_step == 0.25
        assert parse(["transcode", "a", "b", "--gap-step", "none"]).gap_step is None
        assert parse(["transcode", "a", "b", "--nucleus", "0.9@2"]).nucleus == (0.9, 2.0)
        assert parse(["transcode", "a", "b", "--only", "topk,hidden"]).only == ("topk", "hidden")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("a", "the following arguments are required: DST"),
            ("a b --gap-step x", "'x' is no number of nats"),
            ("a b --gap-step 1/0", "'1/0' is no number of nats"),
            ("a b --nucleus x", "'x' is not MASS or MASS@T"),
            ("a b --only topk --drop hidden", "not allowed with"),
            ("a b --sequences f --limit-tokens 3", "not allowed with"),
            ("a b --layout dense", "invalid choice"),
        ],
    )
    def test_mistakes(self, words: str, message: str) -> None:
        with pytest.raises(UsageMistake, match=message):
            parse(["transcode", *words.split()])

    def test_it_reports(self, here: Path, sequences: list[Sequence], capsys: pytest.CaptureFixture[str]) -> None:
        source = tiny_store(here / "source", sequences, identity=topk_identity())
        (here / "names").write_text("\n".join([sequences[0].digest, "0" * 32]))
        words = ["transcode", source.uri, str(here / "result"), "--k", "4", "--gap-step", "1/4"]
        assert main([*words, "--sequences", str(here / "names"), "--json"]) == 0
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert report["signal"] == "top-4 (1/4 nat)"
        assert report.pop("fidelity") == [], "the source keeps no sample"
        assert report == json.loads((here / "result" / REPORTS).read_text())[-1] | {
            key: report[key] for key in ("wall_s", "tokens_per_s")
        }
        assert "notice: 1 of the sequences named are in no source" in err
        assert main([*words, "--quiet"]) == 0
        assert "kl added nats" in capsys.readouterr().out
        require_sound(here / "result")

    def test_a_refusal_is_one_line_and_exit_code_2(
        self, here: Path, sequences: list[Sequence], capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = tiny_store(here / "source", sequences)
        assert main(["transcode", source.uri, str(here / "result"), "--k", "9", "--quiet"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("stillroom: error: k cannot grow from 4 to 9")
        assert err.count("\n") == 1
        assert issubclass(UsageError, StillroomError)
