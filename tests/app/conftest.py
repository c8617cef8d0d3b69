"""The app over the tiny pipeline, served on this machine, and its API as a client speaks it."""

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio.utils import get_upload_folder
from gradio_client.utils import apply_diff
from PIL import Image

from app.handlers import AppHandlers, Stop
from app.page import build_page
from app.server import private_files, serve
from app.several import Several
from app.studio import Studio
from elite.data import PairFolder
from tests import tiny
from tests.conftest import make_pipe

MAX_UPLOAD, QUEUE = 300_000, 20
# What the page's controls hold when it opens, less the picture.
DEFAULTS = {
    "picture": None,
    "squaring": "crop",
    "position": 0.5,
    "method": "whole",
    "marks": "",
    "mask": None,
    "several": "",
    "concept_file": None,
    "example": None,
    "earlier": "",
    "prompts": "a photo of a S",
    "lambda_": 0.8,
    "count": 1,
    "guidance": 5,
    "negative": "",
    "steps": 2,
    "scheduler": "ddim",
    "speed": "exact",
    "seed": 3,
    "words": "0",
    "second_file": None,
    "second_lambda": 0.8,
    "where": "",
}


@dataclass
class Client:
    """One visitor of a served page."""

    page: gr.Blocks
    url: str

    def __post_init__(self) -> None:
        self.session = uuid.uuid4().hex[:11]
        # A connection kept for another thread may just be closing.
        alone = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=f"{self.url}gradio_api", timeout=60, limits=alone)
        parts = self.page.config["components"]
        self.ids = {part["props"].get("elem_id"): part["id"] for part in parts}
        self.names = {number: name for name, number in self.ids.items()}

    @property
    def files_folder(self) -> str:
        return get_upload_folder()

    def dependency(self, name: str, event: str, then: bool = False) -> dict[str, Any]:
        """What an event of a control starts, or what follows that."""
        listeners = self.page.config["dependencies"]
        target = [self.ids[name], event]
        first = next(d for d in listeners if target in [list(t) for t in d["targets"]])
        if not then:
            return first
        return next(d for d in listeners if d["trigger_after"] == first["id"])

    def upload(self, path: Path) -> dict[str, Any]:
        """A file as the page uploads it; what the API calls it."""
        answer = self.http.post("/upload", files={"files": (path.name, path.read_bytes())})
        answer.raise_for_status()
        return file_data(answer.json()[0], path.name)

    def ask(self, dependency: dict[str, Any], **values: Any) -> httpx.Response:
        """Puts a request into the queue."""
        given = {**DEFAULTS, **values}
        data = [given.get(self.names.get(number, "")) for number in dependency["inputs"]]
        body = {"data": data, "fn_index": dependency["id"], "session_hash": self.session}
        return self.http.post("/queue/join", json=body)

    def messages(self) -> Iterator[dict[str, Any]]:
        """All that the server says to this visitor."""
        parameters = {"session_hash": self.session}
        with self.http.stream("GET", "/queue/data", params=parameters) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def call(self, dependency: dict[str, Any], **values: Any) -> dict[str, Any]:
        """What a request leaves on the page, by control."""
        self.ask(dependency, **values).raise_for_status()
        names = [self.names.get(number) for number in dependency["outputs"]]
        held: dict[str, Any] = {}
        data: list[Any] = []
        for said in self.messages():
            if said["msg"] not in ("process_generating", "process_completed"):
                continue
            if not said["success"]:
                raise RuntimeError(said["output"]["error"])
            new = said["output"].get("data", data)
            if data and said["msg"] == "process_generating":  # only what differs
                new = [apply_diff(*pair) for pair in zip(data, new, strict=True)]
            data = new
            for name, value in zip(names, data, strict=True):
                if value != {"__type__": "update"}:  # stays as it is
                    held[name or ""] = value
            if said["msg"] == "process_completed":
                break
        return held

    def fetch(self, value: dict[str, Any]) -> bytes:
        """A file of an answer."""
        answer = self.http.get(f"/file={value['path']}")
        answer.raise_for_status()
        return answer.content


def file_data(path: str, name: str = "file.png") -> dict[str, Any]:
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="session")
def studio(model_folder: Path, mapper_folder: Path) -> Studio:
    """Shared: a studio keeps nothing between calls."""
    return Studio(make_pipe(model_folder, mapper_folder), model="tiny")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pairs(tmp_path_factory.mktemp("pairs"), count=3)


@pytest.fixture(scope="session")
def handlers(studio: Studio, pairs: Path) -> AppHandlers:
    return AppHandlers(studio, PairFolder(pairs), max_pixels=100_000)


@pytest.fixture
def values(pairs: Path) -> dict[str, Any]:
    """What the controls hold once a picture is there."""
    there = {"picture": str(pairs / "pair0.png"), "several": Several(), "stop": Stop()}
    return {**DEFAULTS, **there}


@pytest.fixture(scope="session")
def served(handlers: AppHandlers) -> Iterator[tuple[gr.Blocks, str]]:
    with private_files():
        page = build_page(handlers)
        options = {"prevent_thread_lock": True, "quiet": True}
        yield page, serve(page, max_upload=MAX_UPLOAD, queue_size=QUEUE, **options)
        page.close()


@pytest.fixture
def client(served: tuple[gr.Blocks, str]) -> Client:
    return Client(*served)


def in_parallel(count: int, work: Any) -> list[Any]:
    """`work(number)` in as many threads."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def noise_file(path: Path, width: int, height: int) -> Path:
    """A grey picture of this size."""
    Image.new("RGB", (width, height), "grey").save(path)
    return path
