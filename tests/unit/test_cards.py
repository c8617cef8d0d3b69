"""Model cards, and what goes to the hub: a hub in this process answers instead of the real one."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx  # what huggingface_hub speaks through
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import set_client_factory
from PIL import Image

from elite import Concept, ElitePipeline, LocalMapper
from elite.cards import CARD, EMPTY_CARD, gallery_card, pipeline_card
from elite.checkpoint import load_mapper
from elite.sheets import TILE
from tests import tiny
from tests.conftest import REPOSITORY as CHECKOUT
from tests.conftest import run_script
from tests.tiny import draw

REPOSITORY = "someone/elite-tiny"
REVISION = "a" * 40
URL = f"https://huggingface.co/{REPOSITORY}"


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub:
    """Answers as the hub's HTTP interface does, and keeps the files of commits."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/api/repos/create":
            return httpx.Response(200, json={"url": URL})
        if found := re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/(.+)", path):
            return self.resolve(request, found[1])
        if "/tree/" in path:
            return httpx.Response(200, json=[self.entry(name) for name in self.files])
        body = request.content
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            return httpx.Response(200, json={"files": answer})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            return httpx.Response(200, json={"commitUrl": f"{URL}/commit/1", "commitOid": "1"})
        siblings = [{"rfilename": name} for name in self.files]
        return httpx.Response(200, json={"id": REPOSITORY, "sha": REVISION, "siblings": siblings})

    def entry(self, name: str) -> dict:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": sha1(content)}

    def resolve(self, request: httpx.Request, name: str) -> httpx.Response:
        if name not in self.files:
            return httpx.Response(404, headers={"X-Error-Code": "EntryNotFound"}, request=request)
        content = self.files[name]
        headers = {"X-Repo-Commit": REVISION, "Content-Length": str(len(content))}
        headers["ETag"] = sha1(content)
        return httpx.Response(200, headers=headers, content=content, request=request)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(made)))
    yield made
    set_client_factory(httpx.Client)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- to the hub and back --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_all_that_was_saved_is_uploaded(tmp_path, hub, pipe, how):
    pipe.save_pretrained(tmp_path / "saved")
    if how == "push_to_hub":
        pipe.push_to_hub(REPOSITORY, token="hf_nothing")
    else:
        target = str(tmp_path / "pushed")
        pipe.save_pretrained(target, push_to_hub=True, repo_id=REPOSITORY, token="hf_nothing")
    assert hub.files == files_of(tmp_path / "saved")
    assert {CARD, "model_index.json", "global_mapper/config.json"} <= hub.files.keys()
    assert not [name for name in hub.files if name.endswith((".bin", ".pt", ".pkl"))]


def test_a_stranger_draws_from_the_hub(tmp_path, hub, pipe, concept):
    expected = draw(pipe, concept=concept)
    pipe.push_to_hub(REPOSITORY, token="hf_nothing")
    loaded = ElitePipeline.from_pretrained(REPOSITORY, cache_dir=tmp_path / "cache")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, concept=concept), expected)


def test_a_mapper_is_uploaded_with_its_card(hub, mappers):
    mappers[1].push_to_hub(REPOSITORY, token="hf_nothing")
    assert set(hub.files) == {CARD, "config.json", "diffusion_pytorch_model.safetensors"}
    card = hub.files[CARD].decode()
    assert card == mappers[1].card() and 'local_mapper="THIS FOLDER"' in card
    assert "3 levels of CLIP\nfeatures, 24 wide" in card


def test_a_card_on_the_hub_stays(hub, pipe):
    mine = b"---\nlibrary_name: diffusers\nlicense: mit\n---\n\nMine."
    hub.files[CARD] = mine
    pipe.push_to_hub(REPOSITORY, token="hf_nothing")
    assert hub.files[CARD].split() == mine.split()


def test_a_mapper_comes_from_the_hub_by_its_name(tmp_path, hub, mappers, parts, monkeypatch):
    mappers[1].push_to_hub(REPOSITORY, token="hf_nothing")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    models = parts["unet"], parts["image_encoder"]
    for offline in (False, True):  # fetched, then as it lies in the cache
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        loaded = load_mapper(LocalMapper, REPOSITORY, *models).state_dict()
        assert all(torch.equal(loaded[key], x) for key, x in mappers[1].state_dict().items())
    with pytest.raises(ValueError, match="someone/else: not a LocalMapper folder"):
        load_mapper(LocalMapper, "someone/else", *models)


def test_encode_uploads_a_gallery(tmp_path, hub, whole_model, pairs, capsys):
    folder = tmp_path / "concepts"
    (folder / "old").mkdir(parents=True)
    (folder / "old.safetensors").write_bytes(b"of an earlier run")
    given = ("--pretrained_model_name_or_path", whole_model, "--test_data_dir", pairs)
    given += ("--output_dir", folder, "--mixed_precision", "no", "--device", "cpu")
    given += ("--push_to_hub", "--hub_model_id", REPOSITORY, "--hub_token", "hf_nothing")
    assert run_script("encode.py", *given) == 0
    names = {f"pair{i}.safetensors" for i in range(2)} | {f"pictures/pair{i}.png" for i in range(2)}
    assert set(hub.files) == {CARD, *names}  # nothing that is no pair's
    assert hub.files["pair0.safetensors"] == (folder / "pair0.safetensors").read_bytes()
    assert f"uploaded: {URL}/commit/1" in capsys.readouterr().out
    card = ModelCard(hub.files[CARD].decode())
    assert card.data.tags[-1] == "elite-concepts" and card.data.base_model is None
    assert "| [pair1](pair1.safetensors) | ![](pictures/pair1.png) |" in card.text
    assert Concept.load(folder / "pair0.safetensors").fingerprint in card.text
    assert Image.open(folder / "pictures" / "pair0.png").size == (2 * TILE, TILE)


def test_a_gallery_is_of_one_pair_of_mappers(tmp_path, hub, whole_model):
    """The concept of a pair that cannot be read any more is an earlier one's."""
    pairs, folder = tiny.save_pairs(tmp_path / "own"), tmp_path / "concepts"
    Concept(torch.zeros(1, 3, 24), None, "f00d").save(folder / "pair1.safetensors")
    (pairs / "pair1.png").write_bytes(b"damaged")
    given = ("--pretrained_model_name_or_path", whole_model, "--test_data_dir", pairs)
    given += ("--output_dir", folder, "--device", "cpu", "--push_to_hub")
    given += ("--hub_model_id", REPOSITORY, "--hub_token", "hf_nothing")
    assert run_script("encode.py", *given) == 3
    assert set(hub.files) == {CARD, "pair0.safetensors", "pictures/pair0.png"}


def test_a_gallery_that_is_refused_is_one_line(tmp_path, hub, whole_model, pairs, capsys):
    own = shutil.copytree(pairs, tmp_path / "pairs")
    (own / "pair1_bg.png").write_bytes(b"no picture")
    given = ("--pretrained_model_name_or_path", whole_model, "--test_data_dir", own)
    given += ("--output_dir", tmp_path / "c", "--mixed_precision", "no", "--device", "cpu")
    assert run_script("encode.py", *given, "--push_to_hub", "--hub_model_id", "a/b/c") == 2
    assert "pair1_bg.png: not a readable image" in capsys.readouterr().err, "told before"
    assert run_script("encode.py", *given, "--push_to_hub", "--hub_model_id", "a/b/c") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a/b/c: not uploaded" in told and "hf auth login" in told
    assert (tmp_path / "c" / "pair0.safetensors").exists()


# --- cards ----------------------------------------------------------------------------------------


def run_snippet(card: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    """What the card says under "How to use", in fewer steps."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    image, mask = tiny.picture(0)
    Image.fromarray(image).save(tmp_path / "object.jpg")
    Image.fromarray(mask).save(tmp_path / "object_bg.png")
    code = code.replace("THIS REPOSITORY OR FOLDER", folder.as_posix())
    code = code.replace("THIS FOLDER", folder.as_posix())
    few = code.replace("seed=0", "seed=0, num_inference_steps=2")
    assert few != code
    monkeypatch.chdir(tmp_path)
    exec(compile(few, "card", "exec"), {})


def test_the_card_of_a_saved_pipeline_is_true(tmp_path, pipe, monkeypatch):
    pipe.save_pretrained(tmp_path / "elite")
    card = ModelCard.load(tmp_path / "elite" / CARD)
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert "elite" in card.data.tags and card.data.base_model is None  # it came from a folder
    assert "both the global and the local branch. Pictures are 32 x 32 px" in card.text
    run_snippet(card.text, tmp_path / "elite", tmp_path, monkeypatch)
    assert (tmp_path / "drawn.png").stat().st_size > 500


def test_a_card_names_the_base_model_by_its_name_on_the_hub_only(tmp_path):
    named = pipeline_card("CompVis/stable-diffusion-v1-4", local_branch=False, resolution=512)
    assert ModelCard(named).data.base_model == "CompVis/stable-diffusion-v1-4"
    assert "global branch only" in named
    for path in (str(tmp_path), "C:\\models\\sd", "checkpoints/small_world", ""):
        assert "base_model" not in pipeline_card(path, local_branch=True, resolution=512)


def test_a_card_of_ones_own_stays(tmp_path, mappers):
    (tmp_path / CARD).write_text("Mine: é", encoding="utf-8")
    mappers[0].save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == "Mine: é"
    (tmp_path / CARD).write_text(EMPTY_CARD, encoding="utf-8")
    mappers[0].save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / CARD).data.tags[0] == "elite"


def test_the_card_of_a_gallery_names_files_that_have_odd_names(tmp_path):
    text = gallery_card(["my cup|1", "b"], "pictures", "abc", "CompVis/stable-diffusion-v1-4")
    assert "| [my cup\\|1](my%20cup%7C1.safetensors) | ![](pictures/my%20cup%7C1.png) |" in text
    assert ModelCard(text).data.base_model == "CompVis/stable-diffusion-v1-4"


def test_a_card_does_not_hinder_loading(tmp_path, mappers):
    mappers[1].save_pretrained(tmp_path)
    assert (tmp_path / CARD).exists()
    loaded, saved = LocalMapper.from_pretrained(tmp_path).state_dict(), mappers[1].state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_the_card_of_the_small_world_is_true(tmp_path, monkeypatch):
    folder = CHECKOUT / "checkpoints" / "small_world"
    card = ModelCard.load(folder / CARD)
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    for part in ("## How to use", "## Data", "## Licence", "## Limits"):
        assert part in card.text
    run_snippet(card.text, folder, tmp_path, monkeypatch)
    assert (tmp_path / "drawn.png").stat().st_size > 500
