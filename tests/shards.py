"""Shards of miniature Open Images folders, and a server of files on the loopback that can be made
to fail."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts.index_shards import index_shards, write_index
from data_scripts.make_shards import open_packed, pack
from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from elite.stream import stream_loader
from tests.open_images import as_jpeg, draw_object, encoded

PACK, INDEX = "data_scripts/make_shards.py", "data_scripts/index_shards.py"
SHARD_BYTES = 40_000  # two pictures or so
ALL = 1000  # more shards than there are
SIZES = {"resolution": 32, "clip_size": 28}
STAGES = {
    "boxes": lambda source: OpenImagesBoxes(source, **SIZES),
    "masks": lambda source: OpenImagesMasks(source, latent_size=8, **SIZES),
}
both = pytest.mark.parametrize("stage", STAGES)


def same(a, b):
    assert a.keys() == b.keys()
    return all(
        torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a
    )


def take(stream, count, **options):
    return list(islice(stream_loader(stream, **options), count))


def shard_of_row(dataset):
    return dataset.source.images["shard"][dataset.image_ids]


def make_shards(source: Path, target: Path, side: int | None = None) -> Path:
    """The shards of a folder, of some kilobytes each."""
    assert pack(open_packed(source, "test"), target, side, SHARD_BYTES, workers=1)[1] == []
    write_index(target, index_shards(target, whole=False, workers=1), whole=False)
    return target


def picture(seed: int = 0) -> tuple[bytes, bytes, list[float]]:
    """An image as JPEG, its mask as PNG, its box."""
    image, mask, box = draw_object(np.random.default_rng(seed), 160, 200)
    return as_jpeg(image), encoded(Image.fromarray(mask), "PNG"), box


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


def bytes_cached(cache: Path) -> int:
    """Of the files in a cache, while threads bring and remove them."""
    total = 0
    for path in cache.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


class Server:
    """A folder at a URL.

    Attributes:
        asked: how often each file was.
        spoil: called with the bytes of a file of that name before they are sent; None is an error
            of the server.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.spoil: dict[str, Callable[[bytes], bytes | None]] = {}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, server_of=self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, name: str) -> tuple[int, bytes]:
        self.asked[name] += 1
        path = self.folder / name
        if not path.is_file():
            return 404, b""
        content = self.spoil.get(name, bytes)(path.read_bytes())
        return (500, b"") if content is None else (200, content)


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args, server_of: Server, **options) -> None:
        self.files = server_of
        super().__init__(*args, **options)

    def do_HEAD(self) -> None:
        path = self.files.folder / self.path.lstrip("/")
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
        self.end_headers()

    def do_GET(self) -> None:
        status, content = self.files.answer(self.path.lstrip("/"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
