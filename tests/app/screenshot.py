"""Makes docs/app.png with the small world: `python -m tests.app.screenshot docs/app.png`."""

import io
import shutil
import sys
from functools import partial
from pathlib import Path

from PIL import Image

from app.handlers import AppHandlers
from app.page import build_page
from app.server import private_files, serve
from app.studio import Studio
from elite.data import PairFolder
from elite.files import write_atomically
from elite.pipeline import ElitePipeline
from tests.conftest import REPOSITORY

EXAMPLE = "striped_mug_yellow_blue"
PROMPTS = "a S on the grass\na S on the beach"
COLOURS = 128  # a smaller file


def take(url: str, example: int) -> Image.Image:
    """The page after a drawing, as a visitor would see it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(300_000)
        page.goto(url)
        page.locator("#examples button").nth(example).click()
        page.wait_for_selector("#views img")
        page.fill("#prompts textarea", PROMPTS)
        page.get_by_role("button", name="More settings").click()
        page.fill("#seed input", "1")
        page.get_by_role("button", name="More settings").click()
        page.click("#draw")
        page.wait_for_selector("#stop_button:enabled")
        page.wait_for_selector("#draw:enabled")
        page.wait_for_timeout(2000)  # pictures fade in
        content = page.screenshot(full_page=True)
        browser.close()
    return Image.open(io.BytesIO(content)).convert("RGB")


def main(path: Path) -> None:
    pipe = ElitePipeline.from_stable_diffusion(REPOSITORY / "checkpoints/small_world")
    pipe.set_progress_bar_config(disable=True)
    examples = PairFolder(REPOSITORY / "test_datasets")
    example = [pair.name for pair in examples.pairs].index(EXAMPLE)
    with private_files():
        page = build_page(AppHandlers(Studio(pipe), examples))
        url = serve(page, prevent_thread_lock=True, quiet=True)
        picture = take(url, example).quantize(COLOURS)
        page.close()
    write_atomically(path, partial(picture.save, optimize=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
