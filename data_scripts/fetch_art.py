"""Fetch pictures with transparency by other people, to try ELITE on what the small world is not.

    python data_scripts/fetch_art.py OUT_DIR [--sources fluent google twitter openclipart stamps]

Writes OUT_DIR/SOURCE/NAME.png, each cut to what is opaque and at most 128 px (`--side`). The three
emoji sources and their names come as npm packages (npm has to be installed), the others as Debian
packages (apt-get and dpkg-deb). One more, `landscapes`, has whole photographs, to lay cut-outs on.
All are for measuring at home: stamps and landscapes are GPL-2, so nothing of them is shipped. A
source that is there already is left as it is. Exit code 2: nothing was written for the source that
the message names.
"""

import argparse
import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite.console import OK, check_least, run, script_parser
from elite.files import check_writable, write_atomically

MIN_SIDE = 24  # pixels; smaller pictures show nothing
OPAQUE = (0.05, 0.95)  # share of the picture that a cut-out covers
NAMES = "unicode-emoji-json@0.9.0"
# What dpkg-deb, tarfile and gzip raise.
DAMAGED = (subprocess.CalledProcessError, tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error)
GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")


@dataclass(frozen=True)
class Source:
    """A package, the folders in it, and what its maker asks for."""

    package: str
    folders: tuple[str, ...]
    licence: str
    is_emoji: bool = False
    is_whole: bool = False  # pictures of no one thing, without transparency


CLIPART = "./usr/share/openclipart/png/"
STAMPS = "./usr/share/tuxpaint/stamps/"
SOURCES = {
    "fluent": Source("@lobehub/fluent-emoji-3d@1.1.0", ("package/assets/",), "MIT", True),
    "google": Source(
        "emoji-datasource-google@16.0.0", ("package/img/google/64/",), "Apache-2.0", True
    ),
    "twitter": Source(
        "emoji-datasource-twitter@16.0.0", ("package/img/twitter/64/",), "CC-BY 4.0", True
    ),
    "openclipart": Source(
        "openclipart-png",
        tuple(CLIPART + f for f in ("animals/", "food/", "tools/", "transportation/vehicles/")),
        "public domain",
    ),
    "stamps": Source(
        "tuxpaint-stamps-default",
        tuple(STAMPS + f for f in ("animals/", "clothes/", "food/", "household/", "vehicles/")),
        "GPL-2",
    ),
    "landscapes": Source(
        "mate-backgrounds", ("./usr/share/backgrounds/mate/nature/",), "GPL-2", is_whole=True
    ),
}
CUT_OUTS = [name for name, source in SOURCES.items() if not source.is_whole]


def download(command: list[str], folder: Path, package: str) -> Path:
    """Runs a package manager in an empty folder. Returns the file that it left there.

    Raises:
        ValueError: it is not installed, or the package could not be had.
    """
    if shutil.which(command[0]) is None:
        raise ValueError(f"{package}: needs {command[0]}; install it or leave this source out")
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
    files = sorted(folder.iterdir())
    if done.returncode or len(files) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{package}: {command[0]} could not fetch it ({last}); try again later")
    return files[0]


def members(archive: Path, folders: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of an npm or Debian package below these folders. Raises
    ValueError where it is damaged."""
    try:
        with tarfile.open(fileobj=io.BytesIO(unwrapped(archive)), encoding="utf-8") as tar:
            for member in tar:
                if member.isfile() and member.name.startswith(folders):
                    file = tar.extractfile(member)
                    assert file is not None  # it is a file
                    yield member.name, file.read()
    except DAMAGED:
        raise ValueError(
            f"{archive.name}: damaged; expected an npm or Debian package, fetch it again"
        ) from None


def unwrapped(archive: Path) -> bytes:
    """The tar of an npm or Debian package."""
    if archive.suffix != ".deb":
        return archive.read_bytes()
    command = ["dpkg-deb", "--fsys-tarfile", archive]
    return subprocess.run(command, capture_output=True, check=True).stdout


def read_picture(content: bytes, side: int, is_whole: bool = False) -> Image.Image | None:
    """The picture, at most `side` px; None where it cannot be read.

    Args:
        is_whole: in RGB as it is; else in RGBA, cut to what is opaque, and None where it is no
            cut-out of one thing.
    """
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB" if is_whole else "RGBA")
    except (UnidentifiedImageError, OSError):
        return None
    if not is_whole:
        solid = np.asarray(image)[..., 3] > 127
        if not OPAQUE[0] < solid.mean() < OPAQUE[1]:
            return None
        image = image.crop(Image.fromarray(solid).getbbox())
    if min(image.size) < MIN_SIDE:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def emoji_names() -> dict[str, str]:
    """The file name of each emoji's picture, without ending, to its name; things alone."""
    with TemporaryDirectory() as folder:
        archive = download(["npm", "pack", "--silent", NAMES], Path(folder), NAMES)
        content = dict(members(archive, ("package/data-by-emoji.json",)))
    table = json.loads(content["package/data-by-emoji.json"])
    return {
        "-".join(f"{ord(letter):04x}" for letter in emoji): about["slug"]
        for emoji, about in table.items()
        if about["group"] in GROUPS
    }


def fetch(source: Source, names: dict[str, str], side: int, folder: Path) -> None:
    """Makes the folder and writes the source's pictures into it.

    Args:
        names: of emoji by file name; those without are left out. Other pictures keep their own.
    """
    command = ["npm", "pack", "--silent"] if source.is_emoji else ["apt-get", "download"]
    folder.mkdir()
    with TemporaryDirectory() as temporary:
        archive = download([*command, source.package], Path(temporary), source.package)
        for name, content in tqdm(members(archive, source.folders), source.package):
            stem = PurePosixPath(name).stem
            if source.is_emoji:
                stem = names.get(stem, "")
            picture = read_picture(content, side, source.is_whole) if stem else None
            if picture is not None:
                picture.save(folder / f"{stem}.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=CUT_OUTS)
    parser.add_argument("--side", type=int, default=128, help="at most so many pixels")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    check_least(args, side=MIN_SIDE)
    check_writable(args.output_dir)
    wanted = [name for name in args.sources if not (args.output_dir / name).exists()]
    names = emoji_names() if any(SOURCES[name].is_emoji for name in wanted) else {}
    for name in wanted:
        write_atomically(args.output_dir / name, partial(fetch, SOURCES[name], names, args.side))
    for name in args.sources:
        count = len(list((args.output_dir / name).glob("*.png")))
        print(f"{args.output_dir / name}: {count} pictures, {SOURCES[name].licence}")
    return OK


if __name__ == "__main__":
    run(main)
