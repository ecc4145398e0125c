"""`stillroom report` as people meet it: a run, the command, and the page in a real browser."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from stillroom.pipeline.cli import main
from stillroom.pipeline.run_status import RESOLVED
from stillroom.storage.records import Sequence, TopK
from stillroom.storage.store import Store, open_store
from tests.browser import NEEDED, Browser, browser
from tests.pipeline.report.world import HOSTILE, add_generation, make_run

pytestmark = [pytest.mark.real, NEEDED]

#: Kept as artefacts of the build.
PICTURES = Path(__file__).parents[2] / "build" / "report"

#: Seconds for a page to settle, on a machine that does other things.
_PATIENCE_S = 20.0


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + _PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not come about in {_PATIENCE_S:g} s"
        time.sleep(0.02)
    return found


def panel(open_: Browser) -> str:
    return str(open_.run("return document.getElementById('said').parentElement.innerText"))


def focused(open_: Browser) -> int:
    """The number of the token that has the focus; −1 if none has."""
    return int(open_.run("return Number(document.activeElement.dataset.at ?? -1)"))


def settled(open_: Browser, tokens: int = 50) -> None:
    """All plots are drawn, and the viewer has its document, of more than so many tokens."""
    drawn = "return [...document.querySelectorAll('.plot')].every((p) => p.querySelector('.bk-Figure'))"
    until(
        lambda: open_.run(drawn) and open_.run(f"return document.querySelectorAll('#text span').length > {tokens}"),
        "the page",
    )


def test_the_page_in_a_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No console error, no request, no page wider than a phone; the viewer answers hover, keyboard and tap."""
    run = make_run(tmp_path / "world", students=("cut",))
    add_generation(run)
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--html", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []  # the student's process has answered
    with browser() as opened:
        for width in (1280, 360):
            opened.open(page, width=width, dark=width == 360)
            settled(opened)
            assert opened.run("return document.documentElement.scrollWidth") <= width
            assert "dropped, duplicate" in opened.run("return document.getElementById('pipeline').innerText")
            _text_is_text(opened)
            _keyboard(opened)
            _pointer(opened, Truth.of(run, opened))
            opened.picture(PICTURES / f"report-{width}.png", whole=True)
        store = store_of(run)
        alone = tmp_path / "store.html"
        assert main(["inspect", store.uri, "--html", str(alone), "--json"]) == 0
        opened.open(alone, width=1280)
        settled(opened, tokens=1)
        for at in (1, len(document(opened)) - 1):
            opened.run(f"document.getElementById('token-{at}').focus()")
            found = told(opened)
            assert list(found) == ["Teacher"]
            _is_what(found["Teacher"], teacher_at(store, document(opened), at))
        opened.collect()
        assert opened.errors == []
        assert set(opened.requests) <= {page.as_uri(), alone.as_uri(), "data:,"}


def store_of(run: Path) -> Store:
    return open_store(yaml.safe_load((run / RESOLVED).read_text())["store"]["path"])


def document(opened: Browser) -> list[int]:
    """The ids of the first document, which the viewer opens with."""
    ids = opened.run("return JSON.parse(document.getElementById('tokens-data').textContent)[0].documents[0].ids")
    return [int(i) for i in ids]


def told(opened: Browser) -> dict[str, list[tuple[int, float]]]:
    """What the panel says of the token: for each model the ids in their order, with the percentage shown."""
    script = """
        const models = {};
        let lines;
        for (const element of document.getElementById('panel').children) {
          if (element.tagName === 'H3') models[element.textContent.split(':')[0]] = lines = [];
          if (element.classList.contains('row')) {
            lines.push([element.firstElementChild.title, element.lastElementChild.textContent]);
          }
        }
        return models;"""
    return {
        model: [
            (int(title.removeprefix("id ")), float(p.removesuffix(" %").replace("< 0.01", "0"))) for title, p in rows
        ]
        for model, rows in opened.run(script).items()
    }


Likeliest = list[tuple[int, float]]


def found_in(store: Store, ids: list[int]) -> tuple[Sequence, TopK]:
    """The stored sequence that a document of the page begins with, and what the teacher said of it."""
    for stored in store.sequences():
        first = 0 if stored.sequence.first_position == 0 else stored.sequence.first_position + 1
        shown = stored.sequence.input_ids[first:].tolist()
        if shown[:24] == ids[:24]:
            assert stored.signal is not None
            assert stored.signal.topk is not None
            return stored.sequence, stored.signal.topk
    raise AssertionError("the store has no such sequence")


def teacher_at(store: Store, ids: list[int], at: int) -> Likeliest:
    """(id, percent) of what is kept where token `at` of a document is predicted; the tail's share included."""
    sequence, topk = found_in(store, ids)
    row = at - (sequence.first_position == 0)
    kept = topk.logits[row].astype(np.float64)
    total = np.exp(kept).sum() + np.exp(float(topk.tail_lse[row, -1]))
    return list(zip(topk.ids[row].tolist(), (100 * np.exp(kept) / total).tolist(), strict=True))


@dataclass(frozen=True)
class Truth:
    """What the viewer must say of the first document's tokens. shares: float32 [T, V], of the student."""

    store: Store
    ids: list[int]
    shares: NDArray[np.float32]

    @staticmethod
    def of(run: Path, opened: Browser) -> "Truth":
        store, ids = store_of(run), document(opened)
        sequence, _ = found_in(store, ids)
        assert sequence.first_position == 0
        student = AutoModelForCausalLM.from_pretrained(run / "students" / "cut" / "export", dtype=torch.float32)
        with torch.no_grad():
            logits = student(torch.from_numpy(sequence.input_ids.astype(np.int64))[None]).logits[0]
        return Truth(store, ids, torch.softmax(logits[:, : store.identity.vocabulary], dim=-1).numpy())

    def check(self, found: dict[str, Likeliest], at: int) -> None:
        assert list(found) == ["Teacher", "cut"]
        _is_what(found["Teacher"], teacher_at(self.store, self.ids, at))
        share_V = self.shares[at - 1]
        best = np.argsort(-share_V, kind="stable")[:8].tolist()
        _is_what(found["cut"], [(i, 100 * float(share_V[i])) for i in best])


def _is_what(found: Likeliest, expected: Likeliest) -> None:
    """The eight likeliest, in this order; percentages are shown to one digit, below 1 % to two."""
    assert [i for i, _ in found] == [i for i, _ in expected[:8]]
    for (_, shown), (_, true) in zip(found, expected, strict=False):
        assert shown == pytest.approx(true, abs=0.011 if true < 0.99 else 0.056)


def _text_is_text(opened: Browser) -> None:
    assert str(opened.run("return document.getElementById('text').textContent")).startswith(HOSTILE)
    assert opened.run("return window.hostile === undefined && document.images.length === 0")


def _keyboard(opened: Browser) -> None:
    """One stop of the tab key; arrows from there; the focus is seen; what is said changes with it."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> None:
        ActionChains(opened.driver).send_keys(key).perform()

    opened.run("document.querySelector('#text [tabindex=\"0\"]').focus()")
    assert opened.run("return document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1
    start, said = focused(opened), panel(opened)
    press(Keys.ARROW_RIGHT)
    assert focused(opened) == start + 1
    assert panel(opened) != said
    assert "Teacher: entropy" in panel(opened)
    assert "cut: KL" in panel(opened)
    assert opened.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(Keys.ARROW_DOWN)
    below = focused(opened)
    assert below > start + 2
    press(Keys.ARROW_UP)
    assert focused(opened) < below
    press(Keys.END)
    assert focused(opened) == opened.run("return document.querySelectorAll('#text span').length") - 1
    press(Keys.HOME)
    assert focused(opened) == 0
    assert "nothing predicted it" in panel(opened)


def _pointer(opened: Browser, truth: Truth) -> None:
    """Hover tells without moving the focus, and tells the truth; a tap moves it; the switch shades anew."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    driver = opened.driver
    opened.run("document.documentElement.style.scrollBehavior = 'auto'")
    opened.run("document.getElementById('text').scrollIntoView({block: 'start'})")
    first, third, ninth = (driver.find_element(By.ID, f"token-{n}") for n in (0, 3, 9))

    # Of the first token little is said. A page that got shorter then might scroll away from under the pointer, be told
    # so, get longer, and so on.
    def height(token: Any, says: str) -> Any:
        ActionChains(driver).move_to_element(token).perform()
        until(lambda: panel(opened).startswith(says), "what hover shows")
        return opened.run("return document.documentElement.scrollHeight")

    assert height(third, "Token 4 of") == height(first, "Token 1 of")

    found: dict[str, Likeliest] = {}

    def hovered() -> bool:  # from another token: a pointer that does not move tells nothing
        ActionChains(driver).move_to_element(third).move_to_element(ninth).perform()
        before = panel(opened)
        found.clear()
        found.update(told(opened))
        # A browser under load may tell the page late where its pointer went: what is read has to be of one moment.
        return before.startswith("Token 10 of") and panel(opened) == before

    until(hovered, "what hover shows")
    assert focused(opened) == 0
    truth.check(found, 9)
    ninth.click()
    assert focused(opened) == 9
    shade = "return [...document.querySelectorAll('#text span')].map((s) => s.style.getPropertyValue('--v'))"
    entropy = opened.run(shade)
    assert len(set(entropy)) > 10
    driver.find_elements(By.CSS_SELECTOR, "#shades input")[1].click()
    assert opened.run(shade) != entropy
