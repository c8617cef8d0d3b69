"""The latent cache of stage 1: the VAE's posterior of every target, encoded once.

A folder of safetensors shards. Shard k holds the rows `k * SHARD_ROWS` and on of `OpenImagesBoxes`:

    mean, std   (rows, C, h, w) in the dtype asked for; nan where the image could not be read
    files       (rows, 2) int64: what tells whether the image has changed, of a file its size in
                bytes and modification time in seconds

and says in its metadata what they depend on: VAE, resolution, rows and boxes.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from elite.files import write_atomically
from elite.loading import pixels_per_latent
from elite.open_images import OpenImagesBoxes
from elite.stream import collate

FORMAT = "elite-latents 1"  # to be counted up when the crop of a target changes
SHARD_ROWS = 1024  # 134 MB in float32 with Stable Diffusion at 512 px
STORED = ("F32", "F16", "BF16")  # as safetensors calls the types of mean and std
SCRIPT = "python data_scripts/cache_latents.py"


# --- shards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A file of the cache, and what it has to hold.

    Args:
        path: where it lies, or is to lie.
        rows: of the dataset.
        needs: the metadata it must have.
        files: the tensor of that name, and `names` (rows,) the files it speaks of.
        shape: of mean and std, (rows, C, h, w).
    """

    path: Path
    rows: range
    needs: Mapping[str, str]
    files: Tensor
    names: np.ndarray
    shape: tuple[int, ...]

    def fault(self) -> str | None:
        """What keeps the file from being used, in words; None where it is right."""
        try:
            with safe_open(self.path, framework="pt") as file:
                found, files = file.metadata() or {}, file.get_tensor("files")
                moments = [file.get_slice(name) for name in ("mean", "std")]
                stored = {(part.get_dtype(), *part.get_shape()) for part in moments}
        except FileNotFoundError:
            return f"{self.path.name} is missing"
        except (SafetensorError, OSError):
            return f"{self.path.name} is damaged"
        for key, what in (
            ("format", "were written by another version"),
            ("vae", "come from another VAE"),
            ("resolution", f"are of {found.get('resolution')} px, not {self.needs['resolution']}"),
            ("rows", "belong to other rows or boxes"),
        ):
            if found.get(key) != self.needs[key]:
                return f"the latents {what}"
        is_whole = stored in [{(dtype, *self.shape)} for dtype in STORED]
        if not is_whole or files.shape != self.files.shape or not _is_list(found.get("failures")):
            return f"{self.path.name} is damaged"
        changed = (files != self.files).any(dim=1)
        if changed.any():
            name = self.names[int(changed.nonzero()[0])].decode()
            return f"the image {name} has changed since"
        return None

    def dtype(self) -> torch.dtype:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor("mean").dtype

    def failures(self) -> list[str]:
        """What was wrong with the images that could not be read."""
        with safe_open(self.path, framework="pt") as file:
            return json.loads(file.metadata()["failures"])


def _is_list(text: str | None) -> bool:
    """Whether this is a list in JSON."""
    try:
        return isinstance(json.loads(text or ""), list)
    except (ValueError, RecursionError):
        return False


def shards_of(boxes: OpenImagesBoxes, vae: AutoencoderKL, folder: Path | str) -> list[Shard]:
    """The shards that a cache of this dataset and VAE in `folder` consists of, there or not."""
    fingerprint = vae_fingerprint(vae)
    side = boxes.resolution // pixels_per_latent(vae)
    latent = (vae.config.latent_channels, side, side)
    shards = []
    for number, start in enumerate(range(0, len(boxes), SHARD_ROWS)):
        rows = range(start, min(start + SHARD_ROWS, len(boxes)))
        here = slice(rows.start, rows.stop)
        names = boxes.source.image_keys(boxes.image_ids[here])
        digest = hashlib.sha256(b"\n".join(names.tolist()))
        digest.update(boxes.boxes[here].tobytes())
        needs = {
            "format": FORMAT,
            "vae": fingerprint,
            "resolution": str(boxes.resolution),
            "rows": digest.hexdigest(),
        }
        path = Path(folder) / f"{number:06d}.safetensors"
        files = file_states(boxes, rows)
        shards.append(Shard(path, rows, needs, files, names, (len(rows), *latent)))
    return shards


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """A fingerprint of the weights that encode; those that decode change no latent."""
    digest = hashlib.sha256()
    for key, value in sorted(vae.state_dict().items()):
        if not key.startswith(("decoder.", "post_quant_conv.")):
            digest.update(key.encode())
            digest.update(value.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_states(boxes: OpenImagesBoxes, rows: range) -> Tensor:
    """`Source.image_state` of the image of each row, (rows, 2)."""
    ids, place = np.unique(boxes.image_ids[rows.start : rows.stop], return_inverse=True)
    return torch.tensor([boxes.source.image_state(image_id) for image_id in ids])[place]


# --- writing --------------------------------------------------------------------------------------


def cache_latents(
    boxes: OpenImagesBoxes,
    vae: AutoencoderKL,
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    workers: int = 0,
) -> list[str]:
    """Encodes the target of every row of the dataset; shards that are right already are kept.

    Args:
        boxes: the dataset of stage 1.
        vae: on the device that shall encode.
        folder: for the shards, each of which appears whole or not at all.
        dtype: of what is stored.
        batch_size: targets encoded at once.
        workers: processes that read images; 0 means this one.

    Returns:
        The messages of images that could not be read, those in kept shards included.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """
    shards = shards_of(boxes, vae, folder)
    todo = [shard for shard in shards if shard.fault() or shard.dtype() != dtype]
    batches = _encoded(boxes, vae, todo, batch_size, workers)
    missing = sum(len(shard.rows) for shard in todo)
    with tqdm(total=len(boxes), initial=len(boxes) - missing, desc="latents", unit="row") as bar:
        for shard in todo:
            moments: dict[str, list[Tensor]] = {"mean": [], "std": []}
            failures: list[str] = []
            for batch in itertools.islice(batches, -(-len(shard.rows) // batch_size)):
                for name, parts in moments.items():
                    parts.append(batch[name].to("cpu", dtype))
                failures += batch["failures"]
                bar.update(len(batch["mean"]))
            tensors = {name: torch.cat(parts).contiguous() for name, parts in moments.items()}
            tensors["files"] = shard.files
            metadata = {**shard.needs, "failures": json.dumps(failures)}
            write_atomically(shard.path, partial(save_file, tensors, metadata=metadata))
    return list(dict.fromkeys(failure for shard in shards for failure in shard.failures()))


@torch.no_grad()
def _encoded(
    boxes: OpenImagesBoxes, vae: AutoencoderKL, shards: list[Shard], batch_size: int, workers: int
) -> Iterator[dict[str, Any]]:
    """`mean` and `std` (B, C, h, w) and `failures` of all rows of the shards in their order; no
    batch spans two shards."""
    loader = DataLoader(
        _Targets(boxes),
        batch_sampler=[
            list(shard.rows[start : start + batch_size])
            for shard in shards
            for start in range(0, len(shard.rows), batch_size)
        ],
        collate_fn=collate,
        num_workers=workers,
    )
    for batch in loader:
        posterior = vae.encode(batch["pixels"].to(vae.device)).latent_dist
        yield {"mean": posterior.mean, "std": posterior.std, "failures": batch["failures"]}


class _Targets(Dataset):
    """The target of each row, (3, resolution, resolution); all nan where it cannot be read."""

    def __init__(self, boxes: OpenImagesBoxes) -> None:
        self.boxes = boxes

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            return {"pixels": self.boxes.target(self.boxes.crop(row)), "failures": []}
        except ValueError as error:
            side = self.boxes.resolution
            return {"pixels": torch.full((3, side, side), torch.nan), "failures": [str(error)]}


# --- reading --------------------------------------------------------------------------------------


class CachedBoxes:
    """`OpenImagesBoxes` whose targets come as the cached posterior, not as pixels.

    Args:
        boxes: the dataset of stage 1.
        folder: what `cache_latents` wrote for it.
        vae: of the model in training, in float32.

    Raises:
        ValueError: the cache is incomplete, or of another VAE, resolution or dataset, or images
            have changed since.
    """

    def __init__(self, boxes: OpenImagesBoxes, folder: Path | str, vae: AutoencoderKL) -> None:
        shards = shards_of(boxes, vae, folder)
        faults = [fault for shard in shards if (fault := shard.fault())]
        if faults:
            raise ValueError(
                f"{folder}: {faults[0]} ({len(faults)} of {len(shards)} shards do not fit); run "
                f"{SCRIPT} with this model, dataset and resolution, or leave out --cache_latents"
            )
        self.boxes, self.paths = boxes, [shard.path for shard in shards]
        self.shards = boxes.shards
        self._opened: dict[Path, Any] = {}  # memory-mapped, by each loader process for itself

    def __len__(self) -> int:
        return len(self.boxes)

    def name(self, index: int) -> str:
        """As the boxes have it."""
        return self.boxes.name(index)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor | str]:
        """What `OpenImagesBoxes.sample` gives for the same generator, but for `pixels`.

        Returns:
            latent_mean, latent_std: float32 (C, h, w), the VAE's posterior of the target.
            clip_pixels, caption: as there.

        Raises:
            ValueError: the image cannot be read; the message names it.
        """
        crop = self.boxes.crop(index)
        mean, std = self._moments(index)
        if mean.isnan().any():
            raise ValueError(
                f"{self.boxes.image_name(index)}: could not be read when latents were cached; "
                f"delete {self._path(index)} and run {SCRIPT} again"
            )
        return {"latent_mean": mean, "latent_std": std, **self.boxes.view(crop, rng)}

    def _path(self, index: int) -> Path:
        return self.paths[index // SHARD_ROWS]

    def _moments(self, index: int) -> tuple[Tensor, Tensor]:
        path = self._path(index)
        if path not in self._opened:
            self._opened[path] = safe_open(path, framework="pt")
        mean, std = (self._opened[path].get_slice(name) for name in ("mean", "std"))
        row = index % SHARD_ROWS
        return mean[row].float(), std[row].float()
