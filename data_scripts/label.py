"""Make a training set of a pile of photos: boxes by a zero-shot detector, masks by Segment
Anything, duplicates and what is no use left out, all packed into shards.

    python data_scripts/label.py PHOTOS SHARDS --words dog cat "coffee mug" \\
        --detector_name_or_path google/owlv2-base-patch16-ensemble \\
        --sam_name_or_path facebook/sam-vit-base

PHOTOS is a folder, with folders in it, of pictures; nothing in it is changed. SHARDS is then the
--train_data_dir of train_global.py and train_local.py. Look at --sheet first: examples of what was
kept, and of what was dropped for each reason.

What is found lies in SHARDS/labels: interrupted, it goes on, and with other limits nothing that was
found is looked for again (remove the *.tar, plan.json and index.json of SHARDS first). Without
--sam_name_or_path masks are made by GrabCut. Exit code 2: nothing could be done; 3: some photos
could not be read (they are listed, the rest is packed).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from data_scripts.label_sheet import draw_sheet
from data_scripts.labelling import UNREADABLE, Labelled, Labeller, Limits, label_all, measure_all
from data_scripts.make_masks import check_sheet, finder
from data_scripts.make_shards import Item, add_packing, check_packing, key_for, pack_and_index
from elite.console import check_least, quiet_libraries, run, script_parser
from elite.files import check_writable, quick_digest, sole_writer, write_atomically

LABELS, LOCK = "labels", "label.lock"
FLOOR = 0.1  # score; what is below it is noise, and is not written down


# --- what is packed -------------------------------------------------------------------------------


class PackedLabels:
    """The photos that are kept, as `make_shards` packs them; `len` and `item`."""

    def __init__(self, labelled: Sequence[Labelled]) -> None:
        self.labelled = [one for one in labelled if not one.dropped]
        self.keys: list[str] = []
        taken: set[str] = set()
        for one in self.labelled:
            key = key_for(str(PurePosixPath(one.photo.name).with_suffix("")))
            self.keys.append(key_for(one.photo.name) if key in taken else key)  # a.png of a.jpg
            taken.add(key)

    def __len__(self) -> int:
        return len(self.labelled)

    def item(self, number: int) -> Item:
        photo, things = self.labelled[number].photo, self.labelled[number].kept
        height, width = photo.size
        boxes = [thing.found.box for thing in things]
        labels = {
            "boxes": [
                [box.left / width, box.right / width, box.top / height, box.bottom / height]
                for box in boxes
            ],
            "mask_boxes": [list(thing.mask_box) for thing in things],
            "words": [thing.found.word for thing in things],
            "scores": [round(thing.found.score, 4) for thing in things],
        }
        masks = [thing.mask_path for thing in things if thing.mask_path]
        return Item(self.keys[number], photo.path, masks, labels)


# --- the command line -----------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser, usual = script_parser(__doc__), Limits()
    parser.add_argument("photos", type=Path, help="folder of pictures, with folders in it")
    parser.add_argument("shards", type=Path, help="folder for the shards")
    parser.add_argument("--words", nargs="+", required=True, help="what to look for")
    parser.add_argument(
        "--detector_name_or_path",
        required=True,
        help="folder or hub name of an OWLv2, Grounding DINO or other zero-shot detector",
    )
    parser.add_argument(
        "--sam_name_or_path",
        help="folder or hub name of a Segment Anything model, as facebook/sam-vit-base (default: "
        "masks by GrabCut, without a model)",
    )
    limits = {
        "min_score": "least score of an object",
        "min_side": "least side of its box and of its mask, in pixels",
        "max_aspect": "most that a side may be of the other",
        "min_share": "least share of the picture that its box may cover",
        "max_share": "largest such share",
        "max_overlap": "most that two boxes may overlap, intersection over union",
    }
    for name, text in limits.items():
        value = getattr(usual, name)
        parser.add_argument(
            f"--{name}", type=type(value), default=value, help=f"{text} (default {value})"
        )
    parser.add_argument(
        "--max_distance",
        type=int,
        default=4,
        help="bits of 64 in which the hashes of two photos that show the same may differ (default "
        "4; -1 keeps them all)",
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        default=Path("outputs/label.png"),
        help="contact sheet of what was kept and dropped (default outputs/label.png)",
    )
    add_packing(parser)
    return parser.parse_args(arguments)


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError where a flag is out of range, or something would be written among the
    photos."""
    check_packing(args)
    check_least(args, min_side=1)
    ranges = {
        "min_score": (FLOOR, 1),
        "max_aspect": (1, 100),
        "min_share": (0, 1),
        "max_share": (0, 1),
        "max_overlap": (0, 1),
        "max_distance": (-1, 16),
    }
    for name, (low, high) in ranges.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {low} to {high}")
    if not args.photos.is_dir():
        raise ValueError(f"{args.photos}: no such folder; expected photos in it")
    for name in ("shards", "sheet"):
        path = getattr(args, name)
        if path.resolve().is_relative_to(args.photos.resolve()):
            raise ValueError(f"{path}: lies among the photos; choose another folder")
    check_sheet(args.sheet, args.photos)
    check_writable(args.shards)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    check_args(args)
    quiet_libraries()
    from elite.detector import Detector

    detector = Detector(args.detector_name_or_path, args.words)
    find = finder("sam" if args.sam_name_or_path else "grabcut", args.sam_name_or_path)
    limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    networks = [getattr(one, "model", None) for one in (detector, find)]
    weights = quick_digest(network.state_dict() for network in networks if network is not None)
    models = f"{args.detector_name_or_path} {args.words} {args.sam_name_or_path} {weights}"
    folder = args.shards / LABELS
    with sole_writer(folder / LOCK, "labels"):
        photos, unreadable = measure_all(args.photos, args.workers)
        label = Labeller(partial(detector, least=FLOOR), find, limits, folder, models)
        labelled, failures = label_all(photos, label, args.max_distance)
        failures = [*unreadable, *failures]
        print(report(labelled, len(failures), args.sheet))
        packed = PackedLabels(labelled)
        if not len(packed):
            raise ValueError(f"{args.photos}: no photo is kept; see {args.sheet} for the reasons")
        return pack_and_index(packed, args.shards, args, failures)


def report(labelled: Sequence[Labelled], unreadable: int, sheet: Path) -> str:
    """Writes the sheet. Returns what was kept, and how many were dropped for each reason."""
    photos = Counter(one.dropped for one in labelled)
    photos[UNREADABLE] += unreadable
    things = Counter(thing.dropped for one in labelled for thing in one.things)
    write_atomically(sheet, draw_sheet(labelled, unreadable).save)
    lines = [f"{photos.pop('', 0)} of {len(labelled) + unreadable} photos kept; dropped:"]
    lines += [f"  {count} {reason}" for reason, count in photos.most_common() if count]
    lines += [f"{things.pop('', 0)} objects kept; dropped:"]
    lines += [f"  {count} {reason}" for reason, count in things.most_common()]
    return "\n".join([*lines, f"look at {sheet} first"])


if __name__ == "__main__":
    run(main)
