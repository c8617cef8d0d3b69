"""ElitePipeline from parts, from folders, saved and loaded again."""

import shutil

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from elite import ElitePipeline, GlobalMapper
from elite.checkpoint import load_mapper
from elite.loading import load_parts
from tests import tiny
from tests.conftest import make_pipe
from tests.tiny import draw


@pytest.mark.parametrize("how", ["release", "folders", "inside", "objects"])
def test_from_stable_diffusion_composes(
    tmp_path, model_folder, mapper_folder, release_folder, mappers, pipe, concept, how
):
    model, sources = model_folder, {}
    if how == "inside":
        model = shutil.copytree(model_folder, tmp_path / "model")
        shutil.copytree(mapper_folder, model, dirs_exist_ok=True)
    else:
        for name, mapper in zip(("global_mapper", "local_mapper"), mappers, strict=True):
            sources[name] = {
                "release": str(release_folder / f"{name}.pt"),
                "folders": str(mapper_folder / name),
                "objects": mapper,
            }[how]
    composed = ElitePipeline.from_stable_diffusion(str(model), **sources)
    composed.set_progress_bar_config(disable=True)
    again = composed.encode_concept(*tiny.picture(0))
    assert composed.fingerprint == pipe.fingerprint
    assert torch.equal(draw(composed, concept=again), draw(pipe, concept=concept))


def test_release_mapper_for_a_deeper_encoder_is_refused(parts, release_folder):
    """A release file of three levels stands for hidden states 4 and 8."""
    config = {**parts["image_encoder"].config.to_dict(), "num_hidden_layers": 3}
    shallow = CLIPVisionModel(CLIPVisionConfig(**config))
    with pytest.raises(ValueError, match="image encoder of 3 layers"):
        load_mapper(GlobalMapper, release_folder / "global_mapper.pt", parts["unet"], shallow)


@pytest.mark.parametrize("given", ["folder", "object"])
def test_image_encoder_may_be_elsewhere(
    tmp_path, model_folder, mapper_folder, pipe, concept, given
):
    model = shutil.copytree(model_folder, tmp_path / "model")
    encoder = shutil.move(model / "image_encoder", tmp_path / "clip")
    if given == "object":
        encoder = CLIPVisionModel.from_pretrained(encoder)
    composed = ElitePipeline.from_stable_diffusion(
        model, global_mapper=mapper_folder / "global_mapper", image_encoder=encoder
    )
    # Without a local mapper a single view goes through CLIP, which may round otherwise.
    words = composed.encode_concept(*tiny.picture(0)).words
    torch.testing.assert_close(words, concept.words)


def test_local_mapper_inside_the_folder_can_be_left_out(tmp_path, model_folder, mapper_folder):
    model = shutil.copytree(model_folder, tmp_path / "model")
    shutil.copytree(mapper_folder, model, dirs_exist_ok=True)
    assert ElitePipeline.from_stable_diffusion(model).local_mapper is not None
    without = ElitePipeline.from_stable_diffusion(model, local_mapper=False)
    assert without.local_mapper is None
    assert without.encode_concept(*tiny.picture(0)).feature_tokens is None


def test_half_precision_reads_concepts_of_full_precision(model_folder, mapper_folder, concept):
    mappers = {name: mapper_folder / name for name in ("global_mapper", "local_mapper")}
    halves = ElitePipeline.from_stable_diffusion(
        model_folder, **mappers, torch_dtype=torch.bfloat16
    )
    halves.set_progress_bar_config(disable=True)
    latents = draw(halves, concept=concept)
    assert latents.dtype == torch.bfloat16 and torch.isfinite(latents).all()
    assert halves.encode_concept(*tiny.picture(0)).fingerprint == concept.fingerprint


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer", "unet", "vae", "global_mapper"])
def test_missing_part_is_named(tmp_path, model_folder, mapper_folder, missing):
    model = shutil.copytree(model_folder, tmp_path / "model")
    shutil.copytree(mapper_folder, model, dirs_exist_ok=True)
    shutil.rmtree(model / missing)
    with pytest.raises(ValueError) as caught:
        ElitePipeline.from_stable_diffusion(model)
    message = str(caught.value)
    assert message.startswith(f"{model}: ") and missing in message and "\n" not in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "image_encoder"])
def test_damaged_part_is_named(tmp_path, model_folder, mapper_folder, part):
    model = shutil.copytree(model_folder, tmp_path / "model")
    shutil.copytree(mapper_folder, model, dirs_exist_ok=True)
    for weights in (model / part).glob("*.safetensors"):
        weights.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=str(model)) as caught:
        ElitePipeline.from_stable_diffusion(model)
    assert "\n" not in str(caught.value)


def test_folder_without_scheduler_has_stable_diffusions(
    tmp_path, model_folder, mapper_folder, pipe, concept
):
    model = shutil.copytree(model_folder, tmp_path / "model")
    shutil.rmtree(model / "scheduler")
    composed = make_pipe(model, mapper_folder)
    assert torch.equal(draw(composed, concept=concept), draw(pipe, concept=concept))


def test_saved_pipeline_comes_back_whole(tmp_path, pipe, concept):
    expected = draw(pipe, concept=concept)
    pipe.save_pretrained(tmp_path / "elite")
    assert torch.equal(draw(pipe, concept=concept), expected)  # saving changed nothing
    loaded = ElitePipeline.from_pretrained(tmp_path / "elite")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.fingerprint == pipe.fingerprint
    again = loaded.encode_concept(*tiny.picture(0))
    assert torch.equal(again.words, concept.words)
    assert torch.equal(draw(loaded, concept=again), expected)
    assert torch.equal(draw(loaded, concept=concept), expected)


def test_saved_pipeline_without_local_mapper(tmp_path, model_folder, mapper_folder):
    pipe = ElitePipeline.from_stable_diffusion(
        model_folder, global_mapper=mapper_folder / "global_mapper"
    )
    pipe.set_progress_bar_config(disable=True)
    expected = draw(pipe, concept=pipe.encode_concept(*tiny.picture(0)))
    pipe.save_pretrained(tmp_path / "elite")
    loaded = ElitePipeline.from_pretrained(tmp_path / "elite")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.local_mapper is None
    assert torch.equal(draw(loaded, concept=loaded.encode_concept(*tiny.picture(0))), expected)


def test_saved_unet_is_plain_stable_diffusion(tmp_path, model_folder, pipe, parts):
    pipe.save_pretrained(tmp_path / "elite")
    saved = load_parts(tmp_path / "elite")
    assert saved["unet"].config.encoder_hid_dim_type is None
    plain, expected = saved["unet"].state_dict(), parts["unet"].state_dict()
    assert plain.keys() == expected.keys()
    assert all(torch.equal(plain[key], expected[key]) for key in plain)


def test_saved_pipeline_composes_too(tmp_path, pipe, concept):
    """The folder of a saved pipeline is a model folder with mappers inside."""
    pipe.save_pretrained(tmp_path / "elite")
    composed = ElitePipeline.from_stable_diffusion(tmp_path / "elite")
    composed.set_progress_bar_config(disable=True)
    assert torch.equal(draw(composed, concept=concept), draw(pipe, concept=concept))


def test_half_precision_copy_knows_its_concepts(tmp_path, pipe, concept):
    pipe.save_pretrained(tmp_path / "elite")
    halves = ElitePipeline.from_pretrained(tmp_path / "elite", torch_dtype=torch.bfloat16)
    halves.set_progress_bar_config(disable=True)
    assert torch.isfinite(draw(halves, concept=concept)).all()


def test_parts_that_are_given_stay_what_they_are(model_folder, pipe, concept):
    """They were cast in place, under the pipeline that they had come from."""
    before = draw(pipe, concept=concept)
    halves = ElitePipeline.from_stable_diffusion(
        model_folder,
        global_mapper=pipe.global_mapper,
        local_mapper=pipe.local_mapper,
        image_encoder=pipe.image_encoder,
        torch_dtype=torch.bfloat16,
    )
    assert {part.dtype for part in (halves.global_mapper, halves.image_encoder)} == {torch.bfloat16}
    assert torch.equal(draw(pipe, concept=concept), before)
    assert torch.equal(pipe.encode_concept(*tiny.picture(0)).words, concept.words)


def test_saved_without_an_image_encoder_it_is_loaded(tmp_path, pipe, concept):
    before = draw(pipe, concept=concept)
    pipe.register_modules(image_encoder=None)
    pipe.save_pretrained(tmp_path)
    loaded = ElitePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.image_encoder is None
    assert torch.equal(draw(loaded, concept=concept), before)
