"""Several concepts in one picture: each with its own words, lambda and region."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from elite.attention import COLUMNS, EliteAttnProcessor, local_inputs, visibility
from elite.concept import Concept
from elite.named_concepts import places_in_readings, words_of_readings
from elite.text import encode_text, inject_words, tokenize, word_positions
from tests import tiny
from tests.tiny import draw
from tests.unit.test_attention import PATCHES, TEXT, B, C, D, attn, normal, projections
from tests.unit.test_keys_values import EACH_STEP

__all__ = ["attn", "projections"]  # fixtures

PROMPT = "a S1 next to a S2"
QUERIES = 16  # 4 x 4
# Float64 on both sides: only the order of sums differs.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
# Only the order of sums differs: of the concepts, or of the batch that K and V are computed in.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}

hidden_states = normal(B, QUERIES, C, seed=20)
text = normal(B, TEXT, D, seed=21)
f = [normal(B, PATCHES, D, seed=seed) for seed in (22, 23)]
INDEX = torch.tensor([[3, 6], [5, 2]])  # of two concepts in two rows


def attended(attn, projections, local, context=text, states=hidden_states) -> torch.Tensor:
    return EliteAttnProcessor(*projections)(attn, states, (context, local))


def local_of(which: int, lambda_: float) -> list[torch.Tensor]:
    return local_inputs(f[which], INDEX[:, which], lambda_, TEXT)


# --- in one attention -----------------------------------------------------------------------------


def test_each_concept_adds_its_own_branch(attn, projections):
    plain = attended(attn, projections, [])
    first, second = (
        attended(attn, projections, local_of(which, lambda_)) - plain
        for which, lambda_ in ((0, 0.8), (1, 0.5))
    )
    both = attended(attn, projections, local_of(0, 0.8) + local_of(1, 0.5))
    torch.testing.assert_close(both, plain + first + second, **EXACT)
    assert first.abs().max() > 1e-2 and (first - second).abs().max() > 1e-2


def left_half(side: int) -> torch.Tensor:
    """1 there, of the size of the latents."""
    region = torch.zeros(side, side, dtype=torch.float64)
    region[:, : side // 2] = 1
    return region


def in_regions(regions: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """The local inputs of both concepts, some of which have regions."""
    local: list[torch.Tensor] = []
    for n, lambda_ in enumerate((0.8, 0.5)):
        places = places_in_readings(INDEX, n, regions, TEXT)
        local += local_inputs(f[n], places, lambda_, (1 + len(regions)) * TEXT)
    return [*local, visibility(regions, INDEX, 1, TEXT)]


def test_a_region_reads_the_prompt_for_itself(attn, projections):
    """Left stands the first concept alone: what the first reading says, and its word in it, matter
    on the right only, and the other way round."""
    local, context = in_regions({0: left_half(8)}), torch.cat([text, text.flip(1)], dim=1)
    out = attended(attn, projections, local, context)

    def changed(columns: slice, local=local, context=context) -> float:
        other = attended(attn, projections, local, context)
        return float((other - out).abs().unflatten(1, (4, 4))[:, :, columns].max())

    left, right = slice(0, 2), slice(2, 4)
    of_first, of_own, word = context.clone(), context.clone(), context.clone()
    of_first[:, :TEXT] += 1
    of_own[:, TEXT:] += 1
    word[torch.arange(B), INDEX[:, 0]] += 5  # of the first concept, in the first reading
    for where, elsewhere, given in (
        (right, left, {"context": of_first}),
        (left, right, {"context": of_own}),
        (left, right, {"local": [local[0].flip(2), *local[1:]]}),
    ):
        assert changed(where, **given) > 1e-3 and changed(elsewhere, **given) < 1e-12
    assert max(changed(left, context=word), changed(right, context=word)) < 1e-12


def test_a_region_of_everything_reads_as_without(attn, projections):
    """Where its reading says the same."""
    local = in_regions({1: torch.ones(8, 8, dtype=torch.float64)})
    torch.testing.assert_close(
        attended(attn, projections, local, torch.cat([text.flip(0), text], dim=1)),
        attended(attn, projections, local_of(0, 0.8) + local_of(1, 0.5)),
        **EXACT,
    )


def test_rows_without_local_inputs_see_everything(attn, projections):
    """The guidance rows come first, with the same text for each reading."""
    local = [x[1:] for x in in_regions({0: left_half(8), 1: 1 - left_half(8)})]
    out = attended(attn, projections, local, text.repeat(1, 3, 1))
    torch.testing.assert_close(out[:1], attended(attn, projections, [])[:1], **EXACT)


@pytest.mark.parametrize(("side", "queries"), [(8, 64), (8, 16), (7, 16), (5, 4)])
def test_visibility_at_the_sizes_of_the_unet(attn, projections, side, queries):
    """Sides are halved and rounded up; a half seen place is seen half as much."""
    local, states = in_regions({0: left_half(side)}), normal(B, queries, C, seed=30)
    out = attended(attn, projections, local, text.repeat(1, 2, 1), states)
    assert out.shape == (B, queries, C) and out.isfinite().all()


# --- in the prompt --------------------------------------------------------------------------------


def test_readings_have_the_words_of_their_regions():
    """Of three concepts the first and the last have regions."""
    words = torch.arange(6.0).reshape(2, 3, 1, 1)
    readings = words_of_readings(words, (0, 2))
    assert [reading.flatten(1).tolist() for reading in readings] == [
        [[0, 1, 2], [3, 4, 5]],
        [[0, 1, 0], [3, 4, 3]],
        [[2, 1, 2], [5, 4, 5]],
    ]
    index = torch.tensor([[2, 5, 7], [4, 3, 8]])
    places = [places_in_readings(index, n, (0, 2), 10)[0].tolist() for n in range(3)]
    assert places == [[2, 12, 17], [5, 15, 25], [7, 22, 27]]


@pytest.mark.parametrize("num_words", [1, 3])
@pytest.mark.parametrize("index", [[[2, 5], [6, 1]], [[3, 4], [4, 3]]])
def test_words_of_several_placeholders(num_words, index):
    length = 16
    embeddings, words = torch.randn(2, length, 8), torch.randn(2, 2, num_words, 8)
    out = inject_words(embeddings, words, torch.tensor(index))
    at = word_positions(torch.tensor(index), num_words)
    for row, places in enumerate(index):
        expected: list[torch.Tensor] = []
        for place, embedding in enumerate(embeddings[row]):
            if place in places:
                n = places.index(place)
                assert at[row, n] == len(expected)
                expected += list(words[row, n])
            else:
                expected.append(embedding)
        assert torch.equal(out[row], torch.stack(expected[:length]))


def test_placeholders_of_several_tokens_take_one_each(pipe):
    tokenizer = pipe.tokenizer
    assert len(tokenizer.tokenize("S1")) > 1
    ids, index = tokenize(tokenizer, ["a S1 next to a S2, far away"], ["S2", "S1"])
    # start a S1 next to a S2 , ...
    between = len(tokenizer.tokenize("next to a"))
    assert index.tolist() == [[3 + between, 2]]
    plain, _ = tokenize(tokenizer, ["a S next to a S', far away"], ["S'"])
    kept = [i for i in range(ids.shape[1]) if i not in index[0]]
    assert torch.equal(ids[0, kept], plain[0, kept])


# --- in pictures ----------------------------------------------------------------------------------


@pytest.fixture
def other(pipe) -> Concept:
    return pipe.encode_concept(*tiny.picture(1))


def halves(side: int = 32) -> dict[str, np.ndarray]:
    left = np.zeros((side, side), dtype=bool)
    left[:, : side // 2] = True
    return {"S1": left, "S2": ~left}


def test_one_of_several_is_the_single_one(pipe, concept):
    assert torch.equal(
        draw(pipe, "a S", concepts={"S": concept}, lambda_={"S": 0.6}),
        draw(pipe, "a S", concept=concept, lambda_=0.6),
    )


def test_names_and_their_order_do_not_matter(pipe, concept, other):
    weights = {"S1": 0.8, "S2": 0.4}
    drawn = draw(pipe, PROMPT, concepts={"S1": concept, "S2": other}, lambda_=weights)
    turned = draw(
        pipe,
        "a S2 next to a S1",
        concepts={"S1": other, "S2": concept},
        lambda_={"S1": 0.4, "S2": 0.8},
    )
    torch.testing.assert_close(drawn, turned, **CLOSE)
    swapped = draw(pipe, PROMPT, concepts={"S1": other, "S2": concept}, lambda_=weights)
    assert (drawn - swapped).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["S1", "S2"])
def test_each_lambda_weighs_its_own_concept(pipe, concept, other, name):
    both = {"S1": concept, "S2": other}
    weights = {"S1": 0.8, "S2": 0.8}
    drawn = draw(pipe, PROMPT, concepts=both, lambda_=weights)
    assert (draw(pipe, PROMPT, concepts=both, lambda_={**weights, name: 0.0}) - drawn).abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"regions": halves()},
        {"regions": {"S2": halves(20)["S2"]}, "words": "all"},
        {"regions": halves(), "num_images_per_prompt": 2, "seed": [7, 8]},
        {"regions": halves(), "guidance_scale": 1.0},
    ],
    ids=["plain", "regions", "one region, all words", "two pictures", "no guidance"],
)
def test_once_equals_each_step(pipe, concept, other, options):
    options = {"concepts": {"S1": concept, "S2": other}, **options}
    once, each_step = draw(pipe, PROMPT, **options), draw(pipe, PROMPT, **options, **EACH_STEP)
    torch.testing.assert_close(once, each_step, **CLOSE)


def test_a_batch_gives_what_single_calls_give(pipe, concept, other):
    prompts = [PROMPT, "close-up of a S2 with a S1"]
    columns = {"S1": [concept, other], "S2": [other, concept]}
    batch = draw(pipe, prompts, concepts=columns, lambda_={"S1": [0.8, 0.3], "S2": 0.5})
    for row, (prompt, weight) in enumerate(zip(prompts, (0.8, 0.3), strict=True)):
        single = draw(
            pipe,
            prompt,
            concepts={name: column[row] for name, column in columns.items()},
            lambda_={"S1": weight, "S2": 0.5},
        )
        torch.testing.assert_close(batch[row : row + 1], single, **CLOSE)


def test_regions_change_the_picture(pipe, concept, other):
    both = {"S1": concept, "S2": other}
    drawn = draw(pipe, PROMPT, concepts=both)
    same = draw(pipe, PROMPT, concepts=both, regions={"S2": np.ones((4, 4), dtype=bool)})
    torch.testing.assert_close(same, drawn, **CLOSE)
    assert (draw(pipe, PROMPT, concepts=both, regions=halves()) - drawn).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_regions_with_embeddings_of_a_negative_prompt(pipe, concept, other, guidance_scale):
    options = {"concepts": {"S1": concept, "S2": other}, "regions": halves()}
    options["guidance_scale"] = guidance_scale
    embeds = encode_text(pipe.text_encoder, tokenize(pipe.tokenizer, ["red"], [])[0])
    torch.testing.assert_close(
        draw(pipe, PROMPT, **options, negative_prompt_embeds=embeds.detach()),
        draw(pipe, PROMPT, **options, negative_prompt="red"),
        **CLOSE,
    )


def test_regions_confine_words_without_feature_tokens_too(pipe, concept, other):
    both = {"S1": concept, "S2": other}
    words = {name: replace(one, feature_tokens=None) for name, one in both.items()}
    apart = draw(pipe, PROMPT, concepts=words, regions=halves())
    expected = draw(pipe, PROMPT, concepts=both, regions=halves(), lambda_=0.0)
    torch.testing.assert_close(apart, expected, **CLOSE)
    assert (draw(pipe, PROMPT, concepts=words) - apart).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_": {"S1": 0.8}}, "lambda_ is given for S1; expected one for each of S1, S2"),
        ({"lambda_": [0.1, 0.2, 0.3]}, "3 lambdas for 1 prompts"),
        ({"regions": {"S3": np.ones((4, 4))}}, "region of S3: no such concept; there are S1, S2"),
        ({"regions": {"S1": np.zeros((4, 4))}}, "region of S1 is empty"),
        ({"regions": {"S1": np.ones((4, 4, 2))}}, r"region of S1 is float64 of shape \(4, 4, 2\)"),
    ],
)
def test_wrong_options(pipe, concept, other, options, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, PROMPT, concepts={"S1": concept, "S2": other}, **options)


def test_wrong_concepts(pipe, concept):
    with pytest.raises(ValueError, match="concept and concepts are both given"):
        draw(pipe, "a S", concept=concept, concepts={"S": concept})
    with pytest.raises(ValueError, match="'a S1' has no placeholder 'S2'"):
        draw(pipe, "a S1", concepts={"S1": concept, "S2": concept})
    with pytest.raises(ValueError, match="regions: no concept; pass concept or concepts, or leave"):
        draw(pipe, PROMPT, regions=halves())
    names = [f"S{n}" for n in range(COLUMNS + 1)]
    with pytest.raises(ValueError, match="9 concepts in one prompt; at most 8 are possible"):
        draw(pipe, " ".join(names), concepts=dict.fromkeys(names, concept))
    foreign = Concept(concept.words, concept.feature_tokens, "cafe")
    with pytest.raises(ValueError, match="other mappers"):
        draw(pipe, PROMPT, concepts={"S1": concept, "S2": foreign})


def test_as_many_as_fit(pipe, concept, other):
    names = [f"S{n}" for n in range(COLUMNS)]
    prompt = " ".join(names)
    drawn = draw(pipe, prompt, concepts=dict.fromkeys(names, concept))
    last = dict.fromkeys(names, concept) | {names[-1]: other}
    assert (draw(pipe, prompt, concepts=last) - drawn).abs().max() > 1e-4
