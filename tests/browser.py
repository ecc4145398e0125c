"""A real headless Chromium for tests: what it logs, what it asks the network for, and pictures of what it shows.

Needs Debian's `chromium` and `chromium-driver` (the Makefile installs them where it may). Where they are missing the
tests that need them fail and say so, unless STILLROOM_WITHOUT_CHROMIUM=1 leaves them out.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--hide-scrollbars", "--force-color-profile=srgb",
)  # fmt: skip

#: To be put on a test that opens a browser.
NEEDED = pytest.mark.skipif(
    os.environ.get("STILLROOM_WITHOUT_CHROMIUM") == "1", reason="STILLROOM_WITHOUT_CHROMIUM=1 leaves out the browser"
)


class Browser:
    """One window. errors: what its pages logged, warnings too; requests: all that they asked for, themselves included.

    What the browser asks for on its own account, for its empty tab, is not among them.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.requests: list[str] = []
        self.errors: list[str] = []

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file at this width of the page itself, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get_log("browser"), self.driver.get_log("performance")
        self.driver.get(page.as_uri())
        self.collect()

    def collect(self) -> None:
        """Add what was logged and asked for since."""
        for entry in self.driver.get_log("browser"):
            if entry["level"] not in ("INFO", "DEBUG"):
                self.errors.append(f"{entry['level']}: {entry['message']}")
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            asked = message["params"] if message["method"] == "Network.requestWillBeSent" else {}
            if not asked.get("documentURL", "chrome:").startswith("chrome"):
                self.requests.append(asked["request"]["url"])

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is shown, or of the whole page."""
        import base64

        path.parent.mkdir(parents=True, exist_ok=True)
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """Start one; fails with the remedy where it is not installed. Nothing is downloaded."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.fail(
            "chromium and chromedriver are not installed: apt-get install chromium chromium-driver, or set "
            "STILLROOM_WITHOUT_CHROMIUM=1 to leave these tests out"
        )
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(prefix="stillroom-browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        started = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield Browser(started)
        finally:
            started.quit()
