"""Whole files of every reader, from which fuzzers start."""

import io
import json
import tarfile

import torch
from safetensors.torch import save

from elite import shards
from tests.hostile.pictures import encoded
from tests.hostile.tables import BOXES, GOOD_ROW, GRAB, good_index, saved
from tests.hostile.weights import torch_bytes


def tar_bytes() -> bytes:
    """A picture with its boxes and a mask."""
    file = io.BytesIO()
    files = {"a.jpg": encoded(kind="JPEG"), "a.json": b'{"boxes": [[0, 1, 0, 1]]}'}
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in {**files, "b.png": encoded(), "b.mask.0.png": encoded()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


LISTED = {"name": "000000.tar", "bytes": 7, "sha256": "0" * 64}
SHARDS = {"format": shards.SHARDS.format, "shards": [LISTED]}
SHARDS["tables"] = dict.fromkeys(shards.TABLES, LISTED)
CONCEPT = {"format": "elite-concept", "version": "1", "fingerprint": "0" * 16}
SEEDS: dict[str, tuple[bytes, ...]] = {
    "image": (encoded(), encoded(kind="JPEG"), encoded(kind="WEBP")),
    "mask": (encoded(), encoded(kind="JPEG")),
    "boxes": ((BOXES + GOOD_ROW * 3).encode(),),
    "grabcut boxes": ((GRAB + "a,1,1,9,9\n").encode(),),
    "index": (saved(good_index()),),
    "settings": (b"seed: 3\ntemplate: 'a {}'\nllambda: 0.5\nconcept: ['S=a']\n",),
    "prompts": (b"prompts: {object: ['a {}'], living: ['b {}']}\nclasses: {a: b}\nliving: [b]\n",),
    "DreamBench": (
        b"Classes\na,b\nPrompts\n['a {0} {1}'.format(x)]\nLive Subject\n['{0} {1}'.format(y)]",
    ),
    "captions": (b"a {}\nthe {}\n",),
    "concept": (save({"words": torch.ones(1, 3, 4)}, CONCEPT),),
    "embeddings": (save({"<x>": torch.ones(1, 4)}),),
    "checkpoint": (torch_bytes({"a": torch.ones(2)}),),
    "shard": (tar_bytes(),),
    "shard index": (json.dumps(SHARDS).encode(),),
}
