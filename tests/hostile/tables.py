"""Bad tables: CSV files, the index of mask boxes, files of prompts and captions."""

import io
import pickle
from collections.abc import Callable, Iterator

import numpy as np

from data_scripts import make_masks
from elite.annotations import _box_type, load_mask_boxes, read_boxes
from elite.masks import find_object
from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from evaluation.subjects import read_prompts
from tests.hostile.harness import Case, World
from tests.hostile.pictures import GOOD, encoded, square
from textual_inversion.pictures import read_templates

BOXES = "ImageID,XMin,XMax,YMin,YMax\n"
GOOD_ROW = "0123456789abcdef,0.1,0.6,0.1,0.6\n"


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, world: World) -> None:
        self.target = str(world.canary)

    def __reduce__(self) -> tuple:
        return open, (self.target, "w")


# --- boxes of stage 1 -----------------------------------------------------------------------------


def refused_boxes() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "no_header", GOOD_ROW.encode()
    yield "missing_column", b"ImageID,XMin,XMax,YMin\na,0,1,0\n"
    yield "other_names", b"image,x0,x1,y0,y1\na,0,1,0,1\n"
    yield "short_row", (BOXES + "a,0.1,0.6\n").encode()
    yield "word_for_number", (BOXES + "a,0.1,0.6,zero,0.6\n").encode()
    yield "blank_number", (BOXES + "a,0.1,,0.1,0.6\n").encode()
    yield "comma_decimals", (BOXES + 'a,"0,1","0,6","0,1","0,6"\n').encode()
    yield "semicolons", BOXES.replace(",", ";").encode()
    yield "utf16", (BOXES + GOOD_ROW).encode("utf-16")
    yield "latin1", (BOXES + "caf\xe9,0.1,0.6,0.1,0.6\n").encode("latin-1")
    yield "binary", np.random.default_rng(0).bytes(4000)
    yield "zip", b"PK\3\4" + bytes(500)
    yield "null_bytes", (BOXES + "a\0,\0,1,0,1\n").encode()
    yield "field_of_10_mb", (BOXES + "x" * 10_000_000 + ",0.1,0.6,0.1,0.6\n").encode()
    yield "header_of_10_mb", b"x" * 10_000_000 + b"\n" + GOOD_ROW.encode()
    yield "open_quote", (BOXES + '"' + GOOD_ROW * 200_000).encode()
    yield "wide_name", (BOXES + "n" * 100_000 + ",0.1,0.6,0.1,0.6\n" + GOOD_ROW * 16_000).encode()


def unusable_boxes() -> Iterator[tuple[str, str]]:
    """Rows without an object in them: left out, and refused where nothing else is there."""
    yield "nan", "a,nan,nan,nan,nan\n"
    yield "one_nan", "a,0.1,nan,0.1,0.6\n"
    yield "infinite", "a,-inf,inf,-inf,inf\n"
    yield "swapped", "a,0.6,0.1,0.6,0.1\n"
    yield "point", "a,0.5,0.5,0.5,0.5\n"
    yield "outside", "a,2,3,2,3\n"
    yield "pixels", "a,10,400,10,400\n"
    yield "huge", "a,1e300,1e308,0,1\n"


def boxes_case(world: World, content: bytes) -> None:
    path = world.write("annotations/test-annotations-bbox.csv", content)
    dataset = OpenImagesBoxes(world.folder, resolution=32, clip_size=32)
    assert len(dataset) == len(read_boxes(path)[1]) > 0


def kept_box(world: World, rows: str) -> None:
    """The good row survives its neighbours."""
    names, boxes = read_boxes(world.write("boxes.csv", BOXES + rows + GOOD_ROW))
    assert names.tolist() == [b"0123456789abcdef"]
    np.testing.assert_allclose(boxes, [[0.1, 0.6, 0.1, 0.6]], rtol=1e-6)


def box_elsewhere(world: World, name: str) -> None:
    """A row that names a file outside the dataset."""
    world.write("secret.jpg", encoded(kind="JPEG"))
    world.write(
        "set/annotations/test-annotations-bbox.csv",
        BOXES + GOOD_ROW.replace("0123456789abcdef", name.format(world.folder)),
    )
    (world.folder / "set/images/test").mkdir(parents=True)
    dataset = OpenImagesBoxes(world.folder / "set", resolution=32, clip_size=32)
    dataset.sample(0, np.random.default_rng(0))


# --- the index of stage 2 -------------------------------------------------------------------------


def saved(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    head = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head


def good_index() -> np.ndarray:
    return np.array([("m.png", 0, 120, 0, 120)], dtype=_box_type(40))


def refused_indices(world: World) -> Iterator[tuple[str, bytes]]:
    fields = good_index().dtype.descr
    yield "empty", b""
    yield "pickle", pickle.dumps(RunsCode(world))
    yield "pickled_array", saved(np.array([{"a": RunsCode(world)}], dtype=object))
    yield "cut", saved(good_index())[:-9]
    yield "other_fields", saved(np.zeros(3, dtype=[("x", "i4")]))
    yield "no_fields", saved(np.zeros((3, 5)))
    yield (
        "floats",
        saved(
            np.array(
                [("m", 0, 9, 0, 9)],
                [("name", "U9")] + [(side, "f8") for side in ("hs", "he", "ws", "we")],
            )
        ),
    )
    yield "names_are_numbers", saved(np.zeros(2, [("name", "i8"), *fields[1:]]))
    yield "no_rows_axis", saved(good_index()[0])
    yield "two_axes", saved(good_index()[None])
    yield (
        "lying_shape",
        npy_header(
            f"{{'descr': {fields}, 'fortran_order': False, 'shape': (10**9,), }}".replace(
                "10**9", "1000000000"
            )
        )
        + bytes(50),
    )
    yield (
        "lying_width",
        npy_header(
            "{'descr': [('name', '<U2000000000')], 'fortran_order': False, 'shape': (1,), }"
        ),
    )
    yield "header_is_code", npy_header(f"__import__('os').system('touch {world.canary}')")
    yield "header_of_parens", npy_header("(" * 100)
    buffer = io.BytesIO()
    np.savez(buffer, good_index())
    yield "npz", buffer.getvalue()


def index_case(world: World, content: bytes) -> None:
    load_mask_boxes(world.write("segs/test_bbox_dict.npy", content))


def masks_case(world: World, boxes: np.ndarray, csv: str) -> None:
    """One sample of stage 2 by this index and table."""
    world.write("images/test/a.jpg", encoded(GOOD.resize((200, 200)), "JPEG"))
    world.write("segs/test/m.png", encoded(square("L", 0, 255, 200)))
    world.write("segs/test_bbox_dict.npy", saved(boxes))
    world.write("annotations/test-annotations-object-segmentation.csv", csv)
    dataset = OpenImagesMasks(world.folder, resolution=32, clip_size=32, latent_size=16)
    dataset.sample(0, np.random.default_rng(0))


def index_of(name: str, *sides: int) -> np.ndarray:
    return np.array([(name, *sides)], dtype=_box_type(max(1, len(name))))


# --- boxes for GrabCut ----------------------------------------------------------------------------

GRAB = "name,left,top,right,bottom\n"


def refused_grabs() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "missing_column", b"name,left,top,right\na,1,1,9\n"
    yield "short_row", (GRAB + "a,1,2\n").encode()
    yield "floats", (GRAB + "a,1.5,2,9,9\n").encode()
    yield "nan", (GRAB + "a,nan,2,9,9\n").encode()
    yield "5000_digits", (GRAB + "a," + "9" * 5000 + ",2,9,9\n").encode()
    yield "stranger", (GRAB + "../../etc/passwd,1,1,9,9\n").encode()
    yield "twice", (GRAB + "a,1,1,9,9\na,1,1,9,9\n").encode()
    yield "utf16", (GRAB + "a,1,1,9,9\n").encode("utf-16")
    yield "binary", np.random.default_rng(1).bytes(3000)
    yield "10_mb", (GRAB + "a," + "1" * 10_000_000 + ",1,9,9\n").encode()
    yield "swapped", (GRAB + "a,30,30,10,10\n").encode()
    yield "outside", (GRAB + "a,-5,0,4000,4000\n").encode()
    yield "whole", (GRAB + "a,0,0,40,40\n").encode()
    yield "10_to_30", (GRAB + f"a,0,0,{10**30},{10**30}\n").encode()


def grab_case(world: World, content: bytes) -> None:
    path = world.write("boxes.csv", content)
    world.write("in/a.png", encoded())
    boxes = make_masks.read_boxes(path, {"a"})
    failures = [
        r.failure
        for r in make_masks.make_masks(
            make_masks.PairFolder(world.folder / "in").pairs, boxes, False, find_object
        )
        if r.failure
    ]
    if failures:
        raise ValueError(failures[0])


# --- prompts and captions -------------------------------------------------------------------------


def refused_prompts() -> Iterator[tuple[str, str, bytes]]:
    yield "empty", "p.yaml", b""
    yield "list", "p.yaml", b"- a {}\n"
    yield "unknown_key", "p.yaml", b"prompts: {object: ['a {}']}\nrun: ls\n"
    yield "no_kind", "p.yaml", b"prompts: {thing: ['a {}']}\n"
    yield "no_list", "p.yaml", b"prompts: {object: a {} }\n"
    yield "mapping_in_list", "p.yaml", b"prompts: {object: [{}]}\n"
    yield "number_in_list", "p.yaml", b"prompts: {object: [7]}\n"
    yield "no_placeholder", "p.yaml", b"prompts: {object: ['a dog']}\n"
    yield "two_placeholders", "p.yaml", b"prompts: {object: ['a {} {}']}\n"
    yield (
        "living_is_lists",
        "p.yaml",
        b"prompts: {object: ['a {}'], living: ['a {}']}\nliving: [[a]]\n",
    )
    yield "classes_are_lists", "p.yaml", b"prompts: {object: ['a {}']}\nclasses: {a: [b]}\n"
    yield "python_object", "p.yaml", b"prompts: !!python/object/apply:os.system ['touch canary']\n"
    yield "txt_empty", "p.txt", b""
    yield "txt_binary", "p.txt", np.random.default_rng(3).bytes(3000)
    yield "txt_wrong_escape", "p.txt", rb"Prompts: ['a {0} {1} \x'.format(a, b)]"
    yield "txt_wrong_name", "p.txt", rb"Prompts: ['a {0} {1} \N{nonsense}'.format(a, b)]"
    yield "txt_code", "p.txt", b"Prompts: [open('canary', 'w').format(1)]"
    yield "txt_blanks", "p.txt", b"a," + b" " * 300_000 + b"!\n"
    yield "txt_blank_lines", "p.txt", b"\n" * 300_000 + b"!"
    yield "txt_of_10_mb", "p.txt", b"a, b\n" * 2_000_000


def refused_templates() -> Iterator[tuple[str, bytes]]:
    yield "captions_empty", b""
    yield "captions_utf16", "a {}".encode("utf-16")
    yield "captions_without", b"a {}\na dog\n"
    yield "captions_10_mb", b"x" * 10_000_000
    yield "captions_control", b"a \x1b[31m dog\n"


def feed(
    kind: str, name: str, action: Callable, *values: object, refused: bool | None = True
) -> Case:
    return Case(kind, name, lambda world: action(world, *values), refused)


def cases(world: World) -> Iterator[Case]:
    for name, content in refused_boxes():
        yield feed("csv", f"boxes {name}", boxes_case, content)
    for name, rows in unusable_boxes():
        yield feed("csv", f"boxes {name} alone", boxes_case, (BOXES + rows).encode())
        yield feed("csv", f"boxes {name}", kept_box, rows, refused=False)
    yield feed(
        "csv",
        "boxes with byte order mark",
        boxes_case,
        (BOXES + GOOD_ROW).encode("utf-8-sig"),
        refused=False,
    )
    for name in ("../../../secret", "{}/secret", "a\0b", "..", "/dev/zero", "n" * 200):
        yield feed("csv", f"boxes elsewhere {name[:20]!r}", box_elsewhere, name)
    for name, content in refused_indices(world):
        yield feed("index", name, index_case, content)
    table = "MaskPath,ImageID\n{},a\n"
    yield feed(
        "index",
        "good",
        masks_case,
        index_of("m.png", 50, 150, 50, 150),
        table.format("m.png"),
        refused=False,
    )
    for name, boxes in (
        ("swapped", index_of("m.png", 160, 40, 160, 40)),
        ("overflow", index_of("m.png", -(2**31), 2**31 - 1, -(2**31), 2**31 - 1)),
        ("negative", index_of("m.png", -900, -700, -900, -700)),
        ("outside", index_of("m.png", 5000, 5200, 5000, 5200)),
        ("climbs", index_of("../../m.png", 40, 160, 40, 160)),
        ("absolute", index_of("/dev/zero", 40, 160, 40, 160)),
        ("no_name", index_of("", 40, 160, 40, 160)),
    ):
        yield feed("index", name, masks_case, boxes, table.format(boxes["name"][0]))
    for name, content in refused_grabs():
        yield feed("csv", f"grabcut {name}", grab_case, content)
    for name, file, content in refused_prompts():
        yield Case("texts", name, lambda w, f=file, c=content: read_prompts(w.write(f, c)))
    for name, content in refused_templates():
        yield Case("texts", name, lambda w, c=content: read_templates(w.write("t.txt", c)))
