"""What a stranger sends to the app: paths, large things, floods; and two people at once."""

import io
import json
import uuid
import zlib
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image

from app.page import build_page
from app.server import serve
from app.several import NEW
from tests.app.conftest import MAX_UPLOAD, QUEUE, Client, file_data, in_parallel, noise_file
from tests.conftest import REPOSITORY

FLOOD = 200


@pytest.fixture
def draw(client) -> dict:
    """The request that the button Draw makes."""
    return client.dependency("draw", "click", then=True)


def drawn(client: Client, dependency: dict, **values) -> tuple[str, list[np.ndarray]]:
    """What the page says, and its pictures."""
    held = client.call(dependency, **values)
    files = (client.fetch(tile["image"]) for tile in held.get("gallery", []))
    pictures = [np.asarray(Image.open(io.BytesIO(content))) for content in files]
    return held["status"], pictures


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path) -> str:
    """A picture that nobody uploaded."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "private.png")
    return str(tmp_path / "private.png")


def test_an_upload_is_seen(client, pairs):
    look = client.dependency("picture", "change", then=True)
    seen = client.call(look, picture=client.upload(pairs / "pair0.png"))
    assert len(seen["views"]) == 3 and seen["object_message"] == ""


@pytest.mark.parametrize("control", ["picture", "mask", "concept_file", "second_file"])
@pytest.mark.parametrize("kind", ["file", "bare", "data", "climbing", "linked"])
def test_no_other_file_is_read(client, draw, pairs, outside, tmp_path, control, kind):
    up = client.upload(pairs / "pair0.png")
    above = "/".join(up["path"].split("/")[:-1]) + "/.." * 12 + outside
    payload = {
        "file": file_data(outside),
        "bare": {"path": outside},
        "data": {"path": outside, "url": "data:image/png;base64,AAAA"},
        "climbing": {"path": above},
        "linked": {"path": "http://127.0.0.1:9/private.png"},
    }[kind]
    given = {"picture": up, "method": "file", control: payload}
    with pytest.raises(RuntimeError):
        client.call(draw, **given)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "%2Fetc%2Fpasswd",
        "..%2f..%2f..%2f..%2fetc%2fpasswd",
        "app_gradio.py",
        "checkpoints/small_world/model_index.json",
        str(REPOSITORY / "app_gradio.py"),
        "http://127.0.0.1:9/",
        "file:///etc/passwd",
    ],
)
def test_no_file_of_the_machine_is_served(client, path):
    answer = client.http.get(f"/file={path}")
    assert answer.status_code in (403, 404)
    assert client.http.get(f"/proxy={path}").status_code in (400, 403, 404)


def test_uploads_keep_to_their_folder(client, pairs, tmp_path):
    content, folder = (pairs / "pair0.png").read_bytes(), Path(client.files_folder)
    evil = f"{uuid.uuid4().hex}.png"
    climbing = (f"../../../{evil}", f"..\\..\\{evil}", f"a/../../{evil}")
    for name in (*climbing, str(tmp_path / evil)):
        answer = client.http.post("/upload", files={"files": (name, content)})
        assert answer.status_code == 200
        where = Path(answer.json()[0]).resolve()
        assert where.is_relative_to(folder) and where.read_bytes() == content
    around = (tmp_path, Path.cwd(), *folder.parents)
    assert [place for place in around if (place / evil).exists()] == []


def test_files_in_use_live_on(client, pairs):
    """Gradio deletes files by the time of their last change, their contents' or another."""
    used, other = (client.upload(pairs / f"pair{number}.png") for number in (0, 1))
    paths = [Path(one["path"]) for one in (used, other)]
    before = [path.stat().st_ctime_ns for path in paths]
    client.call(client.dependency("picture", "change", then=True), picture=used)
    now = [path.stat().st_ctime_ns for path in paths]
    assert now[0] > before[0] and now[1] == before[1]


def test_what_was_deleted_is_to_be_uploaded_again(client, draw, pairs):
    up = client.upload(pairs / "pair0.png")
    Path(up["path"]).unlink()
    status, _ = drawn(client, draw, picture=up)
    assert "no picture yet; upload" in status


def test_what_nobody_needs_may_be_deleted(client, draw, pairs):
    """A mask that the way to mark does not use, and another picture of the object."""
    look = client.dependency("picture", "change", then=True)
    names = ("pair0.png", "pair0_bg.png", "pair1.png")
    picture, mask, other = (client.upload(pairs / name) for name in names)
    others = [{**NEW, "picture": other["path"]}]
    several = json.dumps({"others": others, "at": 1, "given": None, "thumb": ""})
    for gone in (mask, other):
        Path(gone["path"]).unlink()
    seen = client.call(look, picture=picture, mask=mask, several=several)
    assert len(seen["views"]) == 3 and seen["object_message"] == ""
    removed = json.loads(several) | {"wanted": {"remove": other["path"]}}
    wish = client.dependency("several", "input")
    kept = client.call(wish, picture=picture, several=json.dumps(removed))
    assert kept["picture"]["path"] and "role" not in (kept["several_message"] or "")


def test_a_mistake_opens_no_other_file(client, draw, pairs, outside):
    """Gradio builds controls anew for a session that an answer leaves as they are."""
    up = client.upload(pairs / "pair0.png")
    again = {"others": [], "at": 0, "given": None, "thumb": "", "wanted": {"add": [up["path"]]}}
    wish = client.dependency("several", "input")
    said = client.call(wish, picture=up, several=json.dumps(again))
    assert "among the pictures of the object already" in said["several_message"]
    look = client.dependency("picture", "change", then=True)
    for control in ("picture", "mask"):
        with pytest.raises(RuntimeError, match="this is no uploaded file"):
            client.call(look, **{"picture": up, "method": "file", control: {"path": outside}})


def test_all_that_is_drawn_is_deleted_in_time(client, draw, pairs):
    up = client.upload(pairs / "pair0.png")
    for seed in (3, 30):
        tiles = client.call(draw, picture=up, count=2, seed=seed)["gallery"]
    known = set().union(*client.page.temp_file_sets)
    assert len(tiles) == 3 and {tile["image"]["path"] for tile in tiles} <= known


def test_errors_name_no_folder(client, draw, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    status, _ = drawn(client, draw, picture=client.upload(tmp_path / "text.png"))
    assert "text.png: not a readable image" in status and client.files_folder not in status


# --- large things ---------------------------------------------------------------------------------


def test_large_files_are_refused(client, tmp_path):
    (tmp_path / "large.png").write_bytes(b"\0" * (MAX_UPLOAD + 1))
    with pytest.raises(httpx.HTTPStatusError, match="413"):
        client.upload(tmp_path / "large.png")


def test_large_requests_are_refused(client):
    look = client.dependency("picture", "change", then=True)
    assert client.ask(look, marks="x" * (MAX_UPLOAD + 2**20)).status_code == 413


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_unpacks_to_much_is_not_decoded(client, draw, tmp_path):
    """100 million pixels in 100 kB."""
    side = 10_000

    def chunk(kind: bytes, content: bytes) -> bytes:
        ends = len(content).to_bytes(4, "big"), zlib.crc32(kind + content).to_bytes(4, "big")
        return ends[0] + kind + content + ends[1]

    header = side.to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))
    rows = zlib.compress(b"\0" * (side + 1) * side)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    status, _ = drawn(client, draw, picture=client.upload(tmp_path / "bomb.png"))
    assert "bomb.png: 10000 x 10000 is more than 0.1 million pixels" in status


# --- many requests, several people ----------------------------------------------------------------


def test_a_flood_is_answered_or_refused(served, draw, pairs):
    page, url = served
    client = Client(page, url)
    up = client.upload(pairs / "pair0.png")
    answers = in_parallel(FLOOD, lambda _: client.ask(draw, picture=up, steps=1))
    taken = {answer.json()["event_id"] for answer in answers if answer.status_code == 200}
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(taken) + len(refused) == FLOOD and len(refused) > FLOOD / 2
    assert all("Queue is full" in answer.text for answer in refused)
    assert len(taken) >= QUEUE
    for said in client.messages():
        if said["msg"] == "process_completed" and said["event_id"] in taken:
            assert said["success"]
            taken.remove(said["event_id"])
        if not taken:
            break
    assert not taken
    status, pictures = drawn(Client(page, url), draw, picture=up)
    assert "1 pictures" in status and len(pictures) == 2


def test_the_answer_to_the_last_change_comes_last(client, tmp_path):
    """Though GrabCut takes longer than taking the whole picture."""
    up = client.upload(noise_file(tmp_path / "large.png", 300, 300))
    names = (("picture", "change", True), ("method", "change"))
    looks = [client.dependency(*name) for name in names]
    asked = [
        client.ask(look, picture=up, method=method).json()["event_id"]
        for look, method in zip(looks, ("centre", "whole"), strict=True)
    ]
    ended: list[str] = []
    for said in client.messages():
        if said["msg"] == "process_completed":
            ended.append(said["event_id"])
        if len(ended) == len(asked):
            break
    assert ended == asked


def test_people_at_once_get_what_they_would_get_alone(served, draw, pairs):
    page, url = served

    def person(number: int) -> list[np.ndarray]:
        client = Client(page, url)
        up = client.upload(pairs / f"pair{number % 2}.png")
        said, pictures = drawn(
            client,
            draw,
            picture=up,
            seed=number % 2,
            count=2,
            scheduler=("ddim", "euler")[number % 2],
        )
        assert f"seeds {number % 2} to" in said
        return pictures

    alone = [person(0), person(1)]
    assert len(alone[0]) == 3 and not np.array_equal(alone[0][1], alone[1][1])
    for number, pictures in enumerate(in_parallel(6, person)):
        assert all(map(np.array_equal, pictures, alone[number % 2]))


def test_stop_is_ones_own(served, draw, pairs):
    """Somebody else's Stop ends nothing of mine."""
    page, url = served
    mine, other = Client(page, url), Client(page, url)
    up = mine.upload(pairs / "pair0.png")
    mine.ask(draw, picture=up, count=8, steps=20).raise_for_status()
    stop = mine.dependency("stop_button", "click")
    body = {"data": [None], "fn_index": stop["id"], "session_hash": other.session}
    other.http.post("/run/predict", json=body).raise_for_status()
    status = ""
    for said in mine.messages():
        if said["msg"] == "process_completed":
            status = str(said["output"])
            break
    assert "stopped" not in status
    body["session_hash"] = mine.session
    mine.http.post("/run/predict", json=body).raise_for_status()
    assert "stopped after 0" in drawn(mine, draw, picture=up)[0]


def test_a_password_guards_everything(handlers, pairs):
    page: gr.Blocks = build_page(handlers)
    url = serve(page, auth=("me", "secret"), prevent_thread_lock=True, quiet=True)
    try:
        stranger = Client(page, url)
        look = stranger.dependency("picture", "change", then=True)
        assert stranger.ask(look).status_code == 401
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            stranger.upload(pairs / "pair0.png")
        assert stranger.http.get(f"{url}config").status_code == 401
        wrong = {"username": "me", "password": "guess"}
        assert stranger.http.post(f"{url}login", data=wrong).status_code == 400
        right = {"username": "me", "password": "secret"}
        assert stranger.http.post(f"{url}login", data=right).status_code == 200
        seen = stranger.call(look, picture=stranger.upload(pairs / "pair0.png"))
        assert len(seen["views"]) == 3
    finally:
        page.close()
