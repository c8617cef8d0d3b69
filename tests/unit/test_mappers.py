"""The two mapping networks against their formulas."""

import pytest
import torch
from torch import Tensor

from elite import GlobalMapper, LocalMapper
from elite.mappers import Mapper, clip_levels, cross_attention_layers, fingerprint_of
from tests import tiny

B, PATCHES, WIDTH = 2, 16, 24


def features(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, 1 + PATCHES, WIDTH, generator=generator) for _ in range(3)]


def mlp(mapper: Mapper, name: str, x: Tensor) -> Tensor:
    """Linear, LayerNorm, LeakyReLU, twice, then Linear; from the weights by name."""
    w = {key.removeprefix(f"{name}."): v for key, v in mapper.state_dict().items()}
    for linear, norm in ((0, 1), (3, 4)):
        x = x @ w[f"{linear}.weight"].T + w[f"{linear}.bias"]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * w[f"{norm}.weight"] + w[f"{norm}.bias"]
        x = torch.where(x > 0, x, 0.01 * x)
    return x @ w["6.weight"].T + w["6.bias"]


@torch.no_grad()
def test_global_mapper_is_its_formula(mappers):
    levels = features()
    words = mappers[0](levels)
    assert words.shape == (B, 3, WIDTH)
    for i, level in enumerate(levels):
        patches = mlp(mappers[0], f"mapping_patch_{i}", level[:, 1:])
        expected = mlp(mappers[0], f"mapping_{i}", level[:, 0]) + patches.mean(dim=1)
        torch.testing.assert_close(words[:, i], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_local_mapper_is_its_formula(mappers, masked):
    levels, patch_mask = features(), (torch.rand(B, PATCHES, 1) > 0.5).float()
    tokens = mappers[1](levels, patch_mask if masked else None)
    expected = torch.zeros(B, PATCHES, WIDTH)
    for i, level in enumerate(levels):
        cls = mlp(mappers[1], f"mapping_{i}", level[:, 0])
        expected += (cls[:, None] + mlp(mappers[1], f"mapping_patch_{i}", level[:, 1:])) / 3
    expected = expected * patch_mask if masked else expected
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_levels_are_the_last_hidden_state_then_those_named(parts):
    encoder = parts["image_encoder"]
    pixels = torch.randn(B, 3, 32, 32)
    output = encoder(pixels, output_hidden_states=True)
    levels = clip_levels(encoder, pixels, (4, 2))
    assert [tuple(level.shape) for level in levels] == [(B, 1 + PATCHES, WIDTH)] * 3
    assert torch.equal(levels[0], output.hidden_states[-1]), "a post-layernorm came between"
    assert torch.equal(levels[1], output.hidden_states[4])
    assert torch.equal(levels[2], output.hidden_states[2])


def test_primary_word_comes_from_the_deepest_level(mappers):
    levels = [level.requires_grad_() for level in features()]
    mappers[0](levels)[:, 0].sum().backward()
    assert [bool(level.grad.any()) for level in levels] == [True, False, False]


def test_new_mapper_starts_from_the_unets_projections(parts):
    mapper = GlobalMapper.for_models(parts["unet"], parts["image_encoder"], 32, tiny.HIDDEN_LAYERS)
    layers = cross_attention_layers(parts["unet"])
    assert len(layers) == 4 and mapper.num_levels == 3
    for layer, attn in layers.items():
        for name in ("to_k", "to_v"):
            copy = mapper.projection(layer, name).weight
            original = getattr(attn, name).weight
            assert torch.equal(copy, original)
            assert copy.data_ptr() != original.data_ptr(), "training would change the UNet"


def test_layers_are_in_the_order_of_the_unet(parts):
    names = list(cross_attention_layers(parts["unet"]))
    assert names[0] == "down_blocks_0_attentions_0_transformer_blocks_0_attn2"
    assert names[-1] == "mid_block_attentions_0_transformer_blocks_0_attn2"


@pytest.mark.parametrize("hidden_layers", [(4, 9), (-1,)])
def test_levels_that_the_encoder_lacks_are_refused(parts, hidden_layers):
    with pytest.raises(
        ValueError, match=r"do not fit an image encoder of 8 layers; choose from 0 to 8"
    ):
        GlobalMapper.for_models(parts["unet"], parts["image_encoder"], 32, hidden_layers)


def test_features_of_another_encoder_are_refused(mappers):
    with pytest.raises(ValueError, match="image features are 16 wide, the mapper expects 24"):
        mappers[0]([torch.randn(1, 17, 16)])


@pytest.mark.parametrize("which", [0, 1])
def test_saved_mapper_comes_back_bit_for_bit(tmp_path, mappers, which):
    mapper = mappers[which]
    mapper.save_pretrained(tmp_path)
    loaded = type(mapper).from_pretrained(tmp_path)
    assert isinstance(loaded, (GlobalMapper, LocalMapper)[which])
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    state = mapper.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert tuple(loaded.config.hidden_layers) == tiny.HIDDEN_LAYERS


def test_fingerprint_is_the_same_on_every_machine():
    """A sum would be split among as many threads as there are."""
    mapper, found = GlobalMapper(hidden_layers=()), set()
    generator = torch.Generator().manual_seed(0)
    for parameter in mapper.parameters():  # up to a million numbers
        torch.nn.init.normal_(parameter, generator=generator)
    for threads in (4, 1):
        torch.set_num_threads(threads)
        found.add(fingerprint_of(mapper))
    assert len(found) == 1


@torch.no_grad()
def test_fingerprint_is_of_values_and_names(mappers):
    one, other = mappers
    before = fingerprint_of(one.half(), other)
    assert fingerprint_of(one.float(), other) == before, "it is of how they are stored"
    assert len({before, fingerprint_of(other, one), fingerprint_of(one, None)}) == 3
    next(one.parameters()).view(-1)[0] += 2**-9
    assert fingerprint_of(one, other) != before
