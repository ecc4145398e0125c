"""Notices: each from a log that shows it, none from one that does not, each once, and the same after a resume."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stillroom.pipeline.results import print_json, print_tables
from stillroom.pipeline.student.runlog import RunLog
from stillroom.pipeline.student.session import run
from stillroom.pipeline.student.watch import Watch
from stillroom.pipeline.train import student_line
from stillroom.storage.manifest import Manifest
from stillroom.storage.snapshot import Snapshot
from tests.student.world import World


def step(number: int, kd: float | None, **change: Any) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "kd": kd, "lr": 3e-5, "skipped": False, "temperature": 2.0, "alpha": 0.7,
        "phase": 0, "weights": {},
    } | change  # fmt: skip


def evaluation(number: int, kl: float | None, **change: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "step": number, "kl": kl, "top1": 0.4, "perplexity": 9.0} | change


def log(total: int, train: Any, heldout: dict[int, float | None], **change: Any) -> list[dict[str, Any]]:
    """Step n has train(n); held-out KL by step."""
    records = [evaluation(0, heldout[0])] if 0 in heldout else []
    for number in range(1, total + 1):
        records.append(step(number, train(number), **change))
        if number in heldout:
            records.append(evaluation(number, heldout[number]))
    return records


def watched(records: list[dict[str, Any]], total: int, *, warmup: int = 20, distils: bool = True) -> list[str]:
    watch = Watch(steps=total, warmup_steps=warmup, distils=distils)
    said = [notice for record in records for notice in watch.see(record)]
    assert said == watch.notices
    return said


def falling(number: int) -> float:
    return 4.0 * 0.99**number


def test_a_student_that_learns_gets_no_notice() -> None:
    assert watched(log(300, falling, {0: 4.0, 100: 1.5, 200: 0.6, 300: 0.3}), 300) == []


def test_one_that_does_not_learn_is_told_once_with_numbers_and_remedies() -> None:
    (said,) = watched(log(200, lambda n: 4.0 - n / 1000, {0: 2.31, 100: 2.30, 200: 2.305}), 200)
    assert said == (
        "the student does not learn: held-out KL to the teacher 2.31 before training, 2.3 after 100 steps; lower "
        "losses.temperature (now 2), raise losses.alpha (now 0.7), or try another lr (now 3e-05)"
    )
    assert "\n" not in said


def test_it_is_given_time_to_warm_up() -> None:
    records = log(100, lambda n: 4.0 - n / 100, {0: 2.31, 60: 2.31, 100: 1.0})
    assert watched(records, 100) == []
    assert watched(records, 100, warmup=10) != []


def test_hard_labels_are_judged_by_perplexity() -> None:
    records = [evaluation(0, None, perplexity=80.0), *(step(n, None) for n in range(1, 201))]
    (said,) = watched([*records, evaluation(200, None, perplexity=81.5)], 200, distils=False)
    assert said.startswith("the student does not learn: held-out perplexity 80 before training, 81.5 after 200 steps")
    assert "temperature" not in said
    assert watched([*records, evaluation(200, None, perplexity=60.0)], 200, distils=False) == []
    # Draws alone give no KL.
    assert watched([*records, evaluation(200, None, perplexity=81.5)], 200) != []


def test_a_capacity_gap_is_a_large_distance_that_falls_no_more() -> None:
    def stalled(number: int) -> float:
        return max(4.0 - number / 20, 1.5)

    (said,) = watched(log(200, stalled, {0: 3.0, 200: 1.2}), 200)
    assert said.startswith("large capacity gap: held-out KL 1.200 nats, top-1 agreement 40.0%")
    assert "(1.5 → 1.5 over" in said
    assert "in stages" in said
    assert watched(log(200, stalled, {0: 3.0, 200: 0.2}), 200) == []  # near enough
    assert watched(log(200, falling, {0: 3.0, 200: 1.2}), 200) == []  # still falling
    assert watched(log(60, lambda n: 1.5, {0: 3.0, 60: 1.2}), 60) == []  # too short to say


def test_overfitting_is_training_that_falls_while_held_out_rises() -> None:
    heldout: dict[int, float | None] = {0: 3.0, 100: 0.8, 200: 0.81, 300: 0.9, 400: 1.0}
    (said,) = watched(log(400, falling, heldout), 400)
    assert "held-out KL rose from 0.8 after 100 steps to 0.9 after 300" in said
    assert "stop at 100 steps" in said
    assert watched(log(400, lambda n: 4.0 + n / 1e3, heldout), 400)[0].startswith("large capacity gap")  # both rise


def test_losses_at_other_temperatures_are_not_compared() -> None:
    heldout: dict[int, float | None] = {0: 3.0, 100: 0.8, 300: 1.9}
    records = [
        r | {"temperature": 6 - r["step"] / 100} if r["kind"] == "step" else r for r in log(300, falling, heldout)
    ]
    assert watched(records, 300) == []
    assert watched(log(300, falling, heldout), 300) != []


def test_losses_under_weights_that_change_are_not_compared(world: World) -> None:
    weights = {"forward_kl": 1.0, "tv": {"from": 0.0, "to": 1.0}}
    records = log(300, falling, {0: 3.0, 100: 0.8, 300: 1.9})
    for output, count in (({"forward_kl": 1.0}, 1), (weights, 0)):
        watch = Watch.of(world.job(Path("unused"), losses={"output": output}).student, steps=300)
        for record in records:
            watch.see(record)
        assert len(watch.notices) == count


def test_skipped_steps_and_logs_of_earlier_releases_are_read() -> None:
    records = log(300, falling, {0: 3.0, 100: 0.8, 300: 1.9})
    records = [{k: v for k, v in r.items() if k not in {"temperature", "alpha", "phase", "weights"}} for r in records]
    records.insert(5, step(99, None, skipped=True))
    (said,) = watched(records, 300)
    assert said.startswith("the student overfits")


def test_a_resumed_run_keeps_its_notices_and_says_them_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = log(300, falling, {0: 3.0, 100: 0.8, 200: 1.4, 300: 1.9})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records if r["step"] <= 200))
    watch = Watch(steps=300, warmup_steps=20, distils=True)
    with RunLog(tmp_path, name="small", done=200, total=300, log_every=10, watch=watch) as opened:
        (held,) = watch.notices
        opened.evaluation(300, {"kl": 1.9, "top1": None})
    assert watch.notices == [held]
    assert "notice" not in capsys.readouterr().err


def test_a_run_puts_its_measures_on_tensorboard_and_its_notices_in_the_result(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate of nothing: it cannot learn."""
    job = world.job(tmp_path, steps=51, warmup_steps=1, lr=1e-12, batch_packs=1, eval_every=50, log_every=25)
    tmp_path.mkdir(exist_ok=True)
    result = run(job, Manifest.open(job.manifest), Snapshot.read(world.snapshot))
    (notice,) = result["notices"]
    assert notice.startswith("the student does not learn")
    assert f"notice: small: {notice}" in capsys.readouterr().err
    assert json.loads((tmp_path / "result.json").read_text())["notices"] == [notice]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    measured = {"kl", "top1", "top5", "teacher_mass", "student_mass", "perplexity", "ece", "tokens"}
    assert {f"heldout/{key}" for key in measured} <= tags
    assert {f"train/{key}" for key in ("loss", "kd", "ce", "grad_norm", "tokens_per_s", "data_wait")} <= tags
    assert [event.step for event in board.Scalars("heldout/top5")] == [0, 50, 51]
    assert [event.value for event in board.Scalars("train/output_weights/forward_kl")] == [1, 1, 1, 1]
    assert board.Tags()["tensors"] == ["notices/text_summary"]
    assert result["after"].keys() == measured


RESULT: dict[str, Any] = {
    "name": "small", "parameters": 9, "layers": 2, "steps": 3, "trained_positions": 5, "seconds": 1.0,
    "before": {"tokens": 4, "kl": 2.0, "top1": 0.1, "perplexity": 30.0, "ece": 0.2},
    "after": {"tokens": 4, "kl": 1.0, "top1": 0.5, "perplexity": 20.0, "ece": 0.1}, "export": "there",
}  # fmt: skip


def test_results_of_earlier_releases_are_shown() -> None:
    line = student_line(RESULT)
    assert line["kl_after"] == 1.0
    assert line["top5_after"] is line["student_mass_before"] is None
    assert line["notices"] == []
    stream = io.StringIO()
    print_tables({"students": [line, student_line(RESULT | {"after": None})]}, stream)
    assert "notice" not in stream.getvalue()


def test_notices_are_lines_below_the_table_and_a_list_in_json() -> None:
    line = student_line(RESULT | {"notices": ["it does not learn [at all]", "large capacity gap"]})
    stream = io.StringIO()
    print_tables({"students": [line]}, stream)
    *table, first, second = stream.getvalue().rstrip().splitlines()
    assert "notices" not in "\n".join(table)
    assert (first, second) == ("notice: small: it does not learn [at all]", "notice: small: large capacity gap")
    stream = io.StringIO()
    print_json({"students": [line]}, stream)
    assert json.loads(stream.getvalue())["students"][0]["notices"][1] == "large capacity gap"
