"""Critters and other people's things in one batch, and the parts that learn from it at 64 px."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from elite.loading import load_parts, side_in_pixels
from elite.text import encode_text
from small_world import large, large_training, samples
from small_world.mixed import (
    EXTENTS,
    ON_BLACK,
    MixedWorld,
    base_batch,
    image_encoder_batch,
    seen_by_clip,
    seen_by_vae,
    sprite,
    words_of,
)
from small_world.models import build_image_encoder, build_text_encoder, build_unet, build_vae
from small_world.pretrain import COLOUR_ATTRIBUTES, image_features
from small_world.things import find_things, is_held_out_thing
from small_world.tokenizer import build_tokenizer, world_words
from small_world.world import ATTRIBUTES

SIDE = 48
CRITTERS = 4
COLOURS = {"toy_car": (250, 0, 250), "jar": (0, 250, 250)}  # as no critter or scene has them


def save_things(folder) -> None:
    """Wide rectangles, each in one colour."""
    for name, colour in COLOURS.items():
        levels = np.full((30, 60, 4), (*colour, 255), np.uint8)
        Image.fromarray(levels).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> MixedWorld:
    folder = tmp_path_factory.mktemp("mixed")
    views, records = samples._render_chunk("trained", SIDE, 0, CRITTERS)
    np.save(folder / "views.npy", views)
    (folder / "records.json").write_text(json.dumps(records))
    save_things(folder)
    things = find_things(folder, held_out=False)
    return MixedWorld(folder, things, SIDE, rounds=40, backgrounds=2, device=torch.device("cpu"))


def is_thing(view: torch.Tensor) -> bool:
    """Whether a view (4, H, W) shows a rectangle's colour where its mask is."""
    inside = view[:3, view[3] > 0].median(dim=1).values
    return any(
        torch.allclose(inside, torch.tensor(colour) / 255, atol=0.03) for colour in COLOURS.values()
    )


def test_a_batch_is_half_things_and_says_what_it_shows(world):
    torch.manual_seed(0)
    batch = world.batch(4)
    assert batch["views"].shape == (4, 2, 4, SIDE, SIDE)
    assert batch["labels"].shape == (4, 2, len(ATTRIBUTES))
    shows_thing = [is_thing(pair[0]) for pair in batch["views"]]
    assert sorted(shows_thing) == [False, False, True, True]
    for thing, labels, ids in zip(shows_thing, batch["labels"], batch["input_ids"], strict=True):
        caption = world.tokenizer.decode(ids, skip_special_tokens=True)
        assert ("toy car" in caption or "jar" in caption) == thing
        assert bool((labels[:, 2] == -1).all()) == thing, "a thing has no colour to name"
    assert sum("jar" in world.tokenizer.decode(ids) for ids in batch["input_ids"]) == 1


def test_things_lie_where_their_masks_say_in_their_framing(world):
    torch.manual_seed(1)
    records = torch.arange(len(world.framings))
    views = world.compose(records)
    seen = set()
    for pair, framings, scenes in zip(views, world.framings, world.scenes, strict=True):
        for view, framing, scene in zip(pair, framings, scenes, strict=True):
            name, mask = list(EXTENTS)[framing], view[3] > 0
            seen.add(name)
            assert is_thing(view)
            background = view[:3, ~F.max_pool2d(view[3:], 3, 1, 1)[0].bool()]
            if name in ON_BLACK:
                assert not background.any()
            elif name == "scene":
                behind = world.backgrounds[scene].float() / 255  # (2, 3, side, side)
                differs = (view[:3] - behind).abs().amax(1)  # of each of the two
                around = F.max_pool2d(view[3:], 3, 1, 1)[0] == 0
                assert min(float(d[around].max()) for d in differs) < 0.01
            least, most = (extent * SIDE for extent in EXTENTS[name])
            sides = [mask.any(axis).nonzero() for axis in (0, 1)]
            longer = max(float(s.max() - s.min() + 1) for s in sides)
            if name != "zoom":  # and no turn makes a wide rectangle much longer
                assert least * 0.95 - 2 <= longer <= most * 1.1 + 2
    assert seen == {*EXTENTS}


def test_a_sprite_keeps_its_aspect(tmp_path):
    save_things(tmp_path)
    levels = sprite(tmp_path / "jar.png", 40)
    assert levels.shape == (40, 40, 4)
    assert (levels[10:30] == (0, 250, 250, 255)).all()
    assert not levels[:10].any() and not levels[30:].any()


def test_recoloured_pictures_have_no_colours_to_name(world):
    torch.manual_seed(2)
    batch = image_encoder_batch(world, 4)  # 30 % of them: one
    assert batch["clip_pixels"].shape == (4, 2, 3, SIDE, SIDE)
    assert batch["objects"].shape == (4, 2, 4, SIDE // 2, SIDE // 2)
    hidden = [list(ATTRIBUTES).index(name) for name in COLOUR_ATTRIBUTES]
    assert (batch["labels"][0][:, hidden] == -1).all()
    assert (batch["labels"][1:][:, :, hidden] >= 0).any()
    critters = (batch["labels"] >= 0).sum((1, 2)) > 2
    assert ((batch["profile"] > 0).all(1) == critters).all(), "things have no profile"
    alone, mask = batch["objects"].split([3, 1], dim=2)
    assert not alone[mask.expand_as(alone) == 0].any(), "the object alone, on black"


def test_latents_are_of_first_views_and_features_of_second_ones(world, monkeypatch):
    torch.manual_seed(0)
    vae, image_encoder = build_vae(SIDE).eval(), build_image_encoder(SIDE, 32).eval()
    vae.register_to_config(scaling_factor=2.0)
    batch = world.batch(4)
    monkeypatch.setattr(world, "batch", lambda count: dict(batch))
    made = base_batch(vae, image_encoder, world, 4)
    first, second = batch["views"].unbind(1)
    with torch.no_grad():
        latents = 2 * vae.encode(seen_by_vae(first)).latent_dist.mean
        features = image_features(image_encoder, seen_by_clip(second[:, :3]))
    torch.testing.assert_close(made["latents"], latents)
    torch.testing.assert_close(made["features"], features)
    side = SIDE // 8
    assert made["object_share"].shape == (4, 1, side, side) == (4, 1, *latents.shape[2:])


def test_words_of_things_are_tokens_and_those_of_the_world_stay():
    more = ["alarm", "clock", "critters", "re"]
    tokenizer, plain = build_tokenizer(more), build_tokenizer()
    for word in [*world_words(), *more]:
        assert len(tokenizer.tokenize(word)) == 1, word
    assert len(plain.tokenize("alarm")) > 1


def test_words_of_names():
    assert words_of(["toy car", "Car", "1st prize", "piñata"]) == ["car", "prize", "toy"]


def test_parts_of_another_size_fit_together():
    """Pictures of 64 px, and widths of their own."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    vae, unet = build_vae(128), build_unet(128, 64, (32, 48, 64))
    assert side_in_pixels(unet, vae) == vae.config.sample_size == 64
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        context = encode_text(build_text_encoder(tokenizer, 64), torch.zeros(1, 48).long())
        assert unet(latents, torch.tensor([5]), context).sample.shape == (1, 16, 16, 16)
        states = build_image_encoder(128, 64)(torch.zeros(1, 3, 128, 128)).last_hidden_state
    assert states.shape == (1, 1 + 16 * 16, 64)


def test_everything_is_trained_and_saved(tmp_path, monkeypatch, capsys):
    """For a fraction of a second each, at least a step."""
    save_things(tmp_path)
    size = large.Size(128, 32, (32, 48), 2, 2, 1, 4)
    monkeypatch.setitem(large.SIZES, "tiny", size)
    monkeypatch.setattr(large_training, "NUM_PREVIEWS", 1)
    monkeypatch.setattr(large_training, "preview_prompts", lambda: ["a red critter"])
    out = tmp_path / "out"
    words = ["--art", str(tmp_path), "--output_dir", str(out), "--size", "tiny"]
    assert large.main([*words, "--minutes", "0.001", "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert [f"\n{part}: step " in told for part in large_training.RECIPES] == [True] * 3
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (128, 6 * 128)
    parts = load_parts(out / "model")
    assert side_in_pixels(parts["unet"], parts["vae"]) == 64
    assert parts["image_encoder"].config.image_size == 128
    assert len(parts["tokenizer"].tokenize("toy")) == 1
    assert all(p.isfinite().all() for p in parts["unet"].parameters())
    assert parts["vae"].config.scaling_factor != build_vae().config.scaling_factor


def test_a_loss_that_is_not_finite_is_told():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch):
            return {"loss": (self.weight * torch.nan).sum()}

    with pytest.raises(ValueError, match="vae: loss is nan at step 1"):
        large_training.train(
            "vae", Broken(), lambda: {"x": torch.ones(1)}, torch.device("cpu"), 0.001
        )


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder of PNGs .*fetch_art.py"):
        large.main(["--art", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "value"), [("--minutes", "0"), ("--workers", "0")])
def test_other_numbers_are_refused(flag, value, tmp_path):
    with pytest.raises(ValueError, match=f"{flag} {value}"):
        large.main(["--art", ".", "--output_dir", str(tmp_path), flag, value])


def test_one_thing_in_six_is_held_out(tmp_path):
    for i in range(60):
        (tmp_path / f"thing{i}.png").touch()
    everything = find_things(tmp_path)
    held_out, trained = find_things(tmp_path, True), find_things(tmp_path, False)
    assert sorted(held_out + trained) == everything and 4 < len(held_out) < 18
    assert all(is_held_out_thing(file) for file in held_out)
