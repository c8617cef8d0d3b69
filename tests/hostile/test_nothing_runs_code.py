"""No call in the code unpickles, evaluates or trusts what a file says."""

import ast
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY

SOURCES = sorted(
    path
    for places in ("*.py", "[!.]*/*.py", "integrations/*/*.py")
    for path in REPOSITORY.glob(places)
    if path.parent.name != "tests"
)
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
EXECUTES = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
YAML_LOADS = {"yaml.load", "yaml.load_all"}
UNSAFE_YAML = {"yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"}
SAFE_LOADERS = {"_Loader", "yaml.SafeLoader", "yaml.CSafeLoader"}  # _Loader: a SafeLoader


def dangers(source: str) -> Iterator[str]:
    """One line for each place that could run a stranger's code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or ""] + [alias.name for alias in node.names]
            yield from (f"imports {n}" for n in names if n.split(".")[0] in PICKLES)
        if isinstance(node, ast.Call):
            found = danger(node)
            if found:
                yield f"line {node.lineno}: {found}"


def danger(call: ast.Call) -> str:
    name = ast.unparse(call.func)
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name.endswith("torch.load") and given.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
        return "np.load of pickles"
    if name in EXECUTES or given.get("shell", "False") != "False":
        return name
    if name in UNSAFE_YAML or (name in YAML_LOADS and given.get("Loader") not in SAFE_LOADERS):
        return f"{name} without a safe loader"
    unsafe = {"trust_remote_code": "False", "use_safetensors": "True"}
    wrong = [key for key, only in unsafe.items() if given.get(key, only) != only]
    return f"{wrong[0]}={given[wrong[0]]}" if wrong else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_could_run_a_strangers_code(path):
    assert not list(dangers(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "exec(text)",
        "yaml.load(t)",
        "yaml.load(t, Loader=yaml.Loader)",
        "yaml.unsafe_load(t)",
        "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "Model.from_pretrained(p, use_safetensors=False)",
        "subprocess.run(c, shell=True)",
    ],
)
def test_the_scan_sees(source):
    assert list(dangers(source))


def test_versions_are_pinned():
    """What is installed for tests and CI is what was looked at."""
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (REPOSITORY / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(("#", "-r")):
                assert "==" in line, f"{name}: {line}"
