"""Nothing in the code supposes a Unix: text files say their encoding, file names hold what Windows
allows, and no module asks for what only Unix has."""

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from elite.stream import TrainingStream, stream_loader
from tests.conftest import REPOSITORY
from tests.open_images import make_open_images

FOLDERS = ("elite", "small_world", "data_scripts", "benchmarks")  # the last reads Linux's /proc
SOURCES = sorted(
    [*REPOSITORY.glob("*.py"), *(p for f in FOLDERS for p in (REPOSITORY / f).glob("**/*.py"))]
)
BYTES = {"Image", "os", "tarfile"}
TEXT_METHODS = {"read_text": 0, "write_text": 1, "open": 2}  # and where they take the encoding
UNIX_ONLY = {"fcntl", "pwd", "grp", "resource", "termios", "pty"}
UNIX_CALLS = {"fork", "killpg", "getuid", "SIGKILL", "SIGALRM", "symlink_to", "symlink", "mkfifo"}

every_source = pytest.mark.parametrize(
    "path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix()
)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def name_of(function: ast.expr) -> str:
    return getattr(function, "attr", None) or getattr(function, "id", "")


def without_encoding(tree: ast.AST) -> list[int]:
    """Lines of calls that read or write text in whatever encoding the machine prefers."""
    lines = []
    for call in calls(tree):
        name = name_of(call.func)
        # Image.open, os.open and tarfile.open, which are of bytes
        of_bytes = isinstance(call.func, ast.Attribute) and name_of(call.func.value) in BYTES
        if name not in TEXT_METHODS or of_bytes or is_binary(call):
            continue
        keywords = {keyword.arg for keyword in call.keywords}
        if "encoding" not in keywords and len(call.args) <= TEXT_METHODS[name]:
            lines.append(call.lineno)
    return lines


def is_binary(call: ast.Call) -> bool:
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [node.value for node in given if isinstance(node, ast.Constant)]
    return any(
        isinstance(mode, str) and re.fullmatch(r"[rwax]\+?b|b[rwax]", mode) for mode in modes
    )


def unix_names(tree: ast.AST) -> set[str]:
    guarded = {
        node
        for choice in ast.walk(tree)
        if isinstance(choice, ast.If) and "sys.platform" in ast.unparse(choice.test)
        for node in ast.walk(choice)
    }
    imported = {
        alias.name.split(".")[0]
        for node in set(ast.walk(tree)) - guarded
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return (imported & UNIX_ONLY) | (used & UNIX_CALLS)


def starts_a_shell(tree: ast.AST) -> bool:
    shells = [
        keyword
        for call in calls(tree)
        for keyword in call.keywords
        if keyword.arg == "shell" and getattr(keyword.value, "value", True)
    ]
    of_os = {ast.unparse(call.func) for call in calls(tree)} & {"os.system", "os.popen"}
    return bool(shells) or bool(of_os)


@every_source
def test_text_files_say_their_encoding(path):
    assert without_encoding(tree_of(path)) == []


@every_source
def test_needs_no_unix(path):
    assert path.parent.name == "benchmarks" or unix_names(tree_of(path)) == set()
    assert not starts_a_shell(tree_of(path))


def test_every_file_name_is_one_on_windows():
    files = [
        path.relative_to(REPOSITORY)
        for folder in (*FOLDERS, "checkpoints", "configs", "docs", "test_datasets", "tests")
        for path in (REPOSITORY / folder).rglob("*")
    ]
    reserved = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?$")
    assert len(files) > 100
    for file in files:
        for part in file.parts:
            assert not re.search(r'[<>:"|?*\\]|[ .]$', part) and not reserved.match(part), file
    assert len({file.as_posix().lower() for file in files}) == len(files)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("p.read_text()", True),
        ("p.write_text(text)", True),
        ("open(p)", True),
        ("p.open('w')", True),
        ("open(p, mode='a')", True),
        ("p.read_text(encoding='utf-8')", False),
        ("p.write_text(text, 'utf-8')", False),
        ("open(p, 'rb')", False),
        ("p.open('wb')", False),
        ("Image.open(p)", False),
    ],
)
def test_the_scan_sees_what_it_should(code, found):
    assert bool(without_encoding(ast.parse(code))) == found


@pytest.mark.parametrize("code", ["import fcntl", "os.fork()", "a.symlink_to(b)"])
def test_the_scan_sees_unix(code):
    assert unix_names(ast.parse(code))


@pytest.mark.parametrize("code", ["run(x, shell=True)", "os.system(x)"])
def test_the_scan_sees_shells(code):
    assert starts_a_shell(ast.parse(code))


@pytest.mark.parametrize("kind", [OpenImagesBoxes, OpenImagesMasks])
def test_samples_travel_to_workers_that_are_not_forked(tmp_path, kind):
    """Windows and macOS start them anew and send them the dataset."""
    root = make_open_images(tmp_path, n=3)
    stream = TrainingStream(kind(root, resolution=32, clip_size=32), seed=1)
    loader = stream_loader(stream, batch_size=1)
    again, collate, start = pickle.loads(
        pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn))
    )
    assert collate is loader.collate_fn and start is loader.worker_init_fn
    assert again[2]["caption"] == stream[2]["caption"]
    assert (again[2]["pixels"] == stream[2]["pixels"]).all()
