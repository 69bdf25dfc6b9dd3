"""Take the pictures of the README: pages of the server, and the index of a report.

    python tools/screenshots.py --report reports/2026-11-22
    python tools/screenshots.py race

Needs the ``dev`` extra and Chromium. Writes ``docs/PAGE.png`` for the pages named, all by default, and with
``--report`` also ``docs/report.png``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from orthokit.figures import browser_path

DOCS = Path(__file__).parents[1] / "docs"
PORT = 5077


def wait_for(url: str, seconds: float = 60.0) -> None:
    """Return once the server answers."""
    until = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.3)


def momentum(page: Page) -> None:
    """The page with its settings in the address."""
    page.goto(f"http://127.0.0.1:{PORT}/momentum?beta=0.9")
    page.get_by_text("Up to date").wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=DOCS / "momentum.png")


def race(page: Page) -> None:
    """A whole race at the rates tuned for one."""
    page.goto(f"http://127.0.0.1:{PORT}/race?racers=adamw,muon_pre,pion,poet&track=cnn&steps=60")
    page.get_by_text("Ready: press Start").wait_for(timeout=60_000)
    page.get_by_role("button", name="Start").click()
    page.get_by_text("Finished").wait_for(timeout=600_000)
    page.wait_for_timeout(1500)
    page.screenshot(path=DOCS / "race.png", full_page=True)


def adapters(page: Page) -> None:
    """A short series at an angle where it shows."""
    page.goto(f"http://127.0.0.1:{PORT}/adapters?map=cayley_neumann&angle=0.5")
    page.get_by_text("Up to date").wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=DOCS / "adapters.png", full_page=True)


def forgetting(page: Page) -> None:
    """A recorded run, part of its way back."""
    page.goto(f"http://127.0.0.1:{PORT}/forgetting?alpha=0.4")
    page.get_by_text("Ready: choose a run").wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=DOCS / "forgetting.png", full_page=True)


def inspect(page: Page) -> None:
    """A rotated TinyGPT against its base."""
    asked = "model=tinygpt-oft&base=tinygpt&groups=change&column=rotation_angle&second=tinygpt-lora"
    page.goto(f"http://127.0.0.1:{PORT}/inspect?{asked}")
    page.get_by_text("Up to date:").first.wait_for()
    page.wait_for_timeout(2500)
    page.screenshot(path=DOCS / "inspect.png", full_page=True)


def merge(page: Page) -> None:
    """Three experts merged, with the record beside."""
    page.goto(f"http://127.0.0.1:{PORT}/merge?part=test")
    page.get_by_text("Ready: press").wait_for()
    page.get_by_role("button", name="Train and merge").click()
    page.get_by_text("Up to date").wait_for(timeout=600_000)
    page.wait_for_timeout(1500)
    page.screenshot(path=DOCS / "merge.png", full_page=True)


PAGES = {"momentum": momentum, "race": race, "adapters": adapters, "forgetting": forgetting}
PAGES |= {"merge": merge, "inspect": inspect}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(PAGES)}; default all")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.pages) - PAGES.keys():
        parser.error(f"no page {', '.join(sorted(unknown))}; there are {', '.join(PAGES)}")
    DOCS.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "orthokit.cli", "dash", "--port", str(PORT), "--no-open"]
    server = subprocess.Popen(command)
    try:
        wait_for(f"http://127.0.0.1:{PORT}/")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            for name in arguments.pages or PAGES:
                PAGES[name](page)
            if arguments.report:
                page.goto((arguments.report.resolve() / "index.html").as_uri())
                page.screenshot(path=DOCS / "report.png")
            browser.close()
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
