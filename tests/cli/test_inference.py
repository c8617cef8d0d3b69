"""The inference scripts: what they write, what they say, and how they fail."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from elite import ElitePipeline, GlobalMapper
from elite.pipeline import load_parts
from elite.sheets import label_tile
from tests import tiny
from tests.conftest import FAST, REPOSITORY, files, pixels, run_script, same_pictures


@pytest.fixture
def script(whole_model, pairs, tmp_path):
    """Runs an inference script on the whole model and the pairs, unless told otherwise."""

    def run(*arguments: str | Path, name: str = "inference_local.py") -> int:
        given = {"--pretrained_model_name_or_path": whole_model, "--test_data_dir": pairs}
        given["--output_dir"] = tmp_path / "out"
        defaults = [
            x for flag, value in given.items() if flag not in arguments for x in (flag, value)
        ]
        return run_script(name, *FAST, *defaults, *arguments)

    return run


def test_a_scene_that_is_cut_off_is_told(script, capsys):
    assert script("--selected_data", "0", "--template", "a {}" + " a" * 73 + " on the beach") == 0
    (note,) = [x for x in capsys.readouterr().err.splitlines() if "note: " in x]
    assert note.endswith("reads 77 tokens and leaves out 'on the beach'; shorten it")


@pytest.mark.parametrize("inside", ["", "object_l0p8"])
def test_a_folder_that_cannot_be_written_is_seen_before_anything_is_drawn(
    script, tmp_path, capsys, monkeypatch, inside
):
    monkeypatch.setattr(ElitePipeline, "__call__", lambda *_, **__: pytest.fail("has drawn"))
    (tmp_path / "out" if not inside else tmp_path / "out" / inside).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / inside).touch()
    assert script() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be written" in error and "Not a directory); choose another folder" in error


# --- what is written ------------------------------------------------------------------------------


def test_files_of_the_local_script(script, tmp_path, pairs, capsys):
    arguments = (
        "--template",
        "close-up of a {}, far away",
        "--llambda",
        "0.6",
        "--num_images",
        "2",
    )
    assert script(*arguments, "--suffix", "corgi-v1.2", "--seed", "41") == 0
    folder = tmp_path / "out" / "corgi-v1.2_l0p6"
    stems = [f"{index:05d}_{seed:05d}" for index in (0, 1) for seed in (41, 42)]
    assert files(folder) == {f"{s}.{kind}" for s in stems for kind in ("jpg", "png")} | {"grid.png"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corgi-v1.2_l0p6"]

    with Image.open(folder / "00001_00042.png") as picture:
        text = dict(picture.text)
        assert picture.size == (32, 32)
    assert text["prompt"] == "close-up of a S, far away" and text["seed"] == "42"
    assert text["object"] == "pair1"
    assert text["lambda"] == "0.6" and text["scheduler"] == "unipc"
    assert text["num_inference_steps"] == "2" and text["guidance_scale"] == "5.0"
    assert text["diffusers"] and text["transformers"] and text["torch"] == torch.__version__

    side_by_side = pixels(folder / "00001_00042.jpg").astype(int)  # generated | input
    shown = Image.fromarray(pixels(pairs / "pair1.png")).resize((32, 32), Image.Resampling.BICUBIC)
    expected = np.concatenate([pixels(folder / "00001_00042.png"), np.asarray(shown)], axis=1)
    assert side_by_side.shape == (32, 64, 3)
    assert np.abs(side_by_side - expected).mean() < 6  # JPEG, of noise

    output = capsys.readouterr()
    assert f"look at {folder / 'grid.png'} first" in output.out
    assert "4/4" in output.err  # progress bar
    assert "error" not in output.err


def test_pictures_are_the_pipelines(script, tmp_path, whole_model, pairs):
    assert script("--num_images", "2", "--batch_size", "3", "--seed", "5") == 0
    pipe = ElitePipeline.from_stable_diffusion(whole_model)
    pipe.set_progress_bar_config(disable=True)
    for index in (0, 1):
        concept = pipe.encode_concept(
            Image.open(pairs / f"pair{index}.png"), Image.open(pairs / f"pair{index}_bg.png")
        )
        for seed in (5, 6):
            drawn = pixels(tmp_path / "out" / "object_l0p8" / f"{index:05d}_{seed:05d}.png")
            options = {"concept": concept, "seed": seed, "num_inference_steps": 2}
            expected = np.asarray(pipe("a photo of a S", **options).images[0])
            # A batch rounds a few values the other way.
            assert np.abs(drawn.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["inference_local.py", "inference_global.py"])
def test_negative_prompt_is_drawn_and_kept_apart(script, tmp_path, whole_model, pairs, name):
    """The pipeline's own picture; one of another negative prompt is no picture to keep."""
    place = "object_l0p8" if "local" in name else "object_token0"
    path = tmp_path / "out" / place / "00000_00042.png"
    drawn = []
    for options in ((), ("--negative_prompt", "red, a mug"), ()):
        assert script(*options, name=name) == 0
        with Image.open(path) as picture:
            drawn.append((np.asarray(picture), picture.text.get("negative_prompt")))
    assert [text for _, text in drawn] == [None, "red, a mug", None]
    assert np.array_equal(drawn[0][0], drawn[2][0])
    local = None if "local" in name else False
    pipe = ElitePipeline.from_stable_diffusion(whole_model, local_mapper=local)
    image, mask = (Image.open(pairs / f"pair0{ending}.png") for ending in ("", "_bg"))
    options = {"negative_prompt": "red, a mug", "seed": 42, "num_inference_steps": 2}
    concept = pipe.encode_concept(image, mask)
    expected = pipe("a photo of a S", concept=concept, **options).images[0]
    assert np.array_equal(drawn[1][0], np.asarray(expected))
    assert not np.array_equal(drawn[1][0], drawn[0][0])


@pytest.mark.parametrize("name", ["inference_local.py", "inference_global.py"])
def test_speed_is_drawn_and_kept_apart(script, tmp_path, name):
    """Another speed is drawn anew, whichever was there; a knob wins over it."""
    place = "object_l0p8" if "local" in name else "object_token0"
    path, steps = tmp_path / "out" / place / "00000_00042.png", ("--num_inference_steps", "4")
    drawn = []
    fast = ("--speed", "fast")
    for options in ((), fast, (*fast, "--deep_every", "1"), ()):
        assert script(*steps, *options, name=name) == 0
        with Image.open(path) as picture:
            drawn.append((np.asarray(picture), picture.text.get("speed")))
    both, stop = "guidance_stop 0.7, deep_every 5", "guidance_stop 0.7"
    assert [text for _, text in drawn] == [None, both, stop, None]
    exact, fastest, without, again = (pixels for pixels, _ in drawn)
    assert np.array_equal(exact, again)
    assert not any(np.array_equal(a, b) for a, b in ((exact, fastest), (exact, without)))


def test_loras_are_drawn_and_kept_apart(script, tmp_path, whole_model, monkeypatch):
    """In few steps without guidance; another weight, or a file of other content, is drawn anew."""
    pipe, style = ElitePipeline.from_stable_diffusion(whole_model), tmp_path / "ink.safetensors"
    tiny.save_lora(tmp_path / "lcm.safetensors", pipe, 0)
    tiny.save_lora(style, pipe, 1)
    path = tmp_path / "out" / "object_l0p8" / "00000_00042.png"
    few = ("--scheduler", "lcm", "--guidance_scale", "1", "--selected_data", "0")
    drawn = []

    def run(*loras: str) -> None:
        assert script(*few, *(("--lora", *loras) if loras else ())) == 0
        with Image.open(path) as picture:
            drawn.append((np.asarray(picture), picture.text.get("lora")))

    both = [str(tmp_path / "lcm.safetensors"), f"{style}:0.5"]
    run()
    run(*both)
    run(both[0], f"{style}:0.4")
    tiny.save_lora(style, pipe, 2)
    run(*both)
    run()
    names = [None if text is None else re.sub(r"\(\w{16}\)", "()", text) for _, text in drawn]
    assert names == [None, "lcm 1 (), ink 0.5 ()", "lcm 1 (), ink 0.4 ()", names[1], None]
    assert drawn[1][1] != drawn[3][1]
    assert np.array_equal(drawn[0][0], drawn[4][0])
    others = [pixels for pixels, _ in drawn[:4]]
    assert not any(np.array_equal(a, b) for i, a in enumerate(others) for b in others[:i])
    run(*both)
    monkeypatch.setattr(ElitePipeline, "__call__", lambda *_, **__: pytest.fail("has drawn"))
    run(*both)


@pytest.mark.parametrize("name", ["inference_local.py", "inference_global.py", "evaluate.py"])
def test_a_bad_lora_is_one_line(script, tmp_path, capsys, name):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no safetensors")
    assert script("--lora", str(bad), name=name) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert f"{bad}: not a LoRA of this model" in line


def test_contact_sheet_shows_name_input_object_and_pictures(script, tmp_path, pairs):
    assert script("--num_images", "2") == 0
    sheet = pixels(tmp_path / "out" / "object_l0p8" / "grid.png")
    tile = 160
    assert sheet.shape[1] == 5 * tile and sheet.shape[0] >= 2 * tile
    names, rows = sheet[-2 * tile :, :tile], sheet[-2 * tile :, tile:]
    for index, name in enumerate(("pair0", "pair1")):
        tile_of_name = np.asarray(label_tile(name))
        np.testing.assert_array_equal(names[index * tile : (index + 1) * tile], tile_of_name)
    for index in (0, 1):
        row = rows[index * tile : (index + 1) * tile]
        image = pixels(pairs / f"pair{index}.png")  # 40 px: each pixel is 4 x 4 on the sheet
        mask = pixels(pairs / f"pair{index}_bg.png") > 0
        np.testing.assert_array_equal(row[2::4, 2:tile:4], image)
        np.testing.assert_array_equal(row[2::4, tile + 2 : 2 * tile : 4], image * mask)
        for number, seed in enumerate((42, 43)):
            drawn = pixels(tmp_path / "out" / "object_l0p8" / f"{index:05d}_{seed:05d}.png")
            left = (2 + number) * tile
            np.testing.assert_array_equal(row[2::5, left + 2 : left + tile : 5], drawn)


@pytest.mark.parametrize("token_index", ["0", "2", "full"])
def test_files_of_the_global_script(script, tmp_path, token_index, whole_model, pairs):
    assert script("--token_index", token_index, name="inference_global.py") == 0
    folder = tmp_path / "out" / f"object_token{token_index}"
    names = {f"{index:05d}_00042.{kind}" for index in (0, 1) for kind in ("jpg", "png")}
    assert files(folder) == names | {"grid.png"}
    pipe = ElitePipeline.from_stable_diffusion(whole_model, local_mapper=False)
    pipe.set_progress_bar_config(disable=True)
    image, mask = (Image.open(pairs / name) for name in ("pair1.png", "pair1_bg.png"))
    expected = pipe(
        "a photo of a S",
        concept=pipe.encode_concept(image, mask),
        words="all" if token_index == "full" else int(token_index),
        seed=42,
        num_inference_steps=2,
    ).images[0]
    np.testing.assert_array_equal(pixels(folder / "00001_00042.png"), np.asarray(expected))


def test_one_pair_keeps_its_index(script, tmp_path):
    assert script("--selected_data", "1") == 0
    folder = tmp_path / "out" / "object_l0p8"
    assert files(folder) == {"00001_00042.jpg", "00001_00042.png", "grid.png"}


def test_resolution_and_placeholder(script, tmp_path):
    arguments = (
        "--resolution",
        "48",
        "--placeholder_token",
        "photo",
        "--template",
        "a {} of a dog",
    )
    assert script(*arguments, "--selected_data", "0") == 0
    picture = tmp_path / "out" / "object_l0p8" / "00000_00042.png"
    assert pixels(picture).shape == (48, 48, 3)
    with Image.open(picture) as image:
        assert image.text["prompt"] == "a photo of a dog"


def test_release_checkpoints_draw_the_same(script, tmp_path, model_folder, release_folder):
    """Model folder without mappers, `.pt` files beside it."""
    assert script("--output_dir", tmp_path / "ours") == 0
    release = [
        x
        for name in ("global_mapper", "local_mapper")
        for x in (f"--{name}_path", release_folder / f"{name}.pt")
    ]
    arguments = ("--pretrained_model_name_or_path", model_folder, *release)
    assert script(*arguments, "--output_dir", tmp_path / "release") == 0
    assert same_pictures(tmp_path / "ours" / "object_l0p8", tmp_path / "release" / "object_l0p8")


def test_a_missing_release_file_is_named_before_the_model_is_read(script, tmp_path, capsys):
    nowhere = ("--pretrained_model_name_or_path", tmp_path / "nowhere")
    assert script(*nowhere, "--global_mapper_path", tmp_path / "no.pt") == 2
    assert "no.pt: no such file; expected a mapper of the release" in capsys.readouterr().err
    assert script(*nowhere, "--local_mapper_path", tmp_path / "no") == 2
    assert "no: no such folder; expected the LocalMapper that training" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["inference_local.py", "inference_global.py"])
def test_help(name, capsys):
    assert run_script(name, "--help") == 0
    text = capsys.readouterr().out
    for flag in ("--pretrained_model_name_or_path", "--test_data_dir", "--template", "--scheduler"):
        assert flag in text


# --- models saved by old libraries ----------------------------------------------------------------

OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def save_old(state: dict, part: Path, name: str) -> None:
    """Weights as pickled state dict instead of safetensors."""
    for path in part.glob("*.safetensors"):
        path.unlink()
    torch.save(state, part / name)


def make_old(folder: Path) -> None:
    """The folder as diffusers 0.11 and transformers 4.25 saved it."""
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert any(".mid_block.attentions.0.to_q." in key for key in vae)
    for new, old in OLD_VAE.items():
        vae = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value
            for key, value in vae.items()
        }
    save_old(vae, folder / "vae", "diffusion_pytorch_model.bin")
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_old(unet, folder / "unet", "diffusion_pytorch_model.bin")
    for part, prefix in (("text_encoder", "text_model."), ("image_encoder", "vision_model.")):
        state = load_file(folder / part / "model.safetensors")
        state = {prefix + key.removeprefix(prefix): value for key, value in state.items()}
        positions = len(state[f"{prefix}embeddings.position_embedding.weight"])
        state[f"{prefix}embeddings.position_ids"] = torch.arange(positions)[None]
        save_old(state, folder / part, "pytorch_model.bin")


def test_old_naming_draws_the_same(script, tmp_path, whole_model):
    assert script("--output_dir", tmp_path / "modern") == 0
    old = shutil.copytree(whole_model, tmp_path / "old_model")
    make_old(old)
    assert not list(old.glob("[tuvi]*/*.safetensors"))
    assert script("--pretrained_model_name_or_path", old, "--output_dir", tmp_path / "old") == 0
    assert same_pictures(tmp_path / "modern" / "object_l0p8", tmp_path / "old" / "object_l0p8")


# --- real processes -------------------------------------------------------------------------------


def test_script_from_another_directory(tmp_path, whole_model, pairs):
    """A real process: nothing but the pictures, the bar and two lines."""
    command = [sys.executable, REPOSITORY / "inference_local.py", *FAST]
    command += ["--pretrained_model_name_or_path", whole_model, "--test_data_dir", pairs]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "outputs" / "object_l0p8" / "grid.png").exists()
    assert run.stdout.count("\n") == 1
    lines = [line for line in run.stderr.splitlines() if line.strip() and "draw:" not in line]
    assert lines == [], "noise on stderr"


# --- bad input ------------------------------------------------------------------------------------


def errors(capsys) -> list[str]:
    """The error lines on stderr; nothing else of it may look like a crash."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if "error:" in line]
    for line in lines:
        assert line.startswith(("error: ", "inference_")), f"not on a line of its own: {line}"
    return lines


def without_mask(folder: Path) -> None:
    (folder / "pair0_bg.png").unlink()


def unreadable_image(folder: Path) -> None:
    (folder / "pair0.png").write_bytes(b"\x89PNG broken")


def unreadable_mask(folder: Path) -> None:
    (folder / "pair0_bg.png").write_bytes(b"")


def empty_mask(folder: Path) -> None:
    Image.new("L", (40, 40)).save(folder / "pair0_bg.png")


def mask_of_another_shape(folder: Path) -> None:
    Image.new("L", (40, 20), 255).save(folder / "pair0_bg.png")


BAD_PAIRS = [
    (without_mask, "pair0_bg.png: no such file; expected the mask of pair0.png"),
    (unreadable_image, "pair0.png: not a readable image"),
    (unreadable_mask, "pair0_bg.png: not a readable image"),
    (empty_mask, "pair0_bg.png: mask has no object pixel"),
    (mask_of_another_shape, "pair0_bg.png: mask is 40 x 20, its image 40 x 40"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_PAIRS, ids=lambda x: getattr(x, "__name__", ""))
def test_bad_pair_is_named_and_the_good_one_drawn(script, tmp_path, capsys, spoil, message):
    folder = tiny.save_pairs(tmp_path / "pairs")
    spoil(folder)
    assert script("--test_data_dir", folder) == 3
    (line,) = errors(capsys)
    assert line.startswith("error: ") and message in line
    drawn = tmp_path / "out" / "object_l0p8"
    assert files(drawn) == {"00001_00042.jpg", "00001_00042.png", "grid.png"}


def test_mask_of_another_size_is_resized(script, tmp_path):
    """Same aspect, four times as large: the same pictures."""
    folder = tiny.save_pairs(tmp_path / "pairs")
    for name in ("pair0_bg.png", "pair1_bg.png"):
        with Image.open(folder / name) as mask:
            mask.resize((160, 160), Image.Resampling.NEAREST).save(folder / name)
    assert script("--output_dir", tmp_path / "plain") == 0
    assert script("--test_data_dir", folder, "--output_dir", tmp_path / "large") == 0
    assert same_pictures(tmp_path / "plain" / "object_l0p8", tmp_path / "large" / "object_l0p8")


def test_each_bad_pair_has_its_line(script, tmp_path, capsys):
    folder = tiny.save_pairs(tmp_path / "pairs", count=3)
    without_mask(folder)
    (folder / "pair2.png").write_bytes(b"")
    assert script("--test_data_dir", folder) == 3
    first, second = errors(capsys)
    assert "pair0_bg.png" in first and "pair2.png" in second


def test_nothing_could_be_drawn(script, tmp_path, capsys):
    folder = tiny.save_pairs(tmp_path / "pairs", count=1)
    without_mask(folder)
    assert script("--test_data_dir", folder) == 2
    assert len(errors(capsys)) == 1
    assert not (tmp_path / "out" / "object_l0p8" / "grid.png").exists()


BAD_FLAGS = [
    (("--template", "a photo of a dog"), "no placeholder 'S'"),
    (("--template", "a {} and a {}"), "2 times the placeholder 'S'"),
    (("--template", "S and {}"), "2 times the placeholder 'S'"),
    (("--template", "a{}"), "no placeholder 'S'"),
    (("--template", "a {0} {name}"), "no placeholder 'S'"),
    (("--template", "a " * 80 + "{}"), "too long"),
    (("--scheduler", "lsm"), "--scheduler: got 'lsm', expected one of lms, dpm++"),
    (("--scheduler", "lcm", "--num_inference_steps", "51"), "--scheduler lcm: takes 50 steps at"),
    (("--selected_data", "2"), "has 2 pairs; choose 0 to 1, or -1 for all"),
    (("--llambda", "a lot"), "--llambda: got 'a lot', expected a number"),
    (("--lambda", "0.8"), "did you mean --llambda?"),
    (("--device", "abacus"), "device 'abacus' is not available"),
    (("--resolution", "33"), "33"),
]


@pytest.mark.parametrize(
    ("flags", "message"), BAD_FLAGS, ids=lambda x: " ".join(x)[:30] if isinstance(x, tuple) else ""
)
def test_bad_flags_are_one_line_and_2(script, tmp_path, capsys, flags, message):
    assert script(*flags) == 2
    (line,) = errors(capsys)
    assert message in line
    assert not list(tmp_path.glob("out/*/*.png"))


def test_word_that_does_not_exist(script, capsys):
    assert script("--token_index", "3", name="inference_global.py") == 2
    (line,) = errors(capsys)
    assert "word 3 does not exist; choose 0 to 2" in line


@pytest.mark.parametrize("kind", ["missing", "empty", "masks only", "file"])
def test_folder_without_pairs(script, tmp_path, capsys, kind):
    folder = tmp_path / "pairs"
    if kind == "file":
        folder.write_text("no folder")
    elif kind != "missing":
        tiny.save_pairs(folder, count=0 if kind == "empty" else 1)
    if kind == "masks only":
        (folder / "pair0.png").unlink()
    assert script("--test_data_dir", folder) == 2
    (line,) = errors(capsys)
    assert "expected NAME.jpg with NAME_bg.png" in line


@pytest.mark.parametrize(
    "part", ["unet", "vae", "text_encoder", "tokenizer", "global_mapper", "local_mapper"]
)
def test_missing_model_part(script, tmp_path, whole_model, capsys, part):
    model = shutil.copytree(whole_model, tmp_path / "model")
    shutil.rmtree(model / part)
    assert script("--pretrained_model_name_or_path", model) == 2
    (line,) = errors(capsys)
    assert part in line and str(model) in line


def test_missing_model_folder(script, tmp_path, capsys):
    assert script("--pretrained_model_name_or_path", tmp_path / "nowhere") == 2
    (line,) = errors(capsys)
    assert "nowhere" in line


def test_checkpoint_of_another_model(script, tmp_path, model_folder, capsys):
    parts = load_parts(model_folder)
    unet = type(parts["unet"]).from_config(dict(parts["unet"].config), cross_attention_dim=40)
    mapper = GlobalMapper.for_models(unet, parts["image_encoder"], 32, tiny.HIDDEN_LAYERS)
    tiny.save_official(mapper, tmp_path / "foreign.pt")
    assert script("--global_mapper_path", tmp_path / "foreign.pt") == 2
    (line,) = errors(capsys)
    assert "foreign.pt: does not fit this model" in line and "(40, 32), expected (24, 32)" in line


def test_output_folder_that_cannot_be_written(script, tmp_path, capsys):
    (tmp_path / "out").write_text("in the way")
    assert script() == 2
    (line,) = errors(capsys)
    assert "cannot be written" in line
