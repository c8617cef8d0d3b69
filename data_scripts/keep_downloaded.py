"""Keep the annotations of those Open Images files that are there, to train on a partial download.

    python data_scripts/keep_downloaded.py OPEN_IMAGES_ROOT [--set_name test]

Writes the tables of boxes and of masks anew, without rows whose image or mask is not on the disk;
the whole ones stay as `annotations/*.all.csv`, so that it can be run again once there is more. Exit
code 2: nothing was written.
"""

import csv
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite.annotations import csv_opened, file_key
from elite.console import OK, add_set_name, run, script_parser
from elite.files import sha256_of, write_atomically, write_text
from elite.open_images import files_in, image_file

TABLES = ("annotations-bbox", "annotations-object-segmentation")


def rows_of(path: Path, root: Path, set_name: str) -> Iterator[tuple[list[str], bool]]:
    """The rows of a table, its header first, and whether their files are there."""
    masks = {file_key(m.name.encode()) for m in files_in(root / "segs" / set_name, ".png")}

    @cache
    def is_image(image_id: str) -> bool:
        try:
            return image_file(root / "images" / set_name, image_id).exists()
        except ValueError:  # no name of a file
            return False

    with csv_opened(path) as (header, lines):
        if "ImageID" not in header:
            raise KeyError("ImageID")
        image, mask = (header.index(n) if n in header else None for n in ("ImageID", "MaskPath"))
        yield header, True
        for row in csv.reader(map(bytes.decode, lines)):
            is_mask = mask is None or file_key(row[mask].encode()) in masks
            yield row, is_mask and is_image(row[image])


def keep(table: Path, root: Path, set_name: str) -> int:
    """Writes a table anew, unless nothing of it is there. Returns the number of rows kept.

    Raises:
        ValueError: it is damaged, was changed by hand since, or cannot be written.
    """
    whole, seal = table.with_suffix(".all.csv"), table.with_suffix(".sha256")
    source = whole if whole.exists() else table
    is_ours = source is table or not (seal.exists() and table.exists())
    if not is_ours and sha256_of(table) != seal.read_text(encoding="utf-8").strip():
        raise ValueError(
            f"{table}: was changed since it was made of {whole.name}; change that one in the same "
            f"way and remove this, or remove {whole.name} to go on from this"
        )
    rows = (row for row, is_there in rows_of(source, root, set_name) if is_there)
    first = list(itertools.islice(rows, 2))  # the header, and a row unless none is kept
    kept = 0

    def write(temporary: Path) -> None:
        nonlocal kept
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            kept = sum(1 for row in itertools.chain(first, rows) if writer.writerow(row)) - 1
        source.rename(whole)

    if len(first) > 1:
        seal.unlink(missing_ok=True)  # one of another table would call this one changed
        write_atomically(table, write)
        write_text(seal, f"{sha256_of(table)}\n")
    return kept


def main(arguments: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="Open Images root")
    add_set_name(parser)
    args = parser.parse_args(arguments)
    root, set_name = args.folder, args.set_name
    kept = {}
    for name in TABLES:
        table = root / "annotations" / f"{set_name}-{name}.csv"
        if table.exists() or table.with_suffix(".all.csv").exists():
            kept[table] = keep(table, root, set_name)
    if not any(kept.values()):
        raise ValueError(
            f"{root}: no annotations/{set_name}-{TABLES[0]}.csv with an image in images/{set_name}/"
            "; expected an Open Images folder, some of it downloaded"
        )
    for table, count in kept.items():
        print(f"{table}: {count} rows kept" if count else f"{table}: left as it is, none is there")
    return OK


if __name__ == "__main__":
    run(main)
