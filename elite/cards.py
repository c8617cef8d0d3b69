"""Model cards: the README.md beside saved weights, from which a stranger can use them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffusers.utils import PushToHubMixin

from elite.files import give_usual_rights, write_text
from elite.markdown import table

CARD = "README.md"
GALLERY_TAG = "elite-concepts"  # by which the card of a gallery is known
EMPTY_CARD = "This model card has been automatically generated"  # in those of diffusers

PIPELINE = """\
---
{front_matter}
---

# ELITE pipeline

A Stable Diffusion {base}with the mapping networks of ELITE (Wei et al., ICCV 2023,
arXiv 2302.13848): one picture of an object and its mask become a word of the prompt, in one
forward pass. {branch} Pictures are {resolution} x {resolution} px by default.

## How to use

It is a pipeline of the package `elite-diffusion`, which has to be installed; diffusers alone loads
the folder as the plain Stable Diffusion inside.

```python
from PIL import Image

from elite import {pipeline}

pipe = {pipeline}.from_pretrained("THIS REPOSITORY OR FOLDER")
concept = pipe.encode_concept(Image.open("object.jpg"), Image.open("object_bg.png"))
pipe("a photo of a S", concept=concept, seed=0).images[0].save("drawn.png")
```

The mask is black except on the object.

## Data, licence, limits

To be written by whoever publishes this: what the mappers were trained on and for how long, under
which licence they are given, and what was measured. The base model's own licence, data and biases
apply to all pictures drawn here.
"""

MAPPER = """\
---
{front_matter}
---

# {name} of ELITE

{what} (Wei et al., ICCV 2023, arXiv 2302.13848), together with its K and V for {attention}
cross-attention layers of the Stable Diffusion it was trained with. It reads {levels} levels of CLIP
features, {input_dim} wide, and writes vectors {output_dim} wide; it fits no other sizes.

## How to use

It is a part of a pipeline of the package `elite-diffusion` (of SDXL, `EliteXLPipeline`):

```python
from elite import ElitePipeline

pipe = ElitePipeline.from_stable_diffusion("STABLE DIFFUSION", {arguments})
```

## Data, licence, limits

To be written by whoever publishes this: data, steps and licence. `config.yaml` of the training run
has the settings. The base model's own licence and limits apply to what is drawn.
"""

GALLERY = """\
---
{front_matter}
---

# Concepts of ELITE

Objects, each read from a picture and its mask by ELITE (Wei et al., ICCV 2023, arXiv 2302.13848).
A file has the object's words and feature tokens, a few hundred kB at the size of Stable Diffusion,
and fits no other mappers than those that made it, of the fingerprint `{fingerprint}`.

{table}

## How to use

With the package `elite-diffusion` and a pipeline of the same model and mappers:

```python
from huggingface_hub import hf_hub_download

from elite import Concept

concept = Concept.load(hf_hub_download("THIS REPOSITORY", "{first}.safetensors"))
pipe("a photo of a S", concept=concept, seed=0).images[0].save("drawn.png")
```

## Licence, limits

To be written by whoever publishes this: whose pictures these are, under which licence, and whether
people who are shown in them agree.
"""

WHAT = {
    "GlobalMapper": "The global mapping network, one word for each level of CLIP features",
    "LocalMapper": "The local mapping network, one feature token for each patch of the object",
}


class Carded(PushToHubMixin, ABC):
    """Saves and uploads a model card with the weights."""

    @abstractmethod
    def card(self) -> str:
        """The text of the model card."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        give_usual_rights(Path(save_directory))
        self._save_card(save_directory)

    def _upload_folder(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        self._save_card(working_dir)
        return super()._upload_folder(working_dir, *args, **kwargs)

    def _save_card(self, folder: str | Path) -> None:
        """Writes the card, unless somebody has written one there."""
        path = Path(folder) / CARD
        if not path.exists() or EMPTY_CARD.encode() in path.read_bytes():
            write_text(path, self.card())


def pipeline_card(
    base_model: str, local_branch: bool, resolution: int, pipeline: str = "ElitePipeline"
) -> str:
    """The card of a whole pipeline.

    Args:
        base_model: where the UNet came from; named only if it is a name on the hub.
        local_branch: whether there is a local mapper.
        resolution: side of its pictures in pixels.
        pipeline: its class.
    """
    named = _hub_name(base_model)
    return PIPELINE.format(
        front_matter=_front_matter("text-to-image", named),
        base=f"({named}) " if named else "",
        branch="It has both the global and the local branch."
        if local_branch
        else "It has the global branch only.",
        resolution=resolution,
        pipeline=pipeline,
    )


def mapper_card(name: str, config: Mapping[str, Any]) -> str:
    """The card of a mapper, by the name of its class and its configuration."""
    return MAPPER.format(
        front_matter=_front_matter("image-feature-extraction", None),
        name=name,
        what=WHAT.get(name, "A mapping network"),
        arguments='global_mapper="ITS GLOBAL MAPPER", local_mapper="THIS FOLDER"'
        if name == "LocalMapper"
        else 'global_mapper="THIS FOLDER"',
        attention=len(config["attention"] or {}),
        levels=1 + len(config["hidden_layers"]),
        input_dim=config["input_dim"],
        output_dim=config["output_dim"],
    )


def gallery_card(names: Sequence[str], pictures: str, fingerprint: str, base_model: str) -> str:
    """The card of a folder of concept files.

    Args:
        names: of the concepts; each has `NAME.safetensors` and a PNG in the folder `pictures`.
        fingerprint: of their mappers.
        base_model: they are drawn with; named only if it is a name on the hub.
    """
    rows = [
        [f"[{_plain(name)}]({quote(name)}.safetensors)", f"![]({pictures}/{quote(name)}.png)"]
        for name in names
    ]
    return GALLERY.format(
        front_matter=_front_matter("text-to-image", _hub_name(base_model), GALLERY_TAG),
        fingerprint=fingerprint,
        table=table(["file", "picture, object"], rows),
        first=names[0],
    )


def _plain(name: str) -> str:
    """A name in a cell of a table."""
    return re.sub(r"([\\|\[\]`<*_])", r"\\\1", name)


def _hub_name(model: str) -> str | None:
    """The name of a model on the hub, None of one in a folder."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists()
    return model if named else None


def _front_matter(task: str, base_model: str | None, *tags: str) -> str:
    lines = ["library_name: diffusers", f"pipeline_tag: {task}", "tags:"]
    lines += [f"- {tag}" for tag in ("elite", "stable-diffusion", "personalization", *tags)]
    return "\n".join(lines + ([f"base_model: {base_model}"] if base_model else []))
