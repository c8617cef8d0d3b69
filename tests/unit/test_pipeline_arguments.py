"""Arguments of ElitePipeline that are none: one line that says what was expected."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from elite import ElitePipeline
from elite.mappers import cross_attention_layers
from elite.wording import Note
from tests import tiny
from tests.tiny import draw


@pytest.mark.parametrize(
    "given",
    [{"prompt": "a S \udcff"}, {"negative_prompt": "\ud83d"}],
    ids=lambda given: next(iter(given)),
)
def test_halves_of_characters_are_refused(pipe, concept, given):
    with pytest.raises(ValueError, match="none of Unicode"):
        draw(pipe, concept=concept, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image / 255.0, r"image is float64 of shape \(40, 40, 3\); expected a path"),
        (lambda image: image[..., [0, 1, 2, 0]], r"image is uint8 of shape \(40, 40, 4\)"),
        (lambda image: image[..., 0], r"image is uint8 of shape \(40, 40\); .* uint8 of shape"),
        (lambda image: None, r"image is object of shape \(\)"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(pipe, change, message):
    image, mask = tiny.picture(0)
    with pytest.raises(ValueError, match=message):
        pipe.encode_concept(change(image), mask)


@pytest.mark.parametrize("shape", [(40,), (40, 40, 2), (1, 40, 40, 3), (0, 40)])
def test_arrays_that_are_no_masks_are_refused(pipe, concept, shape):
    with pytest.raises(ValueError, match=r"corgi is float64 of shape \(.*expected a path"):
        pipe.encode_concept(tiny.picture(0)[0], np.ones(shape), name="corgi")
    assert "region of S is" in complaint(
        pipe, "a S", concept=concept, regions={"S": np.ones(shape)}
    )


@pytest.mark.parametrize("mask", ["empty", "other shape"])
def test_bad_masks_are_refused(pipe, mask):
    image, good = tiny.picture(0)
    bad = np.zeros_like(good) if mask == "empty" else np.ones((40, 20), bool)
    message = "no object pixel" if mask == "empty" else "mask is 20 x 40, its image 40 x 40"
    with pytest.raises(ValueError, match=f"corgi: .*{message}"):
        pipe.encode_concept(image, bad, name="corgi")


THREE = ["a S"] * 3


def complaint(pipe, prompt, **options) -> str:
    with pytest.raises(ValueError) as caught:
        draw(pipe, prompt, **options)
    return str(caught.value)


def test_wrong_prompts_and_counts_are_refused(pipe, concept, concepts):
    assert "no placeholder" in complaint(pipe, "a photo", concept=concept)
    assert "2 times the placeholder" in complaint(pipe, "S and S", concept=concept)
    assert "too long" in complaint(pipe, "a " * 80 + "S", concept=concept)
    assert "too long" in complaint(pipe, "a " * 74 + "S", concept=concept, words="all")
    assert "3 concepts for 2 prompts" in complaint(pipe, THREE[:2], concept=concepts)
    assert "2 lambdas for 3 prompts" in complaint(
        pipe, THREE, concept=concepts, lambda_=[0.1, 0.2], seed=[3, 4, 5]
    )
    assert "2 seeds for 3 pictures" in complaint(pipe, THREE, concept=concepts, seed=[1, 2])
    assert "word 3 does not exist" in complaint(pipe, "a S", concept=concept, words=3)
    assert "word True does not exist" in complaint(pipe, "a S", concept=concept, words=True)
    assert "word ALL does not exist" in complaint(pipe, "a S", concept=concept, words="ALL")
    assert "concept is 5; expected" in complaint(pipe, "a S", concept=5)
    assert "concepts are [1]; expected" in complaint(pipe, "a S", concepts=[1])
    assert "an empty list of concepts" in complaint(pipe, "a S", concept=[])
    for options in ({}, {"concept": concept}, {"seed": None}):
        for nothing in ([], (), None):
            assert complaint(pipe, nothing, **options) == "no prompt; pass one, or several"
    assert "prompt is 5; expected" in complaint(pipe, 5)
    assert complaint(pipe, {"a S": 1}) == "prompt is {'a S': 1}; expected a text, or several"
    assert "negative_prompt is [1]; expected" in complaint(pipe, "a S", negative_prompt=[1])
    given = pipe.condition("a S", concept)
    for name in ("prompt_embeds", "ip_adapter_image_embeds"):
        told = complaint(pipe, "a S", concept=concept, **{name: given[name]})
        assert told == f"{name}: a concept goes with prompt alone; leave {name} out"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lamda_", "lamda_: unknown argument; did you mean lambda_?"),
        ("guidance_scal", "guidance_scal: unknown argument; did you mean guidance_scale?"),
        ("callbacks", "callbacks: unknown argument; did you mean callback?"),
        ("xyzzy", "xyzzy: unknown argument"),
        ("kwargs", "kwargs: unknown argument"),
        (
            "ip_adapter_image",
            "ip_adapter_image: ELITE takes none; pass what encode_concept makes of it",
        ),
    ],
)
def test_unknown_arguments_are_refused(pipe, concept, name, message):
    """Diffusers' **kwargs swallow them."""
    assert complaint(pipe, "a S", concept=concept, **{name: 0.3}) == message


def test_unknown_arguments_of_condition_are_refused(pipe, concept):
    with pytest.raises(ValueError, match=r"lamda_: unknown argument; did you mean lambda_\?"):
        pipe.condition("a S", concept=concept, lamda_=0.3)


def test_seeds_beside_the_middle_of_64_bits(pipe, concept):
    """One array of both would be of floats."""
    seeds = [2**63 - 1, 2**63]
    both = draw(pipe, ["a S"] * 2, concept=concept, seed=seeds)
    assert torch.equal(both, draw(pipe, ["a S"] * 2, concept=concept, seed=np.array(seeds, "u8")))


def test_a_number_of_pictures_below_one_is_refused(pipe, concept):
    for number in (0, -1, "2", 1.5):
        message = complaint(pipe, "a S", concept=concept, num_images_per_prompt=number)
        assert message == f"num_images_per_prompt is {number!r}; expected 1 or more"


@pytest.mark.parametrize("lambda_", ["0.8", None, [0.1, "x"], [[0.8]], True, float("nan"), 1e300])
def test_a_lambda_that_is_no_number_is_refused(pipe, concept, lambda_):
    message = complaint(pipe, "a S", concept=concept, lambda_=lambda_)
    assert message == f"lambda_ is {lambda_!r}; expected a number, or one per prompt"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(
            (("num_inference_steps"), value, "1 to 1000")
            for value in (0, -1, "20", 2.5, True, 1001)
        ),
        *((("guidance_scale"), value, "a number") for value in (None, "5", float("nan"), True)),
        *((("height"), value, "8 or more") for value in ("64", 0)),
        ("width", 32.0, "8 or more"),
        ("clip_skip", 50, "0 to 2"),
        ("clip_skip", -1, "0 to 2"),
    ],
)
def test_numbers_that_are_none_are_refused(pipe, concept, name, value, expected):
    message = complaint(pipe, "a S", concept=concept, **{name: value})
    assert message == f"{name} is {value!r}; expected {expected}"
    if name in ("height", "clip_skip", "guidance_scale"):
        with pytest.raises(ValueError, match=f"{name} is "):
            pipe.condition("a S", concept, **{name: value})


def test_the_deepest_clip_skip_draws(pipe, concept):
    assert torch.isfinite(draw(pipe, concept=concept, clip_skip=2)).all()


def test_concepts_need_the_mappers_in_the_unet(pipe, concept):
    given = pipe.condition("a S", concept)
    pipe.uninstall()
    message = "the mappers are not in the UNet; call pipe.install() first"
    assert complaint(pipe, "a S", concept=concept) == message
    assert complaint(pipe, None, **given) == message
    with pytest.raises(ValueError, match="the mappers are not in the UNet"):
        pipe.condition("a S", concept)


def test_encoding_needs_an_image_encoder(pipe):
    pipe.register_modules(image_encoder=None)
    with pytest.raises(ValueError, match="image_encoder is None; load the pipeline with one"):
        pipe.encode_concept(*tiny.picture(0))


@pytest.mark.parametrize("other", ["generator", "latents"])
def test_a_seed_beside_other_noise_is_refused(pipe, concept, other):
    given = {"generator": torch.Generator(), "latents": torch.zeros(1, 4, 16, 16)}[other]
    message = complaint(pipe, "a S", concept=concept, **{other: given})
    assert message == f"seed and {other} are both given; leave one of them out"


@pytest.mark.parametrize("seed", [1.5, "one", [None], 2**70, True, [True], 2**64])
def test_seeds_that_are_none_are_refused(pipe, concept, seed):
    assert "expected whole numbers" in complaint(pipe, "a S", concept=concept, seed=seed)


@pytest.mark.parametrize(("width", "height"), [(48, None), (None, 48)])
def test_one_side_alone_is_taken(pipe, concept, width, height):
    """Without a seed both were ignored, and regions did not fit."""
    asked = {"concept": concept, "width": width, "height": height, "seed": None}
    for more in ({}, {"regions": {"S": np.eye(2)}}):
        picture = draw(pipe, **asked, **more, output_type="pil")[0]
        assert picture.size == (width or 32, height or 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": [np.eye(2)]}, r"regions is \[ndarray of shape \(2, 2\)\]; expected .*S1"),
        ({"regions": {1: np.eye(2)}}, "region of 1: no such concept; there are S"),
        ({"regions": np.eye(2)}, r"regions is ndarray of shape \(2, 2\); expected .*S1.: mask"),
        *(({"guidance_stop": x}, f"guidance_stop {x!r}: expected a share") for x in ("0.5", True)),
        ({"deep_every": True}, "deep_every True: expected a whole number of steps"),
        ({"deep_first": True}, "deep_first True: expected a whole number of steps"),
        *(({"placeholder_token": x}, f"token is {x}; expected a word") for x in (None, 5)),
        ({"cross_attention_kwargs": "a"}, 'is .a.; expected names with values, {"scale": 0.5}'),
        ({"cross_attention_kwargs": {"scale": "a"}}, "expected names with values"),
        ({"guidance_rescale": "a"}, "guidance_rescale is 'a'; expected a number"),
        ({"eta": "a"}, "eta is 'a'; expected a number"),
        ({"seed": None, "generator": 5}, "generator is 5; expected a torch.Generator, or a list"),
        ({"seed": None, "generator": [5]}, r"generator is \[5\]; expected a torch.Generator"),
        ({"negative_prompt_embeds": "a"}, "negative_prompt_embeds is 'a'; expected a tensor"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "'latents'; expected a list of names"),
    ],
)
def test_wrong_types_are_one_line(pipe, concept, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        draw(pipe, concept=concept, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_embeds": "a"}, r"prompt_embeds is 'a'; expected a tensor \(prompts, tok"),
        ({"prompt_embeds": torch.zeros(77, 24)}, r"prompt_embeds is Tensor of shape \(77, 24\);"),
        *(
            ({"prompt": "a", "ip_adapter_image_embeds": x}, "expected what condition gives")
            for x in ("a", torch.zeros(1, 2, 24), [1], [torch.zeros(1, 2, 24)])
        ),
        ({"prompt": "a", "words": "all"}, "words: no concept; pass concept or concepts, or"),
        (
            {"prompt": "a", "lambda_": 0.3},
            "lambda_: no concept; pass concept or concepts, or leave",
        ),
        ({"prompt": "a", "lambda_": np.ones(1)}, "lambda_: no concept; pass concept or concepts"),
        ({"prompt": "a", "concepts": {1: 2}}, r"concepts are \{1: 2\}; expected {.S1.: a"),
    ],
)
def test_wrong_types_without_a_concept_are_one_line(pipe, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        draw(pipe, **{"prompt": None, **options})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": 5}, "negative_prompt is 5; expected a text, or several"),
        ({"cross_attention_kwargs": "a"}, "cross_attention_kwargs is 'a'; expected names with"),
        ({"placeholder_token": None}, "placeholder_token is None; expected a word"),
        ({"regions": np.eye(2)}, r"regions is ndarray of shape \(2, 2\); expected .*S1.: mask"),
    ],
)
def test_wrong_types_in_condition_are_one_line(pipe, concept, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.condition("a S", concept, **options)


@pytest.mark.parametrize("kind", ["fp16", torch.int8])
def test_number_types_that_are_none_are_refused(model_folder, kind):
    with pytest.raises(ValueError, match=f"torch_dtype is {kind!r}; expected one as torch.float16"):
        ElitePipeline.from_stable_diffusion(model_folder, torch_dtype=kind)


LATENTS = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("prompt", "latents"),
    [
        *(("a S", LATENTS.expand(rows, -1, -1, -1)) for rows in (2, 4)),
        (["a S"] * 2, LATENTS),
        ("a S", LATENTS[0]),
        ("a S", LATENTS[:, :3]),
        ("a S", LATENTS.numpy()),
        ("a S", 5),
    ],
)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_latents_that_do_not_fit_are_refused(pipe, concept, prompt, latents, guidance_scale):
    """Some were drawn, as another number of pictures or of another size."""
    options = {"concept": concept, "seed": None, "guidance_scale": guidance_scale}
    message = complaint(pipe, prompt, **options, latents=latents)
    expected = 2 if isinstance(prompt, list) else 1, 4, 16, 16
    assert re.match(rf"latents is .*; expected a tensor {re.escape(str(expected))}, or", message)


def test_latents_decide_the_size_where_nothing_else_does(pipe, concept):
    """As with stock pipelines."""
    options = {"concept": concept, "seed": None, "latents": LATENTS[..., :8]}
    assert draw(pipe, **options).shape == (1, 4, 16, 8)
    message = complaint(pipe, "a S", **options, width=32)
    assert "expected a tensor (1, 4, 16, 16)" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_latents_of_another_type_are_cast(pipe, concept, dtype):
    latents = LATENTS.to(dtype)
    drawn = draw(pipe, concept=concept, seed=None, latents=latents)
    assert torch.equal(drawn, draw(pipe, concept=concept, seed=None, latents=latents.float()))


def test_numpy_integers_are_numbers_of_steps(pipe, concept):
    given = draw(pipe, concept=concept, deep_every=np.int64(2))
    assert torch.equal(given, draw(pipe, concept=concept, deep_every=2))


def test_ip_adapters_are_refused_and_leave_the_local_branch(pipe, concept):
    """Unloading one, half-done, took the local branch away without a word."""
    before = draw(pipe, concept=concept)
    for change in (pipe.unload_ip_adapter, lambda: pipe.load_ip_adapter("a/b", "models", "c.bin")):
        with pytest.raises(ValueError, match="ELITE stands where an IP-Adapter would"):
            change()
    assert torch.equal(draw(pipe, concept=concept), before)


def test_without_a_text_encoder_embeddings_are_drawn_and_prompts_refused(pipe, concept):
    given = pipe.condition("a S", concept)
    before = draw(pipe, None, **given)
    pipe.register_modules(text_encoder=None)
    assert torch.equal(draw(pipe, None, **given, clip_skip=1), before)
    message = "text_encoder is None; load the pipeline with one, or pass what `condition` gave"
    assert complaint(pipe, "a S", concept=concept) == message


def test_a_concept_without_feature_tokens_is_told(pipe, concept):
    """Lambda did nothing, without a word."""
    words = replace(concept, feature_tokens=None)
    with pytest.warns(Note, match="S: the concept was encoded without the local mapper, so lambda"):
        drawn = draw(pipe, concept=words)
    with warnings.catch_warnings(action="error", category=Note):
        assert torch.equal(draw(pipe, concept=words, lambda_=0), drawn)
    with pytest.raises(ValueError, match="different numbers of feature tokens"):
        draw(pipe, ["a S"] * 2, concept=[concept, words])


@pytest.mark.parametrize("norm", ["foo", "", 5, True])
def test_norms_that_are_none_are_refused_and_change_nothing(pipe, concept, norm):
    """They were taken for "sample"."""
    pipe.install("batch")
    message = re.escape(f"attention_norm is {norm!r}; expected sample or batch")
    with pytest.raises(ValueError, match=message):
        pipe.install(norm)
    pipe.install()
    assert pipe.attention_norm == "batch"
    layers = cross_attention_layers(pipe.unet).values()
    assert {attn.processor.attention_norm for attn in layers} == {"batch"}
