"""The page in a real browser, from the upload to the picture.

`ELITE_SCREENSHOTS=FOLDER` keeps a screenshot of each test's end.
"""

import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.marking import Marks, read_marks
from app.studio import Clock
from tests.app.conftest import noise_file

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium")
sync_api = pytest.importorskip("playwright.sync_api")

PATIENCE = 60_000  # milliseconds, on a machine that others use too
DESKTOP, PHONE = {"width": 1280, "height": 1700}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, served, request):
    """Opens the page; at the end nothing was fetched from elsewhere and no script has failed."""
    pages, failures, elsewhere = [], [], []

    def open_page(viewport=DESKTOP, **options):
        page = browser.new_page(viewport=viewport, **options)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("request", lambda sent: elsewhere.append(sent.url))
        page.goto(served[1])
        page.wait_for_selector("#draw")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        if folder := os.environ.get("ELITE_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / f"{request.node.name}.png", full_page=True)
        page.close()
    assert not failures
    assert [url for url in elsewhere if not url.startswith((served[1], "data:", "blob:"))] == []


@pytest.fixture
def disc(tmp_path) -> Path:
    """A red disc on green, which GrabCut finds."""
    y, x = np.mgrid[:64, :64]
    inside = np.hypot(x - 32, y - 32) < 16
    picture = np.where(inside[..., None], np.uint8((220, 60, 40)), np.uint8((60, 170, 70)))
    noise = np.random.default_rng(0).integers(0, 12, picture.shape, dtype=np.uint8)
    Image.fromarray(picture + noise).save(tmp_path / "disc.png")
    return tmp_path / "disc.png"


def upload(page, path: Path, control: str = "picture") -> None:
    page.set_input_files(f"#{control} input[type=file]", path)


def views(page) -> list[np.ndarray]:
    """What the model sees, once it is there."""
    page.wait_for_selector("#views img")
    return fetched(page, "#views img")


@contextmanager
def another_view(page, number: int) -> Iterator[None]:
    """Ends once what is done within it has changed this view of the model's."""
    old = page.locator("#views img").nth(number).get_attribute("src")
    yield
    page.wait_for_function(
        "([number, old]) => document.querySelectorAll('#views img')[number]?.src !== old",
        arg=[number, old],
    )


def fetched(page, selector: str, tries: int = 5) -> list[np.ndarray]:
    """Pictures of the page; asked for again where the server is just writing one anew."""
    try:
        links = [image.get_attribute("src") for image in page.locator(selector).all()]
        contents = [page.request.get(link).body() for link in links]
        return [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents]
    except (sync_api.Error, OSError):
        if tries == 1:
            raise
    page.wait_for_timeout(300)
    return fetched(page, selector, tries - 1)


def drag(page, *points: tuple[float, float], steps: int = 6) -> None:
    """The mouse over the marked picture; shares of its side."""
    page.locator("#marks canvas").scroll_into_view_if_needed()
    area = page.locator("#marks canvas").bounding_box()
    places = [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=steps)
    page.mouse.up()


def choose(page, text: str) -> None:
    radio = page.get_by_label(text, exact=True)
    radio.click()
    sync_api.expect(radio).to_be_checked()  # when the page has answered


def settings(page, **numbers: float) -> None:
    """Types numbers into the controls of these names."""
    if "steps" in numbers or "seed" in numbers:
        page.get_by_role("button", name="More settings").click()
    for name, number in numbers.items():
        type_number(page, name, number)


def type_number(page, name: str, number: float, tries: int = 10) -> None:
    """Types a number until it stays: a control that has just come into sight may still be given its
    first value, and keep that."""
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(number))
    field.blur()
    page.wait_for_timeout(300)
    shown = [float(part.input_value()) for part in page.locator(f"#{name} input").all()]
    if all(value == number for value in shown):  # the slider as well
        return
    assert tries > 1, f"{name} shows {shown} instead of {number}"
    type_number(page, name, number, tries - 1)


# Counts how often Stop goes on or off: twice for each piece of work, however quick it is.
COUNT_TURNS = """() => {
    window.turns = 0;
    window.counter?.disconnect();
    window.counter = new MutationObserver(records => { window.turns += records.length; });
    window.counter.observe(
        document.querySelector("#stop_button"), {attributeFilter: ["disabled"]});
}"""


def draw(page, button: str = "draw") -> list[np.ndarray]:
    """Presses the button; the pictures of the gallery once all are there."""
    page.wait_for_selector("#draw:enabled")
    page.evaluate(COUNT_TURNS)
    page.click(f"#{button}")
    page.wait_for_function("window.turns >= 2")
    return fetched(page, "#gallery .grid-container img")


def said(page, control: str, text: str | re.Pattern) -> None:
    sync_api.expect(page.locator(f"#{control}")).to_contain_text(text, timeout=PATIENCE)


def test_upload_paint_draw_and_weigh(visit, disc):
    page = visit()
    upload(page, disc)
    views(page)
    choose(page, "Where I paint")
    said(page, "object_message", "nothing is marked")
    drag(page, (0.2, 0.5), (0.8, 0.5))
    said(page, "object_message", "")
    page.wait_for_selector("#views img")
    picture, cut_out, _ = views(page)
    kept = (cut_out > 8).any(axis=2)
    assert kept[14:18, 8:24].all() and not kept[:10].any() and not kept[22:].any()
    assert np.abs(cut_out[16, 10:22].astype(int) - picture[16, 10:22]).max() < 40

    settings(page, steps=2, seed=7, count=1)
    first = draw(page)
    said(page, "status", "1 pictures, seed 7")
    again = draw(page)
    settings(page, lambda_=0)
    other = draw(page)
    assert [one.shape for one in first] == [(32, 32, 3)] * 2
    assert np.array_equal(first[1], again[1]) and not np.array_equal(first[1], other[1])

    page.locator("#gallery .grid-container button").nth(1).click()
    with page.expect_download() as download:
        page.locator("#gallery").get_by_label("Download", exact=True).first.click()
    with Image.open(download.value.path()) as saved:
        assert saved.text["seed"] == "7" and saved.text["lambda"] == "0"
        assert np.array_equal(np.asarray(saved), other[1])


def test_slow_brushing_sends_few_points(visit, disc, monkeypatch):
    """Else minutes of it would be more than MAX_POINTS, and all of it refused."""
    read: list[Marks] = []

    def reading(text: str) -> Marks:
        read.append(read_marks(text))
        return read[-1]

    monkeypatch.setattr("app.handlers.read_marks", reading)
    page = visit()
    upload(page, disc)
    views(page)
    choose(page, "Where I paint")
    said(page, "object_message", "nothing is marked")
    drag(page, (0.3, 0.5), (0.5, 0.5), (0.5, 0.7), steps=100)
    said(page, "object_message", "")
    page.wait_for_selector("#views img")
    (stroke,) = read[-1].strokes
    assert 0.4 / stroke.width < len(stroke.points) < 60  # of 200 events
    assert np.abs(np.subtract(stroke.points[-1], (0.5, 0.7))).max() < 0.01, "a pixel or two"


def test_a_box_by_mouse_and_strokes_on_top(visit, disc):
    page = visit()
    upload(page, disc)
    views(page)
    choose(page, "In a box (refined by GrabCut)")
    said(page, "object_message", "no box yet")
    drag(page, (0.1, 0.1), (0.9, 0.9))
    before = views(page)[1]
    page.get_by_role("button", name="Erase").click()
    with another_view(page, 1):
        drag(page, (0.3, 0.3), (0.7, 0.7))
    after = views(page)[1]
    assert (after > 8).any(axis=2).sum() < (before > 8).any(axis=2).sum()


def test_everything_works_by_keyboard(visit, disc):
    page = visit()
    upload(page, disc)
    views(page)
    settings(page, steps=2)
    page.get_by_label("In the middle (found by GrabCut)").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    said(page, "object_message", "no box yet")
    page.locator("#marks canvas").focus()
    for key, times in (("ArrowLeft", 18), ("ArrowUp", 18), (" ", 1)):
        for _ in range(times):
            page.keyboard.press(key)
    for key, times in (("ArrowRight", 36), ("ArrowDown", 36), ("Enter", 1)):
        for _ in range(times):
            page.keyboard.press(key)
    views(page)
    page.locator("#prompts textarea").focus()
    for _ in range(24):
        if page.evaluate("document.activeElement.id") == "draw":
            break
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "draw"
    page.keyboard.press("Enter")
    said(page, "status", "2 pictures, seeds")


def test_mistakes_are_said_in_the_page(visit, pairs, tmp_path):
    page = visit()
    page.locator("#examples button").nth(1).click()
    views(page)
    page.fill("#prompts textarea", "a photo of <b>it</b>")
    said(page, "prompt_message", "prompt 'a photo of <b>it</b>' has no placeholder 'S'")
    page.click("#draw")
    said(page, "status", "has no placeholder 'S'")
    page.fill("#prompts textarea", "a S, red")
    sync_api.expect(page.locator("#prompt_message [role=alert]")).to_have_count(0)

    (tmp_path / "broken.png").write_bytes((pairs / "pair0.png").read_bytes()[:300])
    page.locator("#picture").get_by_label("Remove Image").click()
    upload(page, tmp_path / "broken.png")
    said(page, "object_message", "broken.png: not a readable image")
    page.locator("#picture").get_by_label("Remove Image").click()
    upload(page, noise_file(tmp_path / "large.png", 400, 300))
    said(page, "object_message", "more than 0.1 million pixels")
    assert "Traceback" not in page.content()


def test_stop_stops(visit, pairs, monkeypatch):
    step = Clock.__call__

    def slowly(clock: Clock) -> None:
        time.sleep(0.03)  # of which the browser, in need of the same cores, has its share
        step(clock)

    monkeypatch.setattr(Clock, "__call__", slowly)
    page = visit()
    page.locator("#examples button").nth(0).click()
    views(page)
    settings(page, steps=150, count=8)
    page.click("#draw")
    said(page, "status", re.compile(r"about \d+ s left"))
    page.locator("#gallery .grid-container button").nth(1).wait_for()
    page.click("#stop_button")
    said(page, "status", "stopped after")
    drawn = int(re.search(r"after (\d+)", page.inner_text("#status")).group(1))
    assert 1 <= drawn < 8
    assert len(page.locator("#gallery .grid-container button").all()) == 1 + drawn
    page.wait_for_selector("#draw:enabled")


@contextmanager
def busy(visit, monkeypatch) -> Iterator:
    """Another person's page, whose drawing ends where this does."""
    step, going = Clock.__call__, [True]

    def slowly(clock: Clock) -> None:
        while going[0] and clock.done == 1:
            time.sleep(0.05)
        step(clock)

    monkeypatch.setattr(Clock, "__call__", slowly)
    page = visit()
    page.locator("#examples button").nth(0).click()
    views(page)
    settings(page, steps=2, count=1)
    page.click("#draw")
    said(page, "status", "left")
    try:
        yield page
    finally:
        going[0] = False
    page.wait_for_selector("#draw:enabled")
    said(page, "status", "1 pictures")


def test_who_waits_sees_it_and_may_stop(visit, monkeypatch):
    """And is not drawn for later."""
    page = visit()
    page.locator("#examples button").nth(0).click()
    views(page)
    settings(page, steps=2, count=1)
    with busy(visit, monkeypatch):
        page.click("#draw")
        said(page, "status", "queue: 1/1")
        sync_api.expect(page.locator("#status .progress-text")).to_be_visible()
        page.click("#stop_button")
        page.wait_for_selector("#draw:enabled")
        said(page, "status", "stopped before it began")
        assert not page.locator("#stop_button").is_enabled()
    page.wait_for_timeout(500)
    said(page, "status", "stopped before it began")
    assert len(draw(page)) == 2


def test_no_file_of_an_earlier_object_comes_late(visit, monkeypatch):
    page = visit()
    page.locator("#examples button").nth(0).click()
    views(page)
    page.get_by_role("button", name="Keep the object as a file").click()
    with busy(visit, monkeypatch):
        page.click("#save")
        page.wait_for_timeout(500)
        with another_view(page, 0):
            page.locator("#examples button").nth(1).click()
    page.wait_for_timeout(3000)
    sync_api.expect(page.locator("#saved a")).to_have_count(0)
    page.click("#save")
    page.locator("#saved a").first.wait_for()


def test_drawing_again_shows_all_pictures(visit):
    """Though one of the last was enlarged."""
    page = visit()
    page.locator("#examples button").nth(0).click()
    views(page)
    settings(page, steps=2, count=1)
    draw(page)
    page.locator("#gallery .grid-container button").nth(1).click()
    page.locator("#gallery .preview").wait_for()
    assert len(draw(page)) == 2
    sync_api.expect(page.locator("#gallery .preview")).to_have_count(0)


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_captions_are_below_pictures(visit, width):
    page = visit({"width": width, "height": 844})
    page.locator("#examples button").nth(0).click()
    views(page)
    page.fill("#prompts textarea", "a S on the grass of a wide meadow\na S on the beach")
    settings(page, steps=2, count=2)
    draw(page)
    frame = page.locator("#gallery").bounding_box()
    for item in page.locator("#gallery .grid-container button").all():
        image, caption = (item.locator(part).bounding_box() for part in ("img", ".caption-label"))
        assert image["y"] + image["height"] <= caption["y"] + 1
        below = item.bounding_box()
        assert caption["y"] + caption["height"] <= below["y"] + below["height"] + 1
        for part in (image, caption):
            assert frame["x"] <= part["x"]
            assert part["x"] + part["width"] <= frame["x"] + frame["width"] + 1
        text = item.locator(".caption-label")
        assert text.evaluate("one => one.scrollWidth <= one.clientWidth + 1")
    if folder := os.environ.get("ELITE_SCREENSHOTS"):
        page.locator("#gallery").screenshot(path=Path(folder) / f"captions_{width}.png")


def test_the_sweep_is_one_strip(visit):
    page = visit()
    page.locator("#examples button").nth(2).click()
    views(page)
    settings(page, steps=2)
    assert len(draw(page, "sweep")) == 8
    page.wait_for_selector("#strip img")
    (strip,) = fetched(page, "#strip img")
    assert strip.shape[1] == 8 * 160


def test_oblong_pictures_are_squared_as_asked(visit, wide):
    page = visit()
    sync_api.expect(page.locator("#squaring")).to_be_hidden()
    upload(page, wide)
    choose(page, "The whole picture")
    cropped = views(page)[0]
    with another_view(page, 0):
        choose(page, "Add white to the shorter side")
    padded = views(page)[0]
    assert 30 < cropped[16, 0, 0] < 60 and padded[16, 0, 0] < 10
    assert padded[1].min() > 240 and cropped[1].min() < 60


@pytest.fixture
def wide(tmp_path) -> Path:
    """Columns from dark to light, wider than high."""
    columns = np.linspace(0, 255, 60, dtype=np.uint8)
    Image.fromarray(np.tile(columns[None, :, None], (40, 1, 3))).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def paint_again(page) -> None:
    said(page, "object_message", "nothing is marked")
    drag(page, (0.2, 0.5), (0.8, 0.5))
    page.wait_for_selector("#views img")


def test_turning_keeps_the_marks_of_padded_and_of_cropped_pictures(visit, wide, tmp_path):
    other = tmp_path / "other.png"
    Image.open(wide).transpose(Image.Transpose.ROTATE_180).save(other)
    page = visit()
    upload(page, wide)
    choose(page, "Where I paint")
    choose(page, "Add white to the shorter side")
    paint_again(page)
    seen = {1: views(page)[1]}
    upload(page, other, "several")
    said(page, "several", "Picture 2 of 2 is shown")
    choose(page, "Where I paint")
    paint_again(page)
    seen[2] = views(page)[1]
    for number in (1, 2, 1):
        with another_view(page, 1):
            page.get_by_role("button", name=f"Picture {number} of 2: show it").click()
        said(page, "several", f"Picture {number} of 2 is shown")
        page.wait_for_timeout(500)  # of which nothing comes
        assert np.array_equal(views(page)[1], seen[number])
        assert page.locator("#object_message p, #dropped p").count() == 0
    page.get_by_role("button", name="Remove picture 2").click()
    sync_api.expect(page.locator("#several li")).to_have_count(0)
    page.wait_for_timeout(500)
    assert np.array_equal(views(page)[1], seen[1])


def test_which_part_is_kept_is_chosen_by_keyboard(visit, wide):
    page = visit()
    upload(page, wide)
    choose(page, "Where I paint")
    paint_again(page)
    part = page.locator("#position input[type=range]")
    with another_view(page, 0):
        part.press("End")
    said(page, "dropped", "your marks lay on another part of the picture, and were cleared")
    said(page, "object_message", "nothing is marked")
    choose(page, "The whole picture")
    with another_view(page, 0):
        part.press("Home")
    assert views(page)[0].max() < 190, "its dark end"
    with another_view(page, 0):
        page.locator("#position input[type=number]").fill("1")
    assert views(page)[0].max() > 240


def test_a_mask_may_come_before_its_picture(visit, pairs):
    page = visit()
    choose(page, "White in a mask file")
    upload(page, pairs / "pair1_bg.png", "mask")
    page.wait_for_selector("#mask img")
    upload(page, pairs / "pair1.png")
    views(page)
    sync_api.expect(page.get_by_label("White in a mask file")).to_be_checked()
    assert page.locator("#mask img").count() == 1
    page.locator("#picture").get_by_label("Remove Image").click()
    said(page, "dropped", "your mask was of another picture, and was taken away")
    sync_api.expect(page.get_by_label("In the middle (found by GrabCut)")).to_be_checked()


def test_examples_picked_quickly_keep_their_own_masks(visit, pairs):
    page = visit()
    for _ in range(3):
        for number in (0, 1, 2):
            page.locator("#examples button").nth(number).evaluate("button => button.click()")
            page.wait_for_timeout(50)
        page.wait_for_timeout(1500)
        (mask,) = fetched(page, "#mask img")
        assert np.array_equal(mask[..., 0] > 0, np.asarray(Image.open(pairs / "pair2_bg.png")) > 0)


def save_object(page, path: Path) -> Path:
    """Downloads the object's file."""
    page.get_by_role("button", name="Keep the object as a file").click()
    page.click("#save")
    with page.expect_download() as download:
        page.locator("#saved a").first.click()
    download.value.save_as(path)
    return path


def test_an_object_is_kept_as_a_file(visit, tmp_path):
    page = visit()
    page.locator("#examples button").nth(0).click()
    views(page)
    settings(page, steps=2, seed=5, count=1)
    expected = draw(page)[1]
    save_object(page, tmp_path / "object.safetensors")
    other = visit()
    other.get_by_role("button", name="Keep the object as a file").click()
    upload(other, tmp_path / "object.safetensors", "concept_file")
    other.wait_for_selector("#concept_file .file-preview, #concept_file table")
    settings(other, steps=2, seed=5, count=1)
    (drawn,) = draw(other)
    assert np.array_equal(drawn, expected)


def test_two_objects_in_one_picture(visit, tmp_path):
    page = visit()
    page.locator("#examples button").nth(0).click()
    page.wait_for_selector("#views img")
    saved = save_object(page, tmp_path / "object.safetensors")
    with another_view(page, 0):
        page.locator("#examples button").nth(1).click()
    settings(page, steps=2, seed=5, count=1)
    sync_api.expect(page.locator("#second_file")).to_be_hidden()
    page.get_by_role("button", name="A second object in the same picture").click()
    upload(page, saved, "second_file")
    said(page, "prompt_message", "has no placeholder 'S2'")
    page.fill("#prompts textarea", "a S next to a S2")
    sync_api.expect(page.locator("#prompt_message [role=alert]")).to_have_count(0)

    pictures = [draw(page)[1]]
    settings(page, second_lambda=0.2)
    pictures.append(draw(page)[1])
    choose(page, "S left, S2 right")
    pictures.append(draw(page)[1])
    said(page, "gallery", "S 0.8, S2 0.2")
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    page.fill("#prompts textarea", "a S")
    said(page, "prompt_message", "has no placeholder 'S2'")
    page.click("#draw")
    said(page, "status", "has no placeholder 'S2'")


def test_another_picture_is_added_drawn_and_removed(visit, disc, tmp_path):
    other = tmp_path / "other.png"
    Image.open(disc).transpose(Image.Transpose.ROTATE_90).save(other)
    page = visit()
    adder = page.get_by_role("button", name="Add another picture of it")
    sync_api.expect(adder).to_be_hidden()
    upload(page, disc)
    views(page)
    sync_api.expect(page.locator("#several li")).to_have_count(0)
    choose(page, "The whole picture")
    settings(page, steps=2, seed=7, count=1)
    alone = draw(page)
    with page.expect_file_chooser() as chooser:
        adder.press("Enter")
    chooser.value.set_files([other])
    said(page, "several", "Picture 2 of 2 is shown")
    sync_api.expect(page.get_by_label("In the middle (found by GrabCut)")).to_be_checked()
    page.wait_for_function("document.querySelectorAll('#several img[src]').length === 2")
    both = draw(page)
    assert len(both) == 3 and not np.array_equal(both[2], alone[1])

    page.get_by_role("button", name="Picture 1 of 2: show it").press("Enter")
    said(page, "several", "Picture 1 of 2 is shown")
    sync_api.expect(page.get_by_label("The whole picture")).to_be_checked()
    page.get_by_role("button", name="Remove picture 2").press("Enter")
    sync_api.expect(page.locator("#several li")).to_have_count(0)
    sync_api.expect(adder).to_be_focused()
    again = draw(page)
    assert len(again) == 2 and np.array_equal(again[1], alone[1])


def test_several_pictures_dropped_at_once(visit, disc, tmp_path):
    """Each finds its object; the first is shown."""
    content = list(disc.read_bytes())
    page = visit(PHONE)
    files = page.evaluate_handle(
        """content => {
            const dropped = new DataTransfer();
            for (const name of ["0.png", "1.png", "2.png"])
                dropped.items.add(new File([new Uint8Array(content)], name, {type: "image/png"}));
            return dropped;
        }""",
        content,
    )
    page.locator("#picture button").first.dispatch_event("drop", {"dataTransfer": files})
    said(page, "several", "Picture 1 of 3 is shown")
    page.wait_for_function("document.querySelectorAll('#several img[src]').length === 3")
    assert len(views(page)) == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    upload(page, disc.rename(tmp_path / "2.png"), "several")
    said(page, "several_message", "2.png: among the pictures of the object already")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_width_in_light_and_dark(visit, scheme):
    page = visit(PHONE, color_scheme=scheme)
    sync_api.expect(page.locator("#marks")).to_be_hidden()  # there is nothing to mark
    page.locator("#examples button").nth(0).click()
    views(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for selector in ("#draw", "#marks canvas", "#prompts textarea"):
        area = page.locator(selector).bounding_box()
        assert area["x"] >= 0 and area["x"] + area["width"] <= PHONE["width"]
    assert contrast(page, "#prompts label span") > 4.5
    assert contrast(page, "#marks .marker-hint") > 4.5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(channels(background)) > 3 * 128) == (scheme == "light")


def channels(colour: str) -> list[float]:
    return [float(value) for value in re.findall(r"[\d.]+", colour)][:3]


def contrast(page, selector: str) -> float:
    """Of a text to what lies behind it, as WCAG 2 defines it."""
    colours = page.locator(selector).first.evaluate(
        """element => {
            const ink = getComputedStyle(element).color;
            for (let at = element; at; at = at.parentElement) {
                const colour = getComputedStyle(at).backgroundColor;
                if (!/, 0\\)$|transparent/.test(colour)) return [ink, colour];
            }
        }"""
    )
    lights = []
    for colour in colours:
        parts = [value / 255 for value in channels(colour)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)
