"""ELITE's cross-attention against its formula written out, and its installation in one UNet."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from elite import attention
from elite.attention import (
    EliteAttnProcessor,
    install,
    is_installed,
    local_inputs,
    local_values,
    uninstall,
)
from elite.mappers import GlobalMapper, cross_attention_layers
from tests import tiny

B, QUERIES, HEADS, TEXT, PATCHES, C, D = 2, 6, 4, 9, 5, 16, 24
INDEX = torch.tensor([3, 5])
# Float64 on both sides: only the order of sums differs.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def linear(seed: int) -> nn.Linear:
    projection = nn.Linear(D, C, bias=False, dtype=torch.float64)
    with torch.no_grad():
        projection.weight.copy_(normal(C, D, seed=seed) / 3)
    return projection


@pytest.fixture
def attn() -> Attention:
    torch.manual_seed(0)
    module = Attention(C, cross_attention_dim=D, heads=HEADS, dim_head=C // HEADS).double()
    assert module.to_out[0].bias is not None
    return module.requires_grad_(False).eval()


@pytest.fixture
def projections() -> list[nn.Linear]:
    """K_g, V_g, K_l, V_l."""
    return [linear(seed).requires_grad_(False) for seed in (1, 2, 3, 4)]


hidden_states = normal(B, QUERIES, C, seed=10)
text = normal(B, TEXT, D, seed=11)
f = normal(B, PATCHES, D, seed=12)


def softmax_of(
    attn: Attention, keys: Tensor, row: int, head: int, mask: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T s) of one row and head, (queries, tokens), by exponentials."""
    width = C // HEADS
    part = slice(head * width, (head + 1) * width)
    Q = (hidden_states[row] @ attn.to_q.weight.T)[:, part]
    scores = Q @ keys[row][:, part].T / width**0.5
    if mask is not None:
        scores = scores + mask[row]
    return scores.exp() / scores.exp().sum(dim=1, keepdim=True)


def written_out(
    attn: Attention,
    projections: list[nn.Linear],
    tokens: Tensor,
    lambdas: list[float],
    norm: str = "sample",
    mask: Tensor | None = None,
) -> Tensor:
    """out = softmax(Q K_g^T s) V_g + lambda * a * softmax(Q K_l^T s) V_l, per row and head."""
    K_g, V_g = (text @ p.weight.T for p in projections[:2])
    K_l, V_l = (tokens @ p.weight.T for p in projections[2:])
    width = C // HEADS
    paid = torch.stack(
        [
            torch.stack([softmax_of(attn, K_g, b, h, mask)[:, INDEX[b]] for h in range(HEADS)])
            for b in range(B)
        ]
    )  # (B, heads, queries): what each query pays to the placeholder
    out = torch.zeros(B, QUERIES, C, dtype=torch.float64)
    for b in range(B):
        most = paid[b].max() if norm == "sample" else paid[[x != 0 for x in lambdas]].max()
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            a = (paid[b, h] / most)[:, None]
            local = softmax_of(attn, K_l, b, h) @ V_l[b][:, part]
            out[b, :, part] = (
                softmax_of(attn, K_g, b, h, mask) @ V_g[b][:, part] + lambdas[b] * a * local
            )
    return out @ attn.to_out[0].weight.T + attn.to_out[0].bias


def ours(attn, projections, tokens, lambdas, norm="sample", mask=None) -> Tensor:
    processor = EliteAttnProcessor(*projections, attention_norm=norm)
    local = local_inputs(tokens, INDEX, torch.tensor(lambdas, dtype=tokens.dtype), TEXT)
    return processor(attn, hidden_states, (text, local), attention_mask=mask)


@pytest.mark.parametrize("norm", ["sample", "batch"])
@pytest.mark.parametrize("lambdas", [[0.8, 0.8], [0.6, 1.0], [0.0, 0.8], [0.8, 0.0]])
def test_formula(attn, projections, lambdas, norm):
    expected = written_out(attn, projections, f, lambdas, norm)
    torch.testing.assert_close(ours(attn, projections, f, lambdas, norm), expected, **CLOSE)


def test_the_two_normalisations_differ(attn, projections):
    """Otherwise the test above could not tell them apart."""
    per_sample = written_out(attn, projections, f, [0.8, 0.8], "sample")
    per_batch = written_out(attn, projections, f, [0.8, 0.8], "batch")
    assert (per_sample - per_batch).abs().max() > 1e-3


def test_a_picture_does_not_depend_on_its_batch_mates(attn, projections):
    processor = EliteAttnProcessor(*projections)
    local = local_inputs(f, INDEX, 0.8, TEXT)
    both = processor(attn, hidden_states, (text, local))
    for b in range(B):
        alone = processor(
            attn, hidden_states[b : b + 1], (text[b : b + 1], [x[b : b + 1] for x in local])
        )
        torch.testing.assert_close(both[b : b + 1], alone, **CLOSE)


def test_masked_out_tokens_stay_in_the_softmax(attn, projections):
    masked = f * torch.tensor([1, 0, 1, 0, 0], dtype=f.dtype)[None, :, None]
    lambdas = [0.8, 0.8]
    out = ours(attn, projections, masked, lambdas)
    torch.testing.assert_close(out, written_out(attn, projections, masked, lambdas), **CLOSE)
    dropped = written_out(attn, projections, masked[:, [0, 2]], lambdas)
    assert (out - dropped).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_zero_tokens_and_zero_lambda_leave_the_text_alone(attn, projections, norm):
    processor = EliteAttnProcessor(*projections, attention_norm=norm)
    plain = processor(attn, hidden_states, text)
    torch.testing.assert_close(processor(attn, hidden_states, (text, [])), plain, **CLOSE)
    zero_lambda = ours(attn, projections, f, [0.0, 0.0], norm)
    torch.testing.assert_close(zero_lambda, plain, **CLOSE)
    torch.testing.assert_close(
        ours(attn, projections, torch.zeros_like(f), [1.0, 1.0], norm), plain, **CLOSE
    )
    assert (ours(attn, projections, f, [1.0, 1.0], norm) - plain).abs().max() > 1e-2


def test_attention_mask_of_the_text(attn, projections):
    mask = torch.zeros(B, 1, TEXT, dtype=torch.float64)
    mask[0, :, 6:], mask[1, :, 7:] = -1e4, -1e4
    lambdas = [0.8, 0.6]
    expected = written_out(attn, projections, f, lambdas, mask=mask)
    out = ours(attn, projections, f, lambdas, mask=mask)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert (out - ours(attn, projections, f, lambdas)).abs().max() > 1e-3


def test_placeholder_without_attention_gives_no_nan(attn, projections):
    mask = torch.zeros(B, 1, TEXT, dtype=torch.float64)
    mask[torch.arange(B), 0, INDEX] = -1e9  # nothing is paid to the placeholder
    out = ours(attn, projections, f, [0.8, 0.8], mask=mask)
    plain = EliteAttnProcessor(*projections)(attn, hidden_states, text, attention_mask=mask)
    torch.testing.assert_close(out, plain, **CLOSE)


def test_local_inputs_shapes():
    tokens, placeholder, lambda_ = local_inputs(f, INDEX, 0.8, TEXT)
    assert tokens is f and lambda_.shape == (B, 1, 1) and placeholder.shape == (B, 1, TEXT)
    assert placeholder.argmax(dim=2).flatten().tolist() == INDEX.tolist()
    assert placeholder.sum() == B and lambda_.dtype == f.dtype


# --- installation ---------------------------------------------------------------------------------


@pytest.fixture
def unet(parts):
    return parts["unet"]


def other_unet_mapper(parts) -> GlobalMapper:
    """A mapper for a UNet of other widths, else alike."""
    unet = type(parts["unet"]).from_config(dict(parts["unet"].config), block_out_channels=(8, 16))
    return GlobalMapper.for_models(unet, parts["image_encoder"], 32, tiny.HIDDEN_LAYERS)


def test_install_reaches_every_attn2_of_this_unet_and_nothing_else(model_folder, unet, mappers):
    other = tiny.build_models()["unet"]
    before = {
        path: type(m.processor) for path, m in other.named_modules() if hasattr(m, "processor")
    }
    install(unet, *mappers)
    for path, module in unet.named_modules():
        if hasattr(module, "processor"):
            is_ours = isinstance(module.processor, EliteAttnProcessor)
            assert is_ours == path.endswith("attn2"), path
    after = {
        path: type(m.processor) for path, m in other.named_modules() if hasattr(m, "processor")
    }
    assert after == before and not is_installed(other)


def test_each_layer_gets_its_own_projections(unet, mappers):
    install(unet, *mappers)
    global_mapper, local_mapper = mappers
    for layer, attn in cross_attention_layers(unet).items():
        assert attn.processor.K_g is global_mapper.projection(layer, "to_k")
        assert attn.processor.V_g is global_mapper.projection(layer, "to_v")
        assert attn.processor.K_l is local_mapper.projection(layer, "to_k")
        assert attn.processor.V_l is local_mapper.projection(layer, "to_v")


@pytest.mark.parametrize("times", [1, 2])
def test_uninstall_gives_the_plain_unet_back(unet, mappers, times):
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 24))
    processors = {p: m.processor for p, m in unet.named_modules() if hasattr(m, "processor")}
    config, state = dict(unet.config), {k: v.clone() for k, v in unet.state_dict().items()}
    with torch.no_grad():
        before = unet(*inputs).sample
        for _ in range(times):
            install(unet, *mappers)
        during = unet(*inputs, added_cond_kwargs={"image_embeds": []}).sample
        uninstall(unet)
        after = unet(*inputs).sample
    assert torch.equal(before, after) and not torch.equal(before, during)
    assert dict(unet.config) == config and unet.encoder_hid_proj is None
    assert {
        p: m.processor for p, m in unet.named_modules() if hasattr(m, "processor")
    } == processors
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    assert not is_installed(unet)


def test_uninstall_of_a_plain_unet_does_nothing(unet):
    uninstall(unet)
    assert not is_installed(unet)


def test_mapper_of_another_unet_is_refused_and_nothing_is_installed(parts, mappers):
    foreign = other_unet_mapper(parts)
    with pytest.raises(ValueError, match=r"GlobalMapper: .*attn2_to_k is \(8, 24\).*another UNet"):
        install(parts["unet"], foreign)
    assert not is_installed(parts["unet"])
    install(parts["unet"], *mappers)
    with pytest.raises(ValueError, match="another UNet"):
        install(parts["unet"], foreign)
    assert is_installed(parts["unet"])  # what was there still is
    layer, attn = next(iter(cross_attention_layers(parts["unet"]).items()))
    assert attn.processor.K_g is mappers[0].projection(layer, "to_k")


def test_mapper_without_projections_is_refused(unet):
    mapper = GlobalMapper(
        input_dim=24, output_dim=24, hidden_dim=32, hidden_layers=tiny.HIDDEN_LAYERS
    )
    with pytest.raises(ValueError, match=r"GlobalMapper has no down_blocks_0.*attn2_to_k"):
        install(unet, mapper)


def test_local_values_are_v_l_f_of_each_layer(unet, mappers):
    tokens = torch.randn(2, 16, 24)
    values = local_values(mappers[1], tokens)
    layers = cross_attention_layers(unet)
    assert len(values) == len(layers) == 4
    for value, layer in zip(values, layers, strict=True):
        weight = mappers[1].state_dict()[f"{layer}_to_v.weight"]
        torch.testing.assert_close(value, tokens @ weight.T)


def test_the_fused_kernel_of_a_cpu_gets_one_width(monkeypatch):
    """Of others it computes the plain formula, three times as long in bfloat16."""
    Q, K, V = (normal(1, 2, n, width, seed=n) for n, width in ((6, 4), (5, 4), (7, 12)))
    V = V[:, :, :5]
    fused, widths = F.scaled_dot_product_attention, []

    def noted(Q, K, V, *args, **options):
        widths.append((Q.shape[-1], K.shape[-1], V.shape[-1]))
        return fused(Q, K, V, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    found = attention._attend(Q, K, V, None, 0.5, None)
    torch.testing.assert_close(found, (Q @ K.mT * 0.5).softmax(-1) @ V, **CLOSE)
    assert widths == [(12, 12, 12)]
