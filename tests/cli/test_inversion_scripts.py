"""The scripts of textual inversion, from pictures to drawings with several words."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from elite import Concept, stages
from elite.loading import load_stable_diffusion, stock_pipeline
from tests import tiny
from tests.conftest import error_of, files, run_script, same_pictures
from textual_inversion.files import EMBEDDING_FILES, load_embeddings, load_into, save_embeddings
from textual_inversion.pictures import PictureFolder, read_templates


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        Image.fromarray(tiny.picture(i, width=48, height=40)[0]).save(folder / f"{i}.png")
    return folder


@pytest.fixture(params=["sd", "xl"])
def family(request, model_folder, xl_folder):
    return {"sd": model_folder, "xl": xl_folder}[request.param]


def train(model, photos, output_dir, *options, steps=2, word="<cat>"):
    return run_script(
        "train_textual_inversion.py",
        *("--pretrained_model_name_or_path", model, "--train_data_dir", photos),
        *("--output_dir", output_dir, "--placeholder_token", word, "--num_vectors", "2"),
        *("--max_train_steps", str(steps), "--train_batch_size", "2"),
        *("--gradient_accumulation_steps", "1", *options),
    )


def infer(model, output_dir, *options):
    return run_script(
        "inference_textual_inversion.py",
        *("--pretrained_model_name_or_path", model, "--output_dir", output_dir),
        *("--num_inference_steps", "2", "--device", "cpu", *options),
    )


def test_a_word_is_learned_and_drawn(family, photos, tmp_path):
    """Train, preview, draw; and a stock pipeline of diffusers draws the same picture."""
    options = ("--infer_during_train", "--infer_interval", "2", "--num_infer_images", "2")
    assert train(family, photos, tmp_path / "cat", *options, "--initializer_token", "critter") == 0
    rows = load_embeddings(tmp_path / "cat")
    assert {len(by_name["<cat>"]) for by_name in rows.values()} == {2}
    assert (tmp_path / "cat" / "previews" / "000002.png").exists()
    assert (tmp_path / "cat" / "metrics.jsonl").exists()

    prompt = "a photo of a <cat> in the snow"
    arguments = ("--embeddings", tmp_path / "cat", "--prompt", prompt, "--num_images", "2")
    assert infer(family, tmp_path / "drawn", *arguments, "--seed", "5") == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == [
        "00000_00005.png",
        "00000_00006.png",
        "grid.png",
    ]
    with Image.open(tmp_path / "drawn" / "00000_00006.png") as picture:
        text = picture.text
    assert (text["prompt"], text["seed"], text["guidance_scale"]) == (prompt, "6", "5.0")
    assert {"model", "scheduler", "num_inference_steps", "diffusers"} <= text.keys()
    drawn = np.asarray(picture)
    stock = stock_pipeline(load_stable_diffusion(family))
    load_into(stock, rows)
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(6))
    expected = stock(
        prompt,
        latents=noise[None],
        num_inference_steps=2,
        guidance_scale=5.0,
        height=32,
        width=32,
        output_type="np",
    ).images[0]
    assert np.abs(expected * 255 - drawn).max() <= 0.51


def test_every_other_weight_stays(family, photos, tmp_path, monkeypatch):
    """Compared with the files, in the very objective that was trained."""
    trained = []
    fit = stages.fit
    monkeypatch.setattr(
        stages,
        "fit",
        lambda objective, *rest, **options: (
            trained.append(objective),
            fit(objective, *rest, **options),
        ),
    )
    assert train(family, photos, tmp_path) == 0
    parts = load_stable_diffusion(family)
    compared = 0
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if name not in parts:
            continue
        end = dict(trained[0].parts[name].state_dict())
        for key, value in parts[name].state_dict().items():
            assert torch.equal(
                value,
                end[
                    key.replace("embedding.weight", "embedding.known.weight")
                    if "token_embedding" in key
                    else key
                ],
            ), key
            compared += 1
    assert compared > 100
    start = trained[0].parts["text_encoder"].get_input_embeddings().learned
    assert torch.equal(load_file(tmp_path / "learned_embeds.safetensors")["<cat>"], start)


def test_learning_moves_the_rows_and_resumes_bit_for_bit(model_folder, photos, tmp_path):
    for name, steps in (("whole", 4), ("parts", 2)):
        options = ("--save_steps", "2", "--lr_scheduler", "constant")
        assert train(model_folder, photos, tmp_path / name, *options, steps=steps) == 0
    half = load_file(tmp_path / "parts" / "learned_embeds.safetensors")["<cat>"]
    options = ("--resume_from_checkpoint", "latest", "--lr_scheduler", "constant")
    assert train(model_folder, photos, tmp_path / "parts", *options, steps=4) == 0
    whole, resumed = (
        load_file(tmp_path / name / "learned_embeds.safetensors")["<cat>"]
        for name in ("whole", "parts")
    )
    assert torch.equal(whole, resumed) and not torch.equal(whole, half)


def test_fewer_steps_than_the_checkpoint_are_refused(model_folder, photos, tmp_path, capsys):
    assert train(model_folder, photos, tmp_path, steps=2) == 0
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    capsys.readouterr()
    assert train(model_folder, photos, tmp_path, "--resume_from_checkpoint", "latest", steps=1) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the checkpoint is of step 2, the run of 1 steps; raise --max_train_steps" in error
    names = {"config.yaml", "metrics.jsonl", "learned_embeds.safetensors"}
    assert names <= written.keys()
    assert all((tmp_path / name).read_bytes() == written[name] for name in names)


def test_two_words_in_one_prompt(model_folder, photos, tmp_path):
    for seed, name in enumerate(("one", "two")):
        assert train(model_folder, photos, tmp_path / name, "--seed", str(seed), steps=1) == 0
    clash = ("--embeddings", tmp_path / "one", tmp_path / "two", "--output_dir", tmp_path / "both")
    assert run_script("merge_embeddings.py", *clash) == 2
    assert not (tmp_path / "both").exists()
    assert run_script("merge_embeddings.py", *clash, "--rename", "<cat>=<dog>") == 0
    merged = ("--embeddings", tmp_path / "both")
    assert infer(model_folder, tmp_path / "a", *merged, "--prompt", "a <cat> and a <dog>") == 0
    assert infer(model_folder, tmp_path / "b", *merged, "--prompt", "a <dog> and a <cat>") == 0
    a, b = (np.asarray(Image.open(tmp_path / n / "00000_00042.png")) for n in "ab")
    assert not np.array_equal(a, b)


def test_concept_starts_a_word_and_becomes_one(model_folder, photos, tmp_path, concept, capsys):
    path = tmp_path / "corgi.safetensors"
    concept.save(path)
    start = ("--initializer_concept", path, "--num_vectors", "1", "--learning_rate", "1e-9")
    both = (*start, "--initializer_token", "critter")
    assert train(model_folder, photos, tmp_path / "both", *both) == 2
    assert "gives all vectors; leave one of them out" in capsys.readouterr().err
    assert train(model_folder, photos, tmp_path / "run", *start, steps=1) == 0
    learned = load_file(tmp_path / "run" / "learned_embeds.safetensors")["<cat>"]
    assert torch.allclose(learned, concept.words[0, :1], atol=1e-6)
    exported = ("--embeddings", path, "--output_dir", tmp_path / "export")
    assert run_script("merge_embeddings.py", *exported) == 0
    use = ("--embeddings", tmp_path / "export", "--prompt", "a <corgi>")
    assert infer(model_folder, tmp_path / "drawn", *use) == 0


def test_a_word_of_another_program_is_drawn_and_given_back(family, tmp_path):
    """As its file comes: A1111's for Stable Diffusion 1.x, one of clip_l and clip_g for SDXL."""
    rows, wide = torch.randn(2, 24), torch.randn(2, 32)
    xl = (family / "text_encoder_2").exists()
    content = {"clip_l": rows, "clip_g": wide} if xl else {"emb_params": rows}
    save_file(content, tmp_path / "easyneg.safetensors")
    word = ("--embeddings", tmp_path / "easyneg.safetensors")
    options = (*word, "--prompt", "a photo, easyneg")
    assert infer(family, tmp_path / "drawn", *options) == 0
    form = ("--format", "sdxl" if xl else "a1111")
    given = tmp_path / "given"
    assert run_script("merge_embeddings.py", *word, "--output_dir", given, *form) == 0
    again = ("--embeddings", next(given.iterdir()), "--prompt", "a photo, easyneg")
    assert infer(family, tmp_path / "again", *again) == 0
    assert same_pictures(tmp_path / "drawn", tmp_path / "again")


def test_learned_words_may_be_what_pictures_should_not_show(family, tmp_path):
    """As those of the negative embeddings that people have."""
    encoders = ("text_encoder", "text_encoder_2")[: 1 + (family / "text_encoder_2").exists()]
    torch.manual_seed(0)
    for encoder, width in zip(encoders, (24, 32), strict=False):
        save_embeddings(tmp_path / EMBEDDING_FILES[encoder], {"bad": torch.randn(2, width)})
    words = ("--embeddings", tmp_path, "--prompt", "a photo of a mug")
    for name, negative in (("with", "bad"), ("other", "bad, red")):
        assert infer(family, tmp_path / name, *words, "--negative_prompt", negative) == 0
    with Image.open(tmp_path / "with" / "00000_00042.png") as picture:
        assert picture.text["negative_prompt"] == "bad"
    assert not same_pictures(tmp_path / "with", tmp_path / "other")
    assert infer(family, tmp_path / "none", *words, "--negative_prompt", "red") == 2


def test_a_lora_is_drawn_and_named(family, tmp_path):
    lora = tmp_path / "ink.safetensors"
    tiny.save_lora(lora, SimpleNamespace(**load_stable_diffusion(family)))
    xl = (family / "text_encoder_2").exists()
    rows = {"clip_l": torch.randn(2, 24), "clip_g": torch.randn(2, 32)}
    save_file(rows if xl else {"emb_params": rows["clip_l"]}, tmp_path / "cat.safetensors")
    word = ("--embeddings", tmp_path / "cat.safetensors", "--prompt", "a photo of cat")
    for name, options in (("plain", ()), ("ink", ("--lora", f"{lora}:0.5"))):
        assert infer(family, tmp_path / name, *word, *options) == 0
    assert not same_pictures(tmp_path / "plain", tmp_path / "ink")
    with Image.open(tmp_path / "ink" / "00000_00042.png") as picture:
        assert picture.text["lora"].startswith("ink 0.5 (")


# --- pictures and captions ------------------------------------------------------------------------


def sample(folder, **options):
    dataset = PictureFolder(folder, resolution=8, placeholder="<cat>", **options)
    return dataset.sample(0, np.random.default_rng(0))


def test_rotated_photos_are_read_upright(tmp_path):
    """Stored lying on its side with the EXIF mark that says so: red belongs to the top."""
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[:8, :, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    stored.save(tmp_path / "photo.png", exif=exif)
    square = sample(tmp_path, center_crop=True)
    assert square["size_and_crop"].tolist() == [16, 8, 4, 0, 8, 8]
    assert (square["pixels"][0, :4] > 0.9).all() and (square["pixels"][0, 4:] < -0.9).all()


def test_squares_are_cut_from_wide_pictures(tmp_path):
    ramp = np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "photo.png")
    dataset = PictureFolder(tmp_path, resolution=8, placeholder="<cat>")
    rng = np.random.default_rng(0)
    samples = [dataset.sample(0, rng) for _ in range(40)]
    lefts = {int(s["size_and_crop"][3]) for s in samples}
    assert len(lefts) > 8 and min(lefts) >= 0 and max(lefts) <= 16
    mirrored = [bool(s["pixels"][0, 0, 0] > s["pixels"][0, 0, -1]) for s in samples]
    assert 5 < sum(mirrored) < 35
    for square, is_mirrored in zip(samples, mirrored, strict=True):  # the ramp tells where it lies
        darkest = (float(square["pixels"][0].min()) + 1) / 2 * 255 / 10
        left = 16 - darkest if is_mirrored else darkest
        assert int(square["size_and_crop"][3]) == round(left)
    assert len({s["caption"] for s in samples}) > 10
    assert all("<cat>" in s["caption"] and "{}" not in s["caption"] for s in samples)


def test_masks_are_no_pictures_of_the_concept(tmp_path):
    tiny.save_pairs(tmp_path, 2)
    dataset = PictureFolder(tmp_path, resolution=8, placeholder="<cat>")
    assert [path.name for path in dataset.paths] == ["pair0.png", "pair1.png"]


def test_captions_of_a_file(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a drawing of {}\n\n  {} on a shelf \n")
    assert read_templates(path) == ("a drawing of {}", "{} on a shelf")
    path.write_text("a drawing\n")
    with pytest.raises(ValueError, match=r"holds 'a drawing'; expected captions with \{\}"):
        read_templates(path)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--placeholder_token", "critter"), "is a token of this model already"),
        (("--initializer_token", "red blue critter"), "is 3 tokens for 2 vector(s)"),
        (("--initializer_concept", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("--template_file", "nowhere.txt"), "nowhere.txt: No such file"),
        (("--train_data_dir", "nowhere"), "nowhere: no such folder"),
        (("--infer_prompt", "a cat"), "infer_prompt: got 'a cat', expected a {} in it"),
        (("--mixed_precision", "fp16"), "--mixed_precision fp16: trains on GPUs only; use bf16 or"),
    ],
)
def test_mistakes_in_training_are_one_line(
    model_folder, photos, tmp_path, capsys, options, message
):
    assert train(model_folder, photos, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "run").exists()


def test_folder_without_pictures(model_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert train(model_folder, tmp_path / "empty", tmp_path / "run") == 2
    assert "empty: no picture in it" in capsys.readouterr().err


def test_prompt_without_a_learned_word(model_folder, photos, tmp_path, capsys):
    assert train(model_folder, photos, tmp_path / "cat", steps=1) == 0
    arguments = ("--embeddings", tmp_path / "cat", "--prompt", "a photo of a cat")
    assert infer(model_folder, tmp_path / "drawn", *arguments) == 2
    assert "none of the learned words <cat> is in it" in capsys.readouterr().err
    assert infer(model_folder, tmp_path / "drawn", *arguments[:3], "a <cat>", "a <caat>") == 2
    assert "--prompt 'a <caat>': none of the learned words" in capsys.readouterr().err
    unread = ("--negative_prompt", "<cat>", "--guidance_scale", "1")
    assert infer(model_folder, tmp_path / "drawn", *arguments, *unread) == 2
    assert not (tmp_path / "drawn").exists()


def test_a_word_of_one_text_encoder_replaces_one_of_two(tmp_path):
    for name, encoders in (("xl", EMBEDDING_FILES), ("sd", ["text_encoder"])):
        for encoder in encoders:
            file = tmp_path / name / EMBEDDING_FILES[encoder]
            save_embeddings(file, {"<cat>": torch.randn(1, 24)})
        merge = ("--embeddings", tmp_path / name, "--output_dir", tmp_path / "both")
        assert run_script("merge_embeddings.py", *merge) == 0
        assert files(tmp_path / "both") == {EMBEDDING_FILES[encoder] for encoder in encoders}


def test_text_that_is_cut_off_is_told(model_folder, tmp_path, capsys):
    path = tmp_path / "words.safetensors"
    save_file({"<w>": torch.ones(1, 24), "<big>": torch.ones(100, 24), "oto": torch.ones(24)}, path)
    use = ("--embeddings", path, "--prompt")
    for prompt, message in (
        ("word " * 90 + "<w>", "the learned word '<w>', 1 token(s), runs past the 77"),
        ("a <big> on the beach", "the learned word '<big>', 100 token(s), runs past the 77"),
        ("a photo", "none of the learned words"),
    ):
        assert infer(model_folder, tmp_path / "drawn", *use, prompt) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "drawn").exists()
    assert infer(model_folder, tmp_path / "drawn", *use, "a <W>" + " a" * 73 + " on a mug") == 0
    (note,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert note.endswith("reads 77 tokens and leaves out 'on a mug'; shorten it")


def test_captions_that_cut_the_word_are_found_before_training(
    model_folder, photos, tmp_path, capsys
):
    """They ended a run in its middle."""
    lines = ["a photo of {}", "a {odd} photo of {}", "very " * 90 + "{}"]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    given = ("--template_file", tmp_path / "captions.txt")
    assert train(model_folder, photos, tmp_path / "out", *given) == 2
    assert "captions.txt: " in (error := error_of(capsys)) and "lower --num_vectors" in error
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert train(model_folder, photos, tmp_path / "out", "--num_vectors", "20000") == 2
    assert "--num_vectors 20000: a prompt has room for " in error_of(capsys)


def test_a_concept_file_of_several_objects_starts_no_word(
    model_folder, photos, concept, tmp_path, capsys
):
    Concept.stack([concept, concept]).save(tmp_path / "two.safetensors")
    given = ("--initializer_concept", tmp_path / "two.safetensors")
    assert train(model_folder, photos, tmp_path / "out", *given) == 2
    assert "two.safetensors: holds 2 objects, expected one" in error_of(capsys)


def test_any_name_can_be_renamed(tmp_path):
    for folder in ("one", "two"):
        save_embeddings(tmp_path / folder / "my mug.safetensors", {"emb_params": torch.ones(1, 24)})
    given = [tmp_path / folder / "my mug.safetensors" for folder in ("one", "two")]
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "learned_embeds_2.bin").touch()
    options = ("--output_dir", tmp_path / "both", "--rename", "my mug=<mug2>")
    assert run_script("merge_embeddings.py", "--embeddings", *given, *options) == 0
    assert load_embeddings(tmp_path / "both")["text_encoder"].keys() == {"my mug", "<mug2>"}
    assert files(tmp_path / "both") == {"learned_embeds.safetensors"}


def test_pictures_say_of_which_vectors_they_are(model_folder, tmp_path):
    said = []
    for value in (1.0, 2.0):
        save_embeddings(tmp_path / "cat.safetensors", {"<cat>": torch.full((1, 24), value)})
        given = ("--embeddings", tmp_path / "cat.safetensors", "--prompt", "a photo of <cat>")
        assert infer(model_folder, tmp_path / "out", *given) == 0
        (path,) = (tmp_path / "out").glob("0*.png")
        with Image.open(path) as picture:
            said.append(dict(picture.text))
    assert said[0]["embeddings"] != said[1]["embeddings"] and said[0]["dtype"] == "torch.float32"
