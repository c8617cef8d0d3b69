"""The latent cache of stage 1: the VAE's posterior of every target, encoded once.

A folder, or its URL, of safetensors files and `index.json`, which lists those that are done. Each
holds up to `SHARD_ROWS` rows of `OpenImagesBoxes` in their order, all of one shard where the images
lie in shards, so that a window of training needs some files whole and no others:

    mean, std   (rows, C, h, w) in the dtype asked for; nan where the image could not be read
    files       (rows, 2) int64: what tells whether the image has changed, of a file its size in
                bytes and modification time in seconds

What they depend on (VAE, resolution, rows, boxes, images) is in their metadata and in the index. No
tar holds them: rows of one size need no headers, are mapped where they lie, and read without the
rest of their file.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
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

from elite.files import digest_weights, sole_writer, write_atomically
from elite.loading import pixels_per_latent
from elite.open_images import OpenImagesBoxes
from elite.shard_cache import Cache, InPlace, Listed, Store, read_from
from elite.shards import (
    ELSEWHERE,
    INDEX,
    Kind,
    OpenImagesShards,
    ShardRows,
    check_room,
    is_url,
    list_file,
    plain_location,
    read_index,
    save_index,
)
from elite.stream import collate, rows_by_shard
from elite.wording import first_line, one_line

LOCK = "latents.lock"
FORMAT = "elite-latents 1"  # to be counted up when the crop of a target changes
SHARD_ROWS = 1024  # 134 MB in float32 with Stable Diffusion at 512 px
STORED = ("F32", "F16", "BF16")  # as safetensors calls the types of mean and std
SCRIPT = "python data_scripts/cache_latents.py"
LATENTS = Kind("latents", FORMAT, (), f"make them with {SCRIPT} in a folder of their own")


# --- shards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A file of the cache as it has to be.

    Args:
        name: of the file.
        rows: of the dataset.
        needs: what it depends on, in words or digests.
        files: the tensor of that name.
        shape: of mean and std, (rows, C, h, w).
    """

    name: str
    rows: Sequence[int]
    needs: Mapping[str, str]
    files: Tensor
    shape: tuple[int, ...]

    def misfit(self, of: Mapping[str, str]) -> str | None:
        """Why latents made of this are not those needed, in words; None where they are."""
        side = one_line(of.get("resolution"))
        for key, what in (
            ("format", "were written by another version"),
            ("vae", "come from another VAE"),
            ("resolution", f"are of {side} px, not {self.needs['resolution']}"),
            ("rows", "belong to other rows or boxes"),
            ("images", "are of images that have changed since"),
        ):
            if of.get(key) != self.needs[key]:
                return f"the latents {what}"
        return None

    def is_at(self, path: Path, dtype: torch.dtype) -> bool:
        """Whether this is what a file holds, in this number type."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata, files = file.metadata() or {}, file.get_tensor("files")
                mean, _ = _moments(file, self.shape)
                fits = mean[0].dtype == dtype
        except (SafetensorError, OSError, ValueError):
            return False
        fits = fits and self.misfit({**metadata, "images": _digest(files)}) is None
        return fits and _is_list(metadata.get("failures"))


def _moments(file: Any, shape: Sequence[int]) -> list[Any]:
    """Mean and std of an open file, not read yet. Raises ValueError where it holds others."""
    parts = [file.get_slice(name) for name in ("mean", "std")]
    stored = {(part.get_dtype(), *part.get_shape()) for part in parts}
    if stored not in [{(dtype, *shape)} for dtype in STORED]:
        raise ValueError(f"expected mean and std of shape {tuple(shape)}")
    return parts


def _failures(path: Path) -> list[str]:
    """What was wrong with the images that could not be read."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["failures"])


def _is_list(text: str | None) -> bool:
    """Whether this is a list in JSON."""
    try:
        return isinstance(json.loads(text or ""), list)
    except (ValueError, RecursionError):
        return False


def _digest(files: Tensor) -> str:
    return hashlib.sha256(files.numpy().tobytes()).hexdigest()


def shards_of(boxes: OpenImagesBoxes, vae: AutoencoderKL) -> list[list[Shard]]:
    """The files of a cache of this dataset and VAE, for each shard of the dataset."""
    vae_print, latent = vae_fingerprint(vae), latent_shape(boxes, vae)
    numbers, dataset = itertools.count(), rows_by_shard(boxes)
    found = []
    for shard in range(len(dataset.sizes)):
        all_rows = dataset.rows([shard])
        parts = [all_rows[n : n + SHARD_ROWS] for n in range(0, len(all_rows), SHARD_ROWS)]
        found.append([_shard(next(numbers), boxes, rows, vae_print, latent) for rows in parts])
    return found


def _shard(
    number: int,
    boxes: OpenImagesBoxes,
    rows: Sequence[int],
    vae_print: str,
    latent: tuple[int, ...],
) -> Shard:
    names = boxes.source.image_keys(boxes.image_ids[np.asarray(rows)])
    digest = hashlib.sha256(b"\n".join(names.tolist()))
    digest.update(boxes.boxes[np.asarray(rows)].tobytes())
    files = file_states(boxes, rows)
    needs = {
        "format": FORMAT,
        "vae": vae_print,
        "resolution": str(boxes.resolution),
        "rows": digest.hexdigest(),
        "images": _digest(files),
    }
    return Shard(f"{number:06d}.safetensors", rows, needs, files, (len(rows), *latent))


def latent_shape(boxes: OpenImagesBoxes, vae: AutoencoderKL) -> tuple[int, ...]:
    """(C, h, w) of a target."""
    side = boxes.resolution // pixels_per_latent(vae)
    return vae.config.latent_channels, side, side


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """A fingerprint of the weights that encode; those that decode change no latent."""
    decode = ("decoder.", "post_quant_conv.")
    encode = {key: x for key, x in vae.state_dict().items() if not key.startswith(decode)}
    return digest_weights(encode)


def file_states(boxes: OpenImagesBoxes, rows: Sequence[int]) -> Tensor:
    """`Source.image_state` of the image of each row, (rows, 2)."""
    ids, place = np.unique(boxes.image_ids[np.asarray(rows)], return_inverse=True)
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
        ValueError: the disk is full, the folder cannot be written, or another process encodes into
            it.
    """
    shards = list(itertools.chain.from_iterable(shards_of(boxes, vae)))
    folder = Path(folder)
    with sole_writer(folder / LOCK, "encodes"):
        listed = _kept(shards, folder, dtype)
        save_index(folder, list(listed.values()), {}, LATENTS)
        todo = [shard for shard in shards if shard.name not in listed]
        batches = _encoded(boxes, vae, todo, batch_size, workers)
        missing = sum(len(shard.rows) for shard in todo)
        with tqdm(
            total=len(boxes), initial=len(boxes) - missing, desc="latents", unit="row"
        ) as bar:
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
                path = folder / shard.name
                write_atomically(path, partial(save_file, tensors, metadata=metadata))
                listed[shard.name] = list_file(path, shard.needs)
        save_index(folder, [listed[shard.name] for shard in shards], {}, LATENTS)
    told = itertools.chain.from_iterable(_failures(folder / shard.name) for shard in shards)
    return list(dict.fromkeys(told))


def _kept(shards: Sequence[Shard], folder: Path, dtype: torch.dtype) -> dict[str, Listed]:
    """The files of a folder that are right already, by name. Removes those that are no longer as
    an earlier run has listed them."""
    earlier = read_index(str(folder), LATENTS).shards if (folder / INDEX).exists() else []
    known, kept = {file.name: file.sha256 for file in earlier}, {}
    for shard in tqdm(shards, desc="check", unit="file"):
        path = folder / shard.name
        if shard.is_at(path, dtype):
            file = list_file(path, shard.needs)
            if known.get(file.name, file.sha256) == file.sha256:
                kept[file.name] = file
            else:
                path.unlink()
    return kept


@torch.no_grad()
def _encoded(
    boxes: OpenImagesBoxes,
    vae: AutoencoderKL,
    shards: Sequence[Shard],
    batch_size: int,
    workers: int,
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
        location: folder that `cache_latents` wrote for it, or the URL of one, which is fetched from
            into the cache of the shards that the images lie in, each file with its shard.
        vae: of the model in training, in float32.

    Raises:
        ValueError: the cache is incomplete, or of another VAE, resolution or dataset, or images
            have changed since; it is a URL, and the images lie in no shards or those are not
            cached, or two windows of both do not fit into the cache.
    """

    def __init__(self, boxes: OpenImagesBoxes, location: Path | str, vae: AutoencoderKL) -> None:
        location = plain_location(location)
        self.boxes, self.shards = boxes, boxes.shards
        self._rows, self._latent = rows_by_shard(boxes), latent_shape(boxes, vae)
        self._files = _fitting(shards_of(boxes, vae), location)
        # In the order of single files each process would soon read all of it to hash it.
        self._store: Store = InPlace(hashed=isinstance(boxes.source, OpenImagesShards))
        if is_url(location):
            self._store, self.shards = _fetched(boxes, self._files, location)

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
            ValueError: image or latents cannot be had; the message names the file.
        """
        crop = self.boxes.crop(index)
        mean, std = self._moments(index)
        return {"latent_mean": mean, "latent_std": std, **self.boxes.view(crop, rng)}

    def _moments(self, index: int) -> list[Tensor]:
        """Mean and std of a row, float32 (C, h, w)."""
        shard, place = self._rows.find(index)
        part, row = divmod(place, SHARD_ROWS)
        file = self._files[shard][part]
        rows = min(SHARD_ROWS, int(self._rows.sizes[shard]) - part * SHARD_ROWS)
        read = partial(read_row, row=row, shape=(rows, *self._latent), name=file.place)
        moments = read_from(self._store, file, read)
        if moments[0].isnan().any():
            raise ValueError(
                f"{self.boxes.image_name(index)}: could not be read when latents were cached; "
                f"delete {file.place} and run {SCRIPT} again"
            )
        return moments


def _fitting(shards: Sequence[Sequence[Shard]], location: str) -> list[list[Listed]]:
    """The files of a cache, for each shard. Raises ValueError where not all of them fit."""
    remedy = (
        f"run {SCRIPT} with this model, dataset and resolution, which keeps the files that fit, or "
        "leave out --cache_latents"
    )
    if not is_url(location) and not Path(location, INDEX).exists():
        raise ValueError(
            f"{location}: no {INDEX} in it, as of latents half done or of an earlier version; "
            f"{remedy}"
        )
    listed = {file.name: file for file in read_index(location, LATENTS).shards}
    faults = [
        shard.misfit(listed[shard.name].of) if shard.name in listed else f"{shard.name} is missing"
        for group in shards
        for shard in group
    ]
    if wrong := [fault for fault in faults if fault]:
        raise ValueError(
            f"{location}: {wrong[0]} ({len(wrong)} of {len(faults)} shards do not fit); {remedy}"
        )
    return [[listed[shard.name] for shard in group] for group in shards]


def _fetched(
    boxes: OpenImagesBoxes, files: Sequence[Sequence[Listed]], location: str
) -> tuple[Cache, ShardRows]:
    """Where files at a URL are fetched to, and the shards of images that they go with. Raises
    ValueError where there are none, or the cache is too small for both."""
    source = boxes.source
    if not isinstance(source, OpenImagesShards):
        raise ValueError(
            f"{location}: latents elsewhere are fetched with the shards of their images, and these "
            "are single files; pack them with python data_scripts/make_shards.py, or copy the "
            "latents to this machine"
        )
    if not isinstance(source.store, Cache):
        raise ValueError(f"{location}: {ELSEWHERE}")
    shards = source.shards_of(boxes.image_ids).beside(files)
    what = "shards with their latents"
    check_room(shards.files, source.index, source.window, source.store.limit, what)
    return source.store, shards


def read_row(path: Path, row: int, shape: Sequence[int], name: str) -> list[Tensor]:
    """Mean and std of a row of a file, float32 (C, h, w).

    Args:
        shape: of all rows, (rows, C, h, w).
        name: of the file, for messages.

    Raises:
        ValueError: the file holds other tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, so that no sample keeps a file mapped that leaves the cache.
            rows = [part[row] for part in _moments(file, shape)]
            return [moment.to(torch.float32, copy=True) for moment in rows]
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{name}: latent file is damaged ({first_line(error)}); delete it and run {SCRIPT} "
            "again"
        ) from None
