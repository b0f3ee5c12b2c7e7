"""How fast the page is, in Chromium, and pictures of it: docs/page.md, docs/images/page*.png.

    python benchmarks/page.py

With the model that comes along: the seconds until the page is complete, from the click to the first preview, and 30
steps of one image, from the first to the last, against the same by a pipeline alone, which takes turns with it.
"""

import ldm  # noqa: F401  # isort: skip  (before torch: it sets how threads wait)

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from commit import commit
from document import ROOT, write_table
from playwright.sync_api import Browser, Page, expect, sync_playwright

from ldm.config import CONFIGS
from ldm.evaluation.machine import measure_machine, recipe_conv
from ldm.io.atomic import write_text
from ldm.pipeline import Pipeline
from ldm.pipeline.generate import SHIPPED_MODEL

ROUNDS, STEPS = 9, 30
UNSEEN_SECONDS = 1.5  # longer than they take
IDLE_SECONDS = 1.0  # until what was before has ended
PROMPT = "a cat astronaut"
PROMPTS = (PROMPT, "a robot king", "a panda wizard", "an owl detective", "a dog doctor")
RESULTS = ROOT / "benchmarks/results/page.json"
SIZES = {"page": (1280, 900), "page-dark": (1280, 900), "page-narrow": (400, 860)}


@contextmanager
def serving(out: Path) -> Iterator[str]:
    """The address of a server, which is a process of its own."""
    words = [sys.executable, str(ROOT / "scripts/serve.py"), "--port", "0", "--out", str(out)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def open_page(browser: Browser, url: str, **options: Any) -> Page:
    """A page that is ready."""
    page = browser.new_page(**options)
    page.goto(url)
    expect(page.locator("#status")).to_have_text("Ready")
    return page


PREVIEWED = """() => new Promise((resolve) => {
    const stage = document.getElementById("stage");
    const start = performance.now(), first = stage.querySelector("img")?.src;
    new MutationObserver((_, observer) => {
        const image = stage.querySelector("img");
        if (image?.src.startsWith("data:") && image.src !== first) {
            observer.disconnect();
            image.decode().then(() => resolve((performance.now() - start) / 1000));
        }
    }).observe(stage, { subtree: true, childList: true, attributes: true });
    document.getElementById("generate").click();
})"""

SAMPLED = """async (values) => {
    const token = (await (await fetch("/api/session")).json()).token;
    const headers = { "content-type": "application/json", "x-ldm-token": token };
    const status = document.getElementById("status");
    const job = await (await fetch("/api/jobs", { method: "POST", headers, body: JSON.stringify(values) })).json();
    await new Promise((resolve) => {
        let began = false;
        new MutationObserver((_, observer) => {
            began ||= status.textContent === "Sampling";
            if (began && status.textContent === "Ready") { observer.disconnect(); resolve(); }
        }).observe(status, { subtree: true, childList: true, characterData: true });
    });
    return (await (await fetch(`/api/jobs/${job.id}`)).json()).seconds;
}"""


def sampling_alone(pipeline: Pipeline) -> float:
    """The seconds that the steps of an image take."""
    times = [time.perf_counter()]
    pipeline(PROMPT, steps=STEPS, on_step=lambda index, step: times.append(time.perf_counter()))
    return times[-1] - times[0]


def sampling_unseen(url: str) -> float:
    """The same by the server, while nobody looks."""
    with httpx.Client(base_url=url) as client:
        headers = {"x-ldm-token": client.get("/api/session").json()["token"]}
        job = client.post("/api/jobs", json={"prompt": PROMPT, "steps": STEPS}, headers=headers).json()
        time.sleep(UNSEEN_SECONDS)
        return float(client.get(f"/api/jobs/{job['id']}").json()["seconds"])


def measure(browser: Browser, url: str) -> dict[str, float]:
    """Medians of some rounds, in seconds; the first does not count."""
    pipeline = Pipeline.load(SHIPPED_MODEL)
    results: dict[str, list[float]] = {"complete": [], "preview": [], "alone": [], "server": [], "page": []}
    for number in range(ROUNDS + 1):
        unseen = {"alone": lambda: sampling_alone(pipeline), "server": lambda: sampling_unseen(url)}
        for name in sorted(unseen, reverse=number % 2 == 1):
            time.sleep(IDLE_SECONDS)
            results[name].append(unseen[name]())
        start = time.perf_counter()
        page = open_page(browser, url)
        results["complete"].append(time.perf_counter() - start)
        page.locator("[name=prompt]").fill(PROMPT)
        results["preview"].append(page.evaluate(PREVIEWED))
        expect(page.locator("#status")).to_have_text("Ready")
        time.sleep(IDLE_SECONDS)
        results["page"].append(page.evaluate(SAMPLED, {"prompt": PROMPT, "steps": STEPS}))
        page.close()
    return {name: round(statistics.median(values[1:]), 4) for name, values in results.items()}


def rows(seconds: dict[str, float]) -> list[list[str]]:
    """The table."""
    alone = seconds["alone"]
    found = [
        ["the page is complete, with its history", f"{seconds['complete']:.2f} s", ""],
        ["from the click to the first preview", f"{seconds['preview']:.2f} s", ""],
        [f"{STEPS} steps by a pipeline alone", f"{alone:.2f} s", "1"],
    ]
    for name, what in (("server", "by the server, no page open"), ("page", "seen in Chromium on the same two cores")):
        found.append([f"{STEPS} steps {what}", f"{seconds[name]:.2f} s", f"{seconds[name] / alone:.2f}"])
    return found


def viewport(name: str) -> dict[str, int]:
    """The size of a picture."""
    return dict(zip(("width", "height"), SIZES[name], strict=True))


def take_pictures(browser: Browser, url: str) -> None:
    """Of a page that has made some images and makes another, wide, dark and narrow."""
    page = open_page(browser, url, viewport=viewport("page"))
    for prompt in PROMPTS:
        page.locator("[name=prompt]").fill(prompt)
        page.locator("[name=num_images]").fill("3")
        page.locator("#generate").click()
        expect(page.locator("#status")).to_have_text("Ready")
    page.close()
    for name in SIZES:
        page = open_page(browser, url, viewport=viewport(name), color_scheme="dark" if "dark" in name else "light")
        page.locator("[name=prompt]").fill("a fox pirate on a blue background")
        if name == "page-dark":
            page.locator("#settings summary").click()
        page.locator("[name=steps]").evaluate("(field) => { field.value = 200; }")
        page.locator("#generate").click()
        expect(page.locator("#time")).to_have_text(re.compile(r"Step 1[0-9]\d of"))
        page.screenshot(path=ROOT / f"docs/images/{name}.png")
        page.locator("#stop").click()
        expect(page.locator("#status")).to_have_text("Ready")
        page.close()


def main() -> None:
    """Measure, write results/page.json and the table, and take the pictures."""
    speed = measure_machine(recipe_conv(CONFIGS / "characters"))
    program = shutil.which("chromium")
    assert program, "no Chromium: install it (Debian: apt install chromium)"
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        seconds = measure(browser, url)
        take_pictures(browser, url)
        versions = {"torch": torch.__version__, "chromium": browser.version, "commit": commit()}
        browser.close()
    write_text(RESULTS, json.dumps({**speed._asdict(), **versions, "seconds": seconds}, indent=1) + "\n")
    write_table("page", ["what", "time", "ratio"], rows(seconds), ROOT / "docs/page.md")


if __name__ == "__main__":
    main()
