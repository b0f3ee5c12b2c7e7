"""The page in a browser: Chromium, without a window."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import encoded, plain
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from servers import Running, running_server

from ldm.pipeline.record import read_png
from ldm.server.runner import ModelRunner

pytestmark = pytest.mark.browser
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}  # pixels


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "no Chromium: install it (Debian: apt install chromium)"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """With the model that comes along."""
    monkeypatch.chdir(tmp_path)
    with running_server(out=Path("out")) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """A page that is ready; no request may leave the server, and nothing may fail but what a test fails on purpose."""
    page = browser.new_page(viewport=WIDE)  # type: ignore[arg-type]
    page.set_default_timeout(20_000)
    errors, requests = list[str](), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server.url)
    expect(page.locator("#status")).to_have_text("Ready")
    yield page
    page.close()
    assert not [error for error in errors if "status of 422" not in error]
    assert requests and all(url.startswith((server.url, "data:image/", "blob:")) for url in requests)


def made(page: Page) -> Locator:
    """The images of the history."""
    return page.locator("#history img")


def generate(page: Page, prompt: str = "a cat astronaut") -> None:
    """Ask for an image, and wait for it."""
    before = made(page).count()
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()
    expect(made(page)).to_have_count(before + 1)
    expect(page.locator("#status")).to_have_text("Ready")  # with its film


def paths() -> list[Path]:
    """The images on the disk, oldest first."""
    return sorted(path for path in Path("out").glob("*.png"))


def drop(page: Page, data: bytes, target: str = "body") -> None:
    """Drop a PNG on a part of the page."""
    page.evaluate(
        """([bytes, target]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "x.png", { type: "image/png" }));
            const event = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            document.querySelector(target).dispatchEvent(event);
        }""",
        [list(data), target],
    )


def wait_until(page: Page, expression: str) -> None:
    """Ask until it is true; the page itself evaluates no text, which its policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(expression)


def test_previews_arrive_step_by_step_then_the_image(page: Page) -> None:
    page.evaluate(
        """() => {
            window.seen = new Set();
            new MutationObserver(() => document.querySelectorAll("#stage img").forEach((image) => seen.add(image.src)))
                .observe(document.getElementById("stage"), { subtree: true, childList: true, attributes: true });
        }"""
    )
    page.locator("#settings summary").click()
    page.locator("[name=steps]").fill("200")
    generate(page)
    seen = page.evaluate("[...seen]")
    assert len([source for source in seen if source.startswith("data:image/")]) >= 6
    expect(page.locator("#stage img")).to_have_attribute("src", re.compile(r"/api/images/[\w-]+/file$"))
    expect(page.locator("#caption")).to_have_text("a cat astronaut")
    assert page.locator("#stage img").evaluate("(image) => image.naturalWidth") == 64


def test_stop_keeps_the_image_and_skip_leaves_it_out(page: Page, server: Running) -> None:
    page.locator("#settings summary").click()
    page.locator("[name=steps]").fill("200")
    page.locator("[name=batch_size]").fill("1")
    page.get_by_label("Images", exact=True).fill("30")
    page.get_by_label("Prompt", exact=True).fill("a dog")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#time")).to_have_text(re.compile(r"Step \d+ of 6000, \d+ (s|min) left"))
    assert 0 < page.locator("#progress").evaluate("(bar) => bar.value") < 1
    page.get_by_role("button", name="Skip").click()
    expect(page.locator("#time")).to_have_text(re.compile(r"Step [2-9]\d\d of 6000"))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Ready")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    made(page).first.click()
    expect(page.locator("#made")).to_contain_text("after step")
    stopped, first = read_png(paths()[-1]), read_png(paths()[0])
    assert stopped.stopped_after is not None
    asked = int(page.locator("[name=seed]").input_value())
    assert first.seed > asked  # the first image was skipped


def test_it_says_that_a_model_loads(page: Page, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    load = ModelRunner.load
    monkeypatch.setattr(ModelRunner, "load", lambda self, path: time.sleep(1) or load(self, path))
    page.get_by_label("Prompt", exact=True).fill("a cat")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#time")).to_have_text("Loading the model…")
    expect(made(page)).to_have_count(1)
    expect(page.locator("#status")).to_have_text("Ready")


def test_jobs_wait_in_the_queue_and_a_second_tab_finds_them(page: Page, browser: Browser, server: Running) -> None:
    page.locator("#settings summary").click()
    for name, value in (("steps", "200"), ("num_images", "64"), ("batch_size", "1")):
        page.locator(f"[name={name}]").fill(value)
    for prompt in ("a dog", "a cat", "a fox"):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_role("button", name="Generate").click()
    queue = page.locator("#queue li")
    expect(queue).to_have_text([re.compile("a cat"), re.compile("a fox")])
    page.reload()  # in mid-job
    expect(page.locator("#time")).to_have_text(re.compile(r"Step \d+ of 12800"))
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a fox")
    other = browser.new_page()
    other.goto(server.url)
    expect(other.locator("#time")).to_have_text(re.compile(r"Step \d+ of 12800"))
    other.get_by_role("button", name="Cancel").last.click()
    expect(queue).to_have_count(1)
    other.close()
    for _ in range(2):
        page.get_by_role("button", name="Stop").click()
        page.wait_for_timeout(300)
    expect(page.locator("#status")).to_have_text("Ready")


def test_a_dropped_png_brings_all_settings_back(page: Page) -> None:
    page.locator("#settings summary").click()
    values = {
        "steps": "3",
        "sampler": "euler",
        "guidance_scale": "2",
        "timesteps": "linspace",
        "negative_prompt": "red",
    }
    for name, value in (values | {"guidance.method": "apg", "variation_seed": "9"}).items():
        field = page.locator(f"[name='{name}']")
        field.select_option(value) if name in ("sampler", "guidance.method") else field.fill(value)
    page.locator("[name=seed]").fill("11")
    page.get_by_label("Keep seed").check()
    generate(page)
    data = paths()[0].read_bytes()
    page.get_by_role("button", name="Reset all settings").click()
    expect(page.locator("[name=steps]")).to_have_value("")
    drop(page, data)
    for name, value in values.items():
        expect(page.locator(f"[name='{name}']")).to_have_value(value)
    expect(page.get_by_label("Keep seed")).to_be_checked()
    generate(page)
    with Image.open(paths()[0]) as first, Image.open(paths()[1]) as second:
        assert first.tobytes() == second.tobytes()


def test_a_mask_is_painted_by_mouse_and_by_keyboard(page: Page) -> None:
    drop(page, encoded(plain((0, 128, 255), (64, 64))))
    mask = page.locator("#mask")
    expect(mask).to_be_visible()
    box = mask.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    page.get_by_label("Strength", exact=True).fill("1")
    generate(page)
    with Image.open(paths()[0]) as image:
        assert image.getpixel((60, 60)) == (0, 128, 255)
        assert image.getpixel((16, 24)) != (0, 128, 255)
    page.get_by_role("button", name="Clear mask").click()
    mask.focus()  # the brush is where it was: move it to the right edge
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    page.reload()  # which brings the mask back, too
    painted = "document.getElementById('mask').getContext('2d').getImageData({}, 32, 1, 1).data[3] === {}"
    wait_until(page, painted.format(62, 255))
    generate(page)
    with Image.open(paths()[1]) as image:
        assert image.getpixel((16, 24)) == (0, 128, 255)
        assert image.getpixel((62, 32)) != (0, 128, 255)
    record = read_png(paths()[1])
    assert record.init_image and record.init_image.mask
    page.get_by_role("button", name="Remove image").click()
    drop(page, paths()[1].read_bytes())  # the image and its mask come back, too
    wait_until(page, painted.format(62, 255))
    assert page.evaluate(painted.format(16, 0))
    expect(page.get_by_label("Strength", exact=True)).to_have_value("1")


def test_an_image_is_varied_outpainted_and_started_from(page: Page) -> None:
    generate(page)
    made(page).first.click()
    page.get_by_role("button", name="Variations").click()
    expect(made(page)).to_have_count(6)  # four, and their sheet
    seeds = [read_png(path).variation_seed for path in paths()[1:5]]
    assert len(set(seeds)) == 4 and {read_png(path).seed for path in paths()[:5]} == {read_png(paths()[0]).seed}
    made(page).first.click()
    expect(page.get_by_role("button", name="Variations")).to_be_hidden()  # of a sheet
    page.get_by_role("button", name="Close").click()
    made(page).last.click()
    page.get_by_role("button", name="Start from it").click()
    page.locator("[name='outpaint.2']").fill("64")
    generate(page)
    assert Image.open(paths()[-1]).size == (128, 64)
    page.get_by_role("button", name="Remove image").click()
    drop(page, paths()[0].read_bytes(), "#start summary")  # where it is an image, not its settings
    expect(page.locator("#source")).to_be_visible()
    expect(page.locator("[name=seed]")).not_to_have_value(str(read_png(paths()[0]).seed))


def test_a_grid_varies_two_settings(page: Page) -> None:
    page.locator("#grid summary").click()
    for name, setting, values in (("x", "steps", "1; 2; 3"), ("y", "prompt", "a cat; a dog")):
        page.locator(f"[name='{name}.setting']").select_option(setting)
        page.locator(f"[name='{name}.values']").fill(values)
    page.get_by_label("Prompt", exact=True).fill("a cat")
    page.get_by_role("button", name="Generate").click()
    expect(made(page)).to_have_count(7)
    made(page).first.click()
    page.get_by_role("button", name="Use its settings").click()
    expect(page.locator("[name='x.values']")).to_have_value("1; 2; 3")
    assert [read_png(path).steps for path in paths()[:3]] == [1, 2, 3]


def test_the_denoising_of_an_image_is_a_film(page: Page) -> None:
    generate(page)
    made(page).click()
    page.get_by_role("button", name="Denoising").click()
    slider = page.locator("#film-slider")
    expect(slider).to_have_value("12")
    read = "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    last = [page.locator(canvas).evaluate(read) for canvas in ("#state", "#guess")]
    slider.focus()
    for _ in range(11):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#film-step")).to_have_text("After step 1 of 12")
    first = [page.locator(canvas).evaluate(read) for canvas in ("#state", "#guess")]
    distance = [
        sum(abs(a - b) for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in zip(first, last, strict=True)
    ]
    assert distance[0] > 1.5 * distance[1] > 0  # the state is noise at first, the guess is not
    page.get_by_role("button", name="Play").click()
    expect(slider).to_have_value("12")


def test_it_works_with_a_keyboard_alone(page: Page) -> None:
    def tab_to(target: Locator) -> None:
        for _ in range(80):
            if target.evaluate("(element) => element === document.activeElement"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"no Tab leads to {target}")

    tab_to(page.get_by_label("Prompt", exact=True))
    page.keyboard.type("a cat astronaut")
    page.keyboard.press("Control+Enter")
    expect(made(page)).to_have_count(1)
    tab_to(page.locator("#settings summary"))
    page.keyboard.press("Enter")
    tab_to(page.locator("[name=steps]"))
    page.keyboard.type("2")
    page.keyboard.press("Enter")  # in a field, too
    expect(made(page)).to_have_count(2)
    assert read_png(paths()[1]).steps == 2
    tab_to(page.locator("#history button").first)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    tab_to(page.get_by_role("button", name="Denoising"))
    page.keyboard.press("Enter")
    expect(page.locator("#film")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    for selector in ("#file", "#mask", "#stop", "#reset"):
        assert page.locator(selector).evaluate("(element) => element.tabIndex") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_colour_schemes(browser: Browser, server: Running, scheme: str) -> None:
    page = browser.new_page(viewport=NARROW, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(server.url)
    for summary in page.locator("form summary").all():
        summary.click()
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    made(page).click()
    page.get_by_role("button", name="Denoising").click()
    expect(page.locator("#film")).to_be_visible()
    assert page.locator("dialog").evaluate("(dialog) => dialog.scrollWidth <= dialog.clientWidth")
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    page_shade, text_shade = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
    assert page_shade > 200 > 60 > text_shade if scheme == "light" else page_shade < 60 < 200 < text_shade
    page.close()


def test_html_in_a_prompt_is_text_everywhere(page: Page, server: Running) -> None:
    prompt = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
    generate(page, prompt)
    expect(page.locator("#caption")).to_contain_text("words never seen in training")
    made(page).click()
    expect(page.locator("#made")).to_contain_text("<script>")
    page.reload()
    expect(made(page)).to_have_count(1)
    expect(made(page)).to_have_attribute("alt", prompt)
    for _ in range(2):
        server.submit(prompt, steps=200, num_images=64)
    expect(page.locator("#queue li")).to_contain_text("<script>")
    assert page.title() == "ldm" and page.locator("img[src=x]").count() == 0


def test_errors_are_said_and_nothing_is_lost(page: Page, server: Running) -> None:
    page.get_by_label("Prompt", exact=True).fill("a cat")
    page.locator("#settings summary").click()
    page.locator("[name=width]").fill("17")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#message")).to_contain_text("must be multiples of")
    page.locator("[name=width]").fill("9999")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#message")).to_contain_text("width: Input should be less than or equal to 2048 (got 9999)")
    drop(page, b"<svg/>")
    expect(page.locator("#message")).to_have_text("not a PNG, JPEG or WEBP image")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a cat")
    page.locator("[name=width]").fill("")
    generate(page)
    expect(page.locator("#message")).to_have_text("")


def test_the_api_has_a_page(page: Page, server: Running) -> None:
    page.goto(f"{server.url}/docs")
    expect(page.locator(".opblock-summary-post")).to_have_count(4)
