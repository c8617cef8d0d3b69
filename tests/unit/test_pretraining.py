"""What the parts of the small Stable Diffusion learn from, and what reaches which of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elite.text import encode_text, tokenize
from small_world.bodies import DIRECTIONS, profile
from small_world.captions import describe, fill, place
from small_world.models import WIDTH, build_image_encoder, build_text_encoder, build_vae
from small_world.objectives import (
    MAX_WORDS,
    WORD_SCALE,
    BaseModelObjective,
    ImageEncoderObjective,
    VAEObjective,
    num_told,
)
from small_world.pretrain import (
    COLOUR_ATTRIBUTES,
    Latents,
    Views,
    encode_all,
    preview_prompts,
    recoloured,
)
from small_world.render import draw
from small_world.samples import SIDE
from small_world.tokenizer import MAX_LENGTH, build_tokenizer, token_ids
from small_world.world import ATTRIBUTES, SCENES, labels, random_critter
from tests import tiny

COLOURED = [name in COLOUR_ATTRIBUTES for name in ATTRIBUTES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six samples as `render_samples` leaves them."""
    folder = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(0)
    views, records = np.empty((6, 2, SIDE, SIDE, 4), np.uint8), []
    for pair in views:
        critter = random_critter(rng)
        scenes = [str(name) for name in rng.choice(list(SCENES), 2, replace=False)]
        for i, scene in enumerate(scenes):
            pair[i] = np.dstack(draw(critter, scene, rng, SIDE))
        template = "a {}" + place(scenes[0])
        records.append(
            {
                "template": template,
                "noun": describe(critter),
                "concept": "S",
                "caption": fill(template, describe(critter)),
                "framings": ["scene", "scene"],
                "labels": [labels(critter, scene) for scene in scenes],
                "profile": profile(critter.numbers),
            }
        )
    np.save(folder / "views.npy", views)
    (folder / "records.json").write_text(json.dumps(records))
    return folder


# --- the VAE --------------------------------------------------------------------------------------


def test_training_the_decoder_leaves_the_latents_as_they_are():
    vae = tiny.build_models()["vae"]
    batch = {"pixels": torch.rand(2, 3, 32, 32) * 2 - 1, "seed": torch.tensor([1, 2])}
    VAEObjective(vae, decoder_only=True)(batch)["loss"].backward()
    assert all(p.grad is None for part in (vae.encoder, vae.quant_conv) for p in part.parameters())
    assert all(p.grad is not None for p in vae.decoder.parameters())


# --- the image encoder ----------------------------------------------------------------------------


def test_recoloured_views_keep_outlines_and_masks():
    views = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 4), dtype=np.uint8)
    found = [recoloured(views, np.random.default_rng(seed)) for seed in range(40)]
    assert all((some[..., 3] == views[..., 3]).all() for some in found)
    channels = {some[..., i].tobytes() for some in found for i in range(3)}
    assert channels == {
        picture[..., i].tobytes() for picture in (views, 255 - views) for i in range(3)
    }


def test_recoloured_views_have_no_colours_to_name(folder):
    dataset = Views(folder)
    own = dataset.labels[0]
    hidden = torch.where(torch.tensor(COLOURED), -1, own)
    found = [dataset.sample(0, np.random.default_rng(seed)) for seed in range(60)]
    plain = [some for some in found if torch.equal(some["labels"], own)]
    changed = [some for some in found if torch.equal(some["labels"], hidden)]
    assert len(plain) + len(changed) == 60 and 8 < len(changed) < 30
    assert all(torch.equal(s["clip_pixels"], plain[0]["clip_pixels"]) for s in plain)
    same = [torch.equal(some["clip_pixels"], plain[0]["clip_pixels"]) for some in changed]
    assert np.mean(same) < 0.5, "by chance one in twelve keeps its channels"


def test_objects_are_alone_on_black_with_their_masks(folder):
    dataset = Views(folder)
    sample = next(
        some
        for some in (dataset.sample(2, np.random.default_rng(seed)) for seed in range(9))
        if torch.equal(some["labels"], dataset.labels[2])  # not recoloured
    )
    assert sample["clip_pixels"].shape == (2, 3, SIDE, SIDE)
    view = torch.from_numpy(np.array(dataset.views[2])).permute(0, 3, 1, 2) / 255
    mask = view[:, 3:]
    expected = F.avg_pool2d(torch.cat([view[:, :3] * mask, mask], dim=1), 2)
    torch.testing.assert_close(sample["objects"], expected)
    assert 0 < mask.mean() < 1


class Painter(nn.Module):
    """A vision tower whose patch features begin with what is given, (2B, 64 patches, 64)."""

    config = SimpleNamespace(hidden_size=WIDTH)

    def __init__(self, patches: Tensor) -> None:
        super().__init__()
        wide = F.pad(patches, (0, WIDTH - patches.shape[2]))
        self.states = F.pad(wide, (0, 0, 1, 0))  # CLS before them

    def forward(self, clip_pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=self.states[:, 0], last_hidden_state=self.states)


def outline_loss(patches: Tensor, batch: dict[str, Tensor]) -> float:
    objective = ImageEncoderObjective(Painter(patches))
    with torch.no_grad():
        objective.painter.weight.copy_(torch.eye(64, WIDTH))
        objective.painter.bias.zero_()
        return float(objective(batch)["outline"])


def test_each_patch_paints_its_own_part_of_the_object():
    torch.manual_seed(0)
    batch = {
        "clip_pixels": torch.zeros(2, 2, 3, 64, 64),
        "objects": torch.rand(2, 2, 4, 32, 32),
        "labels": torch.full((2, 2, len(ATTRIBUTES)), -1),
        "profile": torch.zeros(2, len(DIRECTIONS)),
    }
    views = [batch["objects"][row, view] for view in range(2) for row in range(2)]
    patches = torch.stack(
        [
            torch.stack(
                [
                    objects[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
                    for row in range(8)
                    for column in range(8)
                ]
            )
            for objects in views
        ]
    )
    assert outline_loss(patches, batch) == 0
    assert outline_loss(patches.roll(1, dims=1), batch) > 0.1, "of another patch"
    assert outline_loss(patches.roll(1, dims=0), batch) > 0.1, "of another view"


def test_the_image_encoder_learns_from_labels_views_outlines_and_profiles():
    torch.manual_seed(0)
    objective = ImageEncoderObjective(build_image_encoder())
    critters = [random_critter(np.random.default_rng(seed)) for seed in range(3)]
    one = torch.randn(3, 1, 3, 64, 64)
    batch = {
        "clip_pixels": one.expand(-1, 2, -1, -1, -1),
        "objects": torch.rand(3, 2, 4, 32, 32),
        "labels": torch.tensor([[labels(c, "moon"), labels(c, None)] for c in critters]),
        "profile": torch.tensor([profile(c.numbers) for c in critters]),
    }
    out = objective(batch)
    assert out["same"] == 1, "both views are the same picture"
    total = out["attributes"] + out["contrast"] + 20 * (out["outline"] + out["profile"])
    torch.testing.assert_close(out["loss"], total)
    for name in ("attributes", "contrast", "outline", "profile"):
        objective.zero_grad()
        objective(batch)[name].backward()
        gradient = objective.image_encoder.embeddings.patch_embedding.weight.grad
        assert gradient.abs().sum() > 0, name
    fewer = {**batch, "profile": batch["profile"] * torch.tensor([[1.0], [0.0], [0.0]])}
    assert objective(fewer)["profile"] != out["profile"], "things have none"
    nothing = {**batch, "profile": torch.zeros_like(batch["profile"])}
    assert objective(nothing)["profile"] == 0
    batch["clip_pixels"] = torch.cat([one, one.roll(1, 0)], dim=1)
    assert objective(batch)["contrast"] > out["contrast"]


# --- text encoder and UNet ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objective() -> BaseModelObjective:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    return BaseModelObjective(build_text_encoder(tokenizer), nn.Identity(), tokenizer)


def base_batch(seeds: list[int]) -> dict[str, Tensor]:
    tokenizer = build_tokenizer()
    captions = [f"a {colour} critter at night" for colour in ("red", "blue", "pink", "green")]
    concept_ids, index = tokenize(tokenizer, ["a S on the moon"] * 4, "S", num_words=MAX_WORDS)
    torch.manual_seed(1)
    return {
        "seed": torch.tensor(seeds),
        "input_ids": token_ids(tokenizer, captions),
        "concept_ids": concept_ids,
        "index": index,
        "features": torch.randn(4, 2 * WIDTH),
    }


SEEDS = [502, 601, 702, 803]  # none of them under 100 in a thousand: no empty caption; one word


def test_a_third_reads_captions_and_the_rest_words_of_features(objective):
    batch = base_batch(SEEDS)
    with torch.no_grad():
        context = objective.context(batch)
        assert context.shape == (4, MAX_LENGTH, WIDTH)
        told = encode_text(objective.text_encoder, batch["input_ids"][:1])
        torch.testing.assert_close(context[:1], told)
        words = objective.word_head(batch["features"][1:]).unflatten(1, (MAX_WORDS, WIDTH))[:, :1]
        words = WORD_SCALE * F.layer_norm(words, (WIDTH,))
        shown = encode_text(
            objective.text_encoder, batch["concept_ids"][1:], words, batch["index"][1:]
        )
        torch.testing.assert_close(context[1:], shown)
        assert [num_told(count) for count in (1, 2, 3, 4, 32, 64)] == [1, 1, 1, 1, 11, 21]


@pytest.mark.parametrize(("name", "rows"), [("input_ids", [0]), ("features", [1, 2, 3])])
def test_what_reaches_which_part(objective, name, rows):
    with torch.no_grad():
        before = objective.context(base_batch(SEEDS))
        batch = base_batch(SEEDS)
        batch[name] = batch[name].roll(1, 0)
        after = objective.context(batch)
    assert [i for i in range(4) if not torch.equal(before[i], after[i])] == rows


def test_the_number_of_words_changes_from_batch_to_batch(objective):
    """By the first seed: one in three of five, two, five."""
    with torch.no_grad():
        found = [objective.context(base_batch([500 + i, *SEEDS[1:]])) for i in range(10)]
    shown = {context[2:].numpy().tobytes() for context in found}
    assert len(shown) == 3
    assert all(torch.equal(found[i], found[i + 5]) for i in range(5))
    assert torch.equal(found[2], found[3]) and torch.equal(found[3], found[4])


def test_empty_captions_are_empty_in_both_parts(objective):
    with torch.no_grad():
        context = objective.context(base_batch([502, 1001, 702, 2099]))
        nothing = encode_text(objective.text_encoder, objective.empty_ids[None])[0]
    empty = [bool(torch.allclose(row, nothing, atol=1e-5)) for row in context]
    assert empty == [False, True, False, True]


def test_the_gradient_reaches_the_word_head(objective):
    objective.zero_grad()
    objective.context(base_batch(SEEDS))[:1].sum().backward()
    assert not any(p.grad.any() for p in objective.word_head.parameters())
    objective.context(base_batch(SEEDS)).square().sum().backward()
    gradients = [p.grad.abs().sum() for p in objective.word_head.parameters()]
    assert all(gradient > 0 for gradient in gradients)
    last = objective.word_head[-1].weight.grad.unflatten(0, (MAX_WORDS, WIDTH))
    assert [bool(rows.any()) for rows in last] == [True] + [False] * 4, "one word"


def test_the_word_head_is_thrown_away(objective, tmp_path):
    whole = BaseModelObjective(
        tiny.build_models()["text_encoder"], tiny.build_models()["unet"], build_tokenizer()
    )
    whole.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text_encoder", "unet"]


def test_latents_are_of_the_first_view_and_features_of_the_second(folder, tmp_path):
    torch.manual_seed(0)
    vae, image_encoder = build_vae().eval(), build_image_encoder().eval()
    views = np.load(folder / "views.npy")
    encoded = encode_all(vae, image_encoder, views, chunk=4)
    assert encoded["latents"].shape == (6, 16, 8, 8)
    assert encoded["features"].shape == (6, 2 * WIDTH)
    changed = {}
    for which, name in enumerate(("latents", "features")):
        others = views.copy()
        others[:, which] = others[::-1, which]
        again = encode_all(vae, image_encoder, others, chunk=6)
        changed[name] = [not torch.allclose(again[n], encoded[n], atol=1e-4) for n in encoded]
    assert changed == {"latents": [True, False], "features": [False, True]}


def test_samples_of_the_base_model(folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    vae, image_encoder = build_vae().eval(), build_image_encoder().eval()
    vae.register_to_config(scaling_factor=2.0)
    made_of = (folder, tokenizer, vae, image_encoder, tmp_path / "encoded.pt")
    dataset = Latents(*made_of, key="first")
    records = json.loads((folder / "records.json").read_text())
    assert len(dataset) == 6
    sample = dataset.sample(1, np.random.default_rng(0))
    text = tokenizer.decode(sample["input_ids"], skip_special_tokens=True)
    assert text.replace(" ,", ",") == records[1]["caption"]
    concept = tokenizer.decode(sample["concept_ids"], skip_special_tokens=True)
    scene = list(SCENES)[records[1]["labels"][0][-1]]
    assert concept.startswith("a ") and concept.endswith(place(scene))
    expected = torch.load(tmp_path / "encoded.pt", weights_only=True)["latents"][1]
    torch.testing.assert_close(sample["latents"], 2 * expected)
    calls = []
    monkeypatch.setattr(
        "small_world.pretrain.encode_all", lambda *models: calls.append(0) or encode_all(*models)
    )
    Latents(*made_of, key="first")
    assert not calls
    Latents(*made_of, key="of other models")
    Latents(*made_of, key="of other models")
    assert len(calls) == 1


def test_previews_describe_held_out_critters():
    prompts = preview_prompts()
    assert len(set(prompts)) == 8 and prompts == preview_prompts()
    for prompt, words in zip(prompts, SCENES.values(), strict=False):
        assert prompt.startswith(("a ", "an ")) and "critter with" in prompt
        assert prompt.endswith(words)
