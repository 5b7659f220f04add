"""Headless Chromium without a network: opens a page from a file, and says what it shows, logs and asks for."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NOT_CHECKED = "not checked: no chromium"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
UNHEARD = """
    const found = [], all = (selector) => [...document.querySelectorAll(selector)];
    const levels = all("h1, h2, h3, h4").map(head => Number(head.tagName[1]));
    if (levels[0] !== 1 || levels.some((level, i) => i && level > levels[i - 1] + 1)) found.push(`headings ${levels}`);
    if (all("main").length !== 1 || !document.documentElement.lang || !document.title) found.push("main, lang, title");
    all("img").filter(i => i.alt.length < 10).forEach(i => found.push(`image without words: ${i.alt}`));
    all("video, input, [role=region]").filter(e => !e.ariaLabel).forEach(e => found.push(`no label: ${e.outerHTML}`));
    all("th").filter(t => !t.scope || !t.textContent.trim()).forEach(t => found.push(`heading cell: ${t.outerHTML}`));
    all("tbody tr").filter(r => !r.querySelector("th")).forEach(r => found.push(`no row heading: ${r.innerText}`));
    all("a[href^='#']").filter(a => !document.getElementById(a.hash.slice(1))).forEach(a => found.push(a.outerHTML));
    all("body *").filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX === "auto"
        && e.tabIndex < 0).forEach(e => found.push(`scrolls by mouse alone: ${e.className}`));
    return found"""
LOGS = {"browser": "ALL", "performance": "ALL"}


def missing(found: Any = shutil.which, environment: Any = os.environ) -> str:
    """Nothing if Chromium and its driver are there; else why not, as a failure in CI, which must not skip this."""
    names = [name for name in ("chromium", "chromedriver") if not found(name)]
    if not names:
        return ""
    words = f"{NOT_CHECKED} ({', '.join(names)} not on PATH; Debian: chromium, chromium-driver)"
    if environment.get("CI") == "true":
        pytest.fail(words)
    return words


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile in ``profile``; the programs are Debian's, nothing is downloaded."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", LOGS)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(shutil.which("chromedriver"))))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """A driver with the few questions that the tests ask."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.console: list[str] = []
        self.asked: list[str] = []

    def open(self, page: Path, width: int, height: int = 844, dark: bool = False) -> None:
        """Show a file at that many CSS pixels; what it logs and asks for begins anew."""
        self.logs()
        self.console, self.asked = [], []
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.resolve().as_uri())
        self.logs()

    def logs(self) -> None:
        """Collect the console's lines and the addresses of all requests so far."""
        self.console += [f"{line['level']}: {line['message']}" for line in self.driver.get_log("browser")]
        for line in self.driver.get_log("performance"):
            message = json.loads(line["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])

    def ask(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript function's body."""
        return self.driver.execute_script(script, *arguments)

    def unfold(self) -> None:
        """Open the folded runs, and wait until they are drawn."""
        self.driver.execute_async_script("""const done = arguments[0];
            document.querySelectorAll('details.run').forEach(run => run.open = true);
            requestAnimationFrame(() => requestAnimationFrame(done))""")

    def picture(self) -> np.ndarray[Any, Any]:
        """The whole page, not only the window, ``[H, W, 3]`` uint8."""
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "fromSurface": True}
        )
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))

    def unheard(self) -> list[str]:
        """What a screen reader, or somebody without a mouse, would miss on the page."""
        return list(self.ask(UNHEARD))

    def boxes(self, selector: str) -> list[tuple[int, int, int, int]]:
        """Left, top, right, bottom of all elements that match, in pixels of :meth:`picture`."""
        script = """return [...document.querySelectorAll(arguments[0])].map(e => {
            const b = e.getBoundingClientRect();
            return [b.left + scrollX, b.top + scrollY, b.right + scrollX, b.bottom + scrollY].map(Math.round)})"""
        return [tuple(box) for box in self.ask(script, selector)]
