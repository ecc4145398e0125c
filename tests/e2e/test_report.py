"""`stillroom report` as people meet it: a run, the command, and the page in a real browser."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.cli import main
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


def settled(open_: Browser) -> None:
    """All plots are drawn, and the viewer has its document."""
    drawn = "return [...document.querySelectorAll('.plot')].every((p) => p.querySelector('.bk-Figure'))"
    until(
        lambda: open_.run(drawn) and open_.run("return document.querySelectorAll('#text span').length > 50"), "the page"
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
            _pointer(opened)
            opened.picture(PICTURES / f"report-{width}.png", whole=True)
        opened.collect()
        assert opened.errors == []
        assert set(opened.requests) <= {page.as_uri(), "data:,"}


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


def _pointer(opened: Browser) -> None:
    """Hover tells without moving the focus; a tap moves it; the switch shades anew."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    driver = opened.driver
    opened.run("document.documentElement.style.scrollBehavior = 'auto'")
    opened.run("document.getElementById('text').scrollIntoView({block: 'start'})")
    third, ninth = (driver.find_element(By.ID, f"token-{n}") for n in (3, 9))

    def hovered() -> bool:  # from another token: a pointer that does not move tells nothing
        ActionChains(driver).move_to_element(third).move_to_element(ninth).perform()
        return panel(opened).startswith("Token 10 of")

    until(hovered, "what hover shows")
    assert focused(opened) == 0
    ninth.click()
    assert focused(opened) == 9
    shade = "return [...document.querySelectorAll('#text span')].map((s) => s.style.getPropertyValue('--v'))"
    entropy = opened.run(shade)
    assert len(set(entropy)) > 10
    driver.find_elements(By.CSS_SELECTOR, "#shades input")[1].click()
    assert opened.run(shade) != entropy
