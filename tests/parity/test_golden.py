"""Every number of a golden folder against our own code (folder: $ELITE_GOLDEN, default the copy
beside this file)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import Golden, golden_folder, relative_error
from torch import Tensor

from elite.attention import install, local_inputs, local_values
from elite.images import patch_mask
from elite.loading import make_scheduler
from elite.mappers import clip_levels
from elite.named_concepts import pick_words
from elite.objectives import EliteObjective, GlobalObjective, LocalObjective
from elite.pipeline import ElitePipeline
from elite.text import encode_text

# Float32 sums in another order differ by some 1e-6; a wrong formula by far more than this.
TOLERANCE = 1e-4

golden = Golden(golden_folder())
COMPUTED: dict[str, Callable[[], Tensor]] = {}
cache: dict[str, object] = {}


def remember(key: str, make: Callable[[], object]):
    """Work that several rows share is done once."""
    if key not in cache:
        cache[key] = make()
    return cache[key]


def quantity(name: str, compute: Callable[[], Tensor]) -> None:
    if name in golden.outputs:
        COMPUTED[name] = compute


# a. mappers and CLIP levels
# ------------------------------------------------------------------------------------


def features() -> list[Tensor]:
    names = sorted(name for name in golden.meta["inputs"] if name.startswith("feat_"))
    return [golden.input(name) for name in names]


def levels() -> list[Tensor]:
    layers = golden.global_mapper.config.hidden_layers
    return remember(
        "levels", lambda: clip_levels(golden.image_encoder, golden.input("clip_image"), layers)
    )


quantity("a.mapper_feats", lambda: golden.global_mapper(features()))
quantity("a.mapper_local_feats", lambda: golden.local_mapper(features()))
quantity("a.mapper_image", lambda: golden.global_mapper(levels()))
quantity("a.mapper_local_image_mean", lambda: golden.local_mapper(levels()).mean(dim=1))
for level in range(golden.global_mapper.num_levels):
    quantity(f"a.vision_{level}", lambda level=level: levels()[level][:1])

# b. words into the prompt
# --------------------------------------------------------------------------------------


def text(ids: str, words: Tensor | None = None, index: Tensor | None = None) -> Tensor:
    return encode_text(golden.text_encoder, golden.input(ids), words, index)


def edge_index() -> Tensor:
    entry = golden.meta["inputs"].get("edge_index")
    if entry is not None:
        return golden.input("edge_index")
    ids, words = golden.input("edge_ids"), golden.input("edge_inj5")
    return torch.full((len(ids),), ids.shape[1] - words.shape[1])


quantity("b.plain", lambda: text("text_ids"))
quantity("b.inj5", lambda: text("text_ids", golden.input("inj5"), golden.input("text_index")))
quantity(
    "b.inj1", lambda: text("text_ids", golden.input("inj5")[:, 1:2], golden.input("text_index"))
)
quantity("b.edge_inj5", lambda: text("edge_ids", golden.input("edge_inj5"), edge_index()))

# c. the UNet's prediction
# --------------------------------------------------------------------------------------


def unet(batch: int, local: list[Tensor] | None = None, t: Tensor | None = None) -> Tensor:
    t = golden.input("unet_t")[:batch] if t is None else t
    sample, context = golden.input("unet_sample")[:batch], golden.input("unet_ctx")[:batch]
    return golden.unet(sample, t, context, added_cond_kwargs={"image_embeds": local or []}).sample


def global_unet(batch: int, t: Tensor | None = None) -> Tensor:
    install(golden.unet, golden.global_mapper)
    return unet(batch, t=t)


def local_tokens(batch: int) -> Tensor:
    return (golden.input("unet_local") * golden.input("unet_local_mask"))[:batch]


def local_unet(batch: int, lambda_: float | None) -> Tensor:
    install(golden.unet, golden.global_mapper, golden.local_mapper, attention_norm="batch")
    if lambda_ is None:
        return unet(batch)
    index = golden.input("text_index")[:batch]
    length = golden.input("unet_ctx").shape[1]
    return unet(batch, local_inputs(local_tokens(batch), index, lambda_, length))


def value_means(batch: int) -> Tensor:
    """In execution order: the modules' order has the middle block last."""
    layers = list(golden.local_mapper.config.attention)
    order = sorted(
        range(len(layers)), key=lambda i: ("down", "mid", "up").index(layers[i].split("_")[0])
    )
    values = local_values(golden.local_mapper, local_tokens(batch))
    return torch.stack([values[i].abs().mean() for i in order])


float_timestep = torch.tensor(golden.meta["float_timestep"], dtype=torch.float64)
quantity("c.global_float_t", lambda: global_unet(2, float_timestep))
for b in (1, 2):
    quantity(f"c.global_b{b}", lambda b=b: global_unet(b))
    quantity(f"c.localfn_nolocal_b{b}", lambda b=b: local_unet(b, None))
    quantity(f"c.local_b{b}_nolambda", lambda b=b: local_unet(b, 1.0))
    quantity(f"c.value_local_absmean_b{b}", lambda b=b: value_means(b))
    for weight in golden.meta["lambdas"]:
        quantity(f"c.local_b{b}_l{weight}", lambda b=b, weight=weight: local_unet(b, weight))

# d. losses and gradients
# ---------------------------------------------------------------------------------------


class Recorder:
    """What an objective fed to its UNet, and what came out."""

    def __init__(self, objective: EliteObjective) -> None:
        self.objective, self.seen = objective, {}
        self._predict = objective.predict
        objective.predict = self

    def __call__(
        self, batch: dict, noisy_latents: Tensor, t: Tensor, words: Tensor, local=None
    ) -> Tensor:
        eps_hat = self._predict(batch, noisy_latents, t, words, local)
        context = encode_text(
            self.objective.text_encoders[0], batch["input_ids"], words, batch["index"]
        )
        self.seen = {
            "noisy_latents": noisy_latents,
            "inj_embedding": words,
            "encoder_hidden_states": context,
            "noise_pred": eps_hat,
        }
        return eps_hat


def training(stage: str) -> dict[str, Tensor]:
    """One training step of a stage on the golden batch: everything the folder records of it."""
    if stage == "global":
        objective = GlobalObjective(golden.parts, golden.global_mapper)
    else:
        objective = LocalObjective(golden.parts, golden.global_mapper, golden.local_mapper)
        install(golden.unet, golden.global_mapper, golden.local_mapper, attention_norm="batch")
    recorder = Recorder(objective)
    batch = {
        "clip_pixels": golden.input("train_clip"),
        "object_pixels": golden.input("train_obj"),
        "object_mask": golden.input("train_seg")[:, :1],
        "loss_mask": golden.input("train_mask"),
        "input_ids": golden.input("text_ids"),
        "index": golden.input("text_index"),
    }
    objective.trained.zero_grad()
    out = objective.loss(
        batch, golden.input("train_latents"), golden.input("train_noise"), golden.input("train_t")
    )
    out["loss"].backward()
    names = golden.meta["training"][stage]
    gradients = {name: p.grad.double() for name, p in objective.trained.named_parameters()}
    norms = {name: gradients[name].norm() for name in names["grad_names"]}
    groups = [
        torch.stack([norm for name, norm in norms.items() if _in_group(name, group)]).norm()
        for group in names["group_names"]
    ]
    return {
        **recorder.seen,
        "loss": torch.stack([out["loss"], out["mse"], out["penalty"]]),
        "grad_norms": torch.stack(list(norms.values())),
        "group_norms": torch.stack(groups),
        "total_norm": torch.stack(list(norms.values())).norm(),
    }


def _in_group(name: str, group: str) -> bool:
    return name.startswith(group + ".") or name.removesuffix(".weight").endswith(group)


for stage in ("global", "local"):
    for key in (k for k in golden.outputs if k.startswith(f"d.{stage}.")):
        quantity(
            key,
            lambda key=key, stage=stage: remember(f"train {stage}", lambda: training(stage))[
                key.split(".")[2]
            ],
        )

# e. sampling runs
# ----------------------------------------------------------------------------------------------


class GoldenPipeline(ElitePipeline):
    """The pipeline with the golden token ids where a tokenizer would stand."""

    def encode_prompt(self, *args, prompt_embeds: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        uncond = golden.input("uncond_ids")
        uncond = uncond.expand(len(prompt_embeds), -1)
        return prompt_embeds, encode_text(self.text_encoder, uncond)


def sampling(words: int | str, lambda_: float | None) -> dict[str, Tensor]:
    """One run of the release's validation: context, words, local tokens, final latents, decoded
    picture."""
    validation = golden.meta["validation"]
    batch = validation["batch"]
    pipe = GoldenPipeline(
        **golden.parts,
        global_mapper=golden.global_mapper,
        local_mapper=None if lambda_ is None else golden.local_mapper,
    )
    pipe.install(attention_norm="batch")
    pipe.set_progress_bar_config(disable=True)
    size = golden.image_encoder.config.image_size
    clip_pixels, object_pixels = (
        F.interpolate(golden.input(name), (size, size), mode="bilinear", align_corners=False)
        for name in ("val_clip", "val_obj")
    )
    patches = patch_mask(golden.input("val_seg")[:, :1], pipe.grid)
    concept = pipe.encode_views(clip_pixels, object_pixels, patches)
    index = torch.tensor(validation["index"])
    chosen = pick_words(concept.words, words)
    context = encode_text(pipe.text_encoder, golden.input("text_ids")[:batch], chosen, index)
    local = []
    if lambda_ is not None:
        local = local_inputs(concept.feature_tokens, index, lambda_, context.shape[1])
    latents = pipe(
        prompt_embeds=context,
        ip_adapter_image_embeds=local,
        latents=golden.input("val_latents"),
        height=golden.input("val_latents").shape[2] * pipe.vae_scale_factor,
        width=golden.input("val_latents").shape[3] * pipe.vae_scale_factor,
        num_inference_steps=validation["steps"],
        guidance_scale=validation["guidance"],
        output_type="latent",
    ).images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return {
        "words": concept.words,
        "LOCAL": concept.feature_tokens,
        "context": context,
        "latents": latents,
        "decoded": decoded,
    }


RUNS = {
    "global_0": (0, None),
    "global_full": ("all", None),
    "local": (0, golden.meta["validation"]["llambda"]),
    "local_defaultlambda": (0, 1.0),
}
for run, (words, lambda_) in RUNS.items():
    for key in (k for k in golden.outputs if k.startswith(f"e.{run}.")):
        quantity(
            key,
            lambda key=key, run=run, words=words, lambda_=lambda_: remember(
                run, lambda: sampling(words, lambda_)
            )[key.split(".")[2]],
        )


def lms():
    scheduler = make_scheduler("lms")
    scheduler.set_timesteps(golden.meta["validation"]["steps"])
    return scheduler


quantity("e.sigmas", lambda: lms().sigmas)
quantity("e.timesteps", lambda: lms().timesteps)
quantity("e.init_noise_sigma", lambda: torch.as_tensor(lms().init_noise_sigma).reshape(1))


# --------------------------------------------------------------------------------------------------
# -------------


@pytest.mark.parametrize("name", sorted(golden.outputs))
def test_equals_the_authors_number(name: str) -> None:
    assert name in COMPUTED, f"nothing computes {name}"
    training_row = name.startswith("d.")
    with torch.set_grad_enabled(training_row):
        actual = COMPUTED[name]()
    assert np.isfinite(golden.outputs[name]).all()
    assert relative_error(actual, golden.outputs[name]) < TOLERANCE
