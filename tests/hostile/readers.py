"""Every reader of a stranger's file, as one function of bytes, for the fuzzers."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from data_scripts.index_shards import index_shard
from data_scripts.make_masks import read_boxes as read_grabs
from elite.annotations import load_mask_boxes, read_boxes
from elite.checkpoint import load_official
from elite.concept import Concept
from elite.config import build_config, read_yaml
from elite.images import read_image, read_mask
from elite.settings import InferenceLocalConfig
from elite.shards import parse_index
from evaluation.subjects import read_prompts
from textual_inversion.files import load_embeddings
from textual_inversion.pictures import read_templates

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "image": ("a.png", read_image),
    "mask": ("a.png", read_mask),
    "boxes": ("a.csv", read_boxes),
    "grabcut boxes": ("a.csv", lambda path: read_grabs(path, {"a"})),
    "index": ("a.npy", load_mask_boxes),
    "settings": ("a.yaml", lambda path: build_config(InferenceLocalConfig, read_yaml(path))),
    "prompts": ("a.yaml", read_prompts),
    "DreamBench": ("a.txt", read_prompts),
    "captions": ("a.txt", read_templates),
    "concept": ("a.safetensors", Concept.load),
    "embeddings": ("a.safetensors", load_embeddings),
    "checkpoint": ("a.pt", load_official),
    "shard": ("a.tar", lambda path: index_shard(path, whole=True)),
    "shard index": ("a.json", lambda path: parse_index(path.read_text("latin1"), str(path))),
}


def feed(reader: str, content: bytes) -> None:
    """Anything but a ValueError is a fault."""
    name, read = READERS[reader]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            read(path)
        except ValueError as error:
            assert name in str(error) or reader == "settings", f"does not name the file: {error}"
