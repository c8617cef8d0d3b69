"""The settings of the scripts: a field is a flag of its name and a key of a `--config` file.

`elite/config.py` reads them. Of the modules only `inference.py`, `stages.py` and the app's and the
textual inversion's see them; all others take plain arguments.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from elite.defaults import DEFAULT_SAMPLER, DEFAULT_STEPS, GUIDANCE_SCALE, LAMBDA, PLACEHOLDER
from elite.speed import RUNGS

PRECISIONS = ("no", "fp16", "bf16")
MOST_GB = 1_000_000  # of a cache; more is a slip of the finger
MAX_SIDE = 8000  # of pictures; larger ones could not be read again (`images.MAX_PIXELS`)
METRICS = ("clip", "dino", "attributes")
PROTOCOLS = ("dreambench",)
EMBEDDING_FORMATS = ("diffusers", "a1111", "sdxl")
PROPERTIES = ("object", "style", "face")
SAMPLERS = (
    *("lms", "dpm++", "dpm++_karras", "unipc", "euler", "heun", "ddim", "pndm"),
    *("lcm", "tcd"),  # for models and LoRAs distilled to few steps
)
# Every name of diffusers.optimization but piecewise_constant, which needs rules of its own.
LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "linear",
    "polynomial",
)


def setting(default: Any, help: str, **checks: Any) -> Any:
    """A field with a default: `help` is one sentence for the user.

    Checks: `choices` (a tuple), `at_least`, `at_most`, `above`, `below`, `multiple_of` (numbers),
    `pattern` (a regular expression for the whole text) with `expected` (its description),
    `may_be_empty` (of a text). `secret` fields are never printed nor saved; the default of a
    `shipped` field is found in the repository from any working directory.
    """
    metadata = {"help": help, **checks}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def word_setting(default: str, help: str) -> Any:
    """A setting that is one word of a prompt."""
    return setting(default, help, pattern=r"\S+", expected="one word")


def side_setting() -> Any:
    """The size of what is drawn."""
    text = "Side of the pictures in pixels; None means what the model draws."
    return setting(None, text, at_least=8, at_most=MAX_SIDE, multiple_of=8)


def batch_setting() -> Any:
    """How many pictures are drawn at once."""
    text = "Pictures drawn at once; changes them by rounding at most."
    return setting(1, text, at_least=1, at_most=10_000)


def image_encoder_setting() -> Any:
    """What reads the pictures of objects."""
    text = "CLIP vision tower; None means image_encoder/ in the model folder, "
    return setting(None, text + "else openai/clip-vit-large-patch14.")


def required(help: str) -> Any:
    """A field that the YAML file or a flag has to give."""
    return field(metadata={"help": help})


@dataclass(kw_only=True)
class ModelFilesConfig:
    """Which files of a Stable Diffusion model are read."""

    variant: str | None = setting(
        None, "Variant of the weights' files, as fp16 in model.fp16.safetensors."
    )
    single_file_config: str | None = setting(
        None,
        "Folder in diffusers layout, or hub name, with configs and tokenizer for a model in a "
        "single file; None means one of the hub that fits.",
    )

    @property
    def model_files(self) -> dict[str, Any]:
        return {"variant": self.variant, "single_file_config": self.single_file_config}


@dataclass(kw_only=True)
class FitConfig(ModelFilesConfig):
    """What all training scripts share."""

    default_steps: ClassVar[int]

    pretrained_model_name_or_path: str = required(
        "Stable Diffusion to start from: a diffusers folder, a hub name or a single file."
    )
    output_dir: str = setting("runs/elite", "Folder for results, checkpoints, previews and logs.")
    revision: str | None = setting(None, "Revision of a hub model; None means its main branch.")
    resolution: int | None = setting(
        None, "Side of the training images in pixels; None means what the model draws.", at_least=8
    )

    train_batch_size: int = setting(4, "Samples per device and step.", at_least=1)
    gradient_accumulation_steps: int = setting(
        4, "Batches summed into one optimiser step.", at_least=1
    )
    max_train_steps: int | None = setting(
        None, "Optimiser steps in all; wins over num_train_epochs.", at_least=1
    )
    num_train_epochs: int | None = setting(
        None,
        "Passes over the data, when max_train_steps is None; both None means the paper's steps.",
        at_least=1,
    )
    learning_rate: float = setting(1e-6, "Learning rate of AdamW.", above=0)
    scale_lr: bool = setting(
        False, "Multiply the learning rate by accumulation x batch x processes."
    )
    lr_scheduler: str = setting("constant", "Schedule of the learning rate.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = setting(
        0, "Optimiser steps of warm-up, for the schedulers that have one.", at_least=0
    )
    adam_beta1: float = setting(0.9, "First AdamW beta.", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "Second AdamW beta.", at_least=0, below=1)
    adam_weight_decay: float = setting(1e-2, "AdamW weight decay.", at_least=0)
    adam_epsilon: float = setting(1e-8, "AdamW epsilon.", above=0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", above=0)
    ema: bool = setting(False, "Keep a moving average of the weights and save that.")
    ema_decay: float = setting(
        0.9999, "Share of the old average kept at each step.", at_least=0, below=1
    )
    mixed_precision: str | None = setting(
        None,
        "Autocast type; auto is bf16 where the device computes in it, else no; None means "
        "accelerate's own setting.",
        choices=(*PRECISIONS, "auto"),
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute UNet activations in the backward pass: less memory, more time."
    )
    shard_optimizer: bool = setting(
        False, "Each process keeps the optimizer's state of its share of the weights only."
    )
    compile: bool = setting(
        False, "Compile the UNet with torch.compile: slow first step, faster ones after it."
    )
    allow_tf32: bool = setting(False, "TF32 matrix products on NVIDIA GPUs: faster, less exact.")
    dataloader_num_workers: int = setting(
        0, "Processes that prepare samples, per device; 0 means the training process.", at_least=0
    )
    seed: int = setting(
        42, "Seed of data order, augmentation and noise.", at_least=0, at_most=2**63 - 1
    )

    save_steps: int = setting(
        500, "Optimiser steps between two checkpoints; 0 means one at the end.", at_least=0
    )
    checkpoints_total_limit: int | None = setting(
        None, "Checkpoints kept, the newest ones; None means all.", at_least=1
    )
    resume_from_checkpoint: str | None = setting(
        None,
        'Checkpoint folder to continue from, or "latest" for the newest whole one in output_dir.',
    )
    logging_dir: str = setting("logs", "Log folder; inside output_dir unless absolute.")
    dry_run: bool = setting(False, "Build everything, train one step, save nothing.")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps: max_train_steps, else num_train_epochs, else the paper's number."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is not None:
            return self.num_train_epochs * steps_per_epoch
        return self.default_steps


@dataclass(kw_only=True)
class HubConfig:
    """Where results are uploaded to."""

    push_to_hub: bool = setting(False, "Upload what was made to the Hugging Face hub.")
    hub_model_id: str | None = setting(
        None, "Hub repository for the upload; None means the name of output_dir."
    )
    hub_token: str | None = setting(
        None, "Hub token; None means that of the login; never saved.", secret=True
    )


@dataclass(kw_only=True)
class TrainConfig(HubConfig, FitConfig):
    """What both stages of ELITE share."""

    train_data_dir: str = required(
        "Open Images folder with images/, segs/ and annotations/, or shards of it from "
        "data_scripts/make_shards.py: their folder or its URL."
    )
    shard_cache: str | None = setting(
        None,
        "Folder that shards, and latents at a URL, are fetched to; None reads those of a local "
        "folder where they lie.",
    )
    shard_cache_gb: float = setting(
        20.0, "Most that shard_cache may hold, in GB.", above=0, at_most=MOST_GB
    )
    shard_window: int = setting(
        8, "Shards whose samples are shuffled together, after the shards themselves.", at_least=1
    )
    tokenizer_name: str | None = setting(
        None, "Tokenizer folder or hub name; None means the model's own."
    )
    image_encoder_name_or_path: str | None = image_encoder_setting()
    placeholder_token: str = word_setting(
        PLACEHOLDER, "The word that stands for the object in captions."
    )
    hidden_layers: list[int] = setting(
        [4, 8, 12, 16],
        "CLIP hidden states that give words besides the last one, shallow to deep.",
        at_least=0,
    )
    mapper_hidden_size: int | None = setting(
        None, "Width of the mapping MLPs; None means 1024.", at_least=1
    )
    validation_steps: int = setting(
        500, "Optimiser steps between two previews; 0 means no previews.", at_least=0
    )
    validation_data_dir: str = setting(
        "test_datasets", "Folder of NAME.jpg and NAME_bg.png pairs for the previews.", shipped=True
    )
    num_validation_images: int = setting(4, "Pairs drawn in a preview.", at_least=1)


@dataclass(kw_only=True)
class TrainGlobalConfig(TrainConfig):
    """Stage 1: the global mapping network (paper eq. 4)."""

    default_steps: ClassVar[int] = 70_000

    output_dir: str = setting("runs/global", "Folder for mappers, checkpoints, previews and logs.")
    global_mapper_path: str | None = setting(
        None, "Global mapper to start from; None means a fresh one."
    )
    kv_learning_rate: float | None = setting(
        None,
        "Learning rate of K and V, which read all other words, too; None means the same.",
        above=0,
    )
    crop_to_object: bool = setting(
        False,
        "Write into the mapper that pictures are to be read cropped to their objects, as training "
        "shows them; the release reads whole ones.",
    )
    cache_latents: str | None = setting(
        None,
        "Folder of data_scripts/cache_latents.py with the VAE's latents, or its URL, fetched into "
        "shard_cache with the shards; None means encoding in every step.",
    )


@dataclass(kw_only=True)
class TrainLocalConfig(TrainConfig):
    """Stage 2: the local mapping network (paper eq. 7)."""

    default_steps: ClassVar[int] = 65_000

    output_dir: str = setting("runs/local", "Folder for mappers, checkpoints, previews and logs.")
    global_mapper_path: str = required("Trained global mapper, which stays as it is.")
    local_mapper_path: str | None = setting(
        None, "Local mapper to start from; None means a fresh one."
    )
    train_batch_size: int = setting(2, "Samples per device and step.", at_least=1)
    learning_rate: float = setting(1e-5, "Learning rate of AdamW.", above=0)


@dataclass(kw_only=True)
class TextualInversionConfig(FitConfig):
    """Textual inversion (Gal et al. 2022) on Stable Diffusion 1.x or SDXL: learns a new word."""

    default_steps: ClassVar[int] = 3000

    train_data_dir: str = required("Folder of pictures of the one concept.")
    output_dir: str = setting(
        "runs/textual_inversion", "Folder for embeddings, checkpoints, previews and logs."
    )
    placeholder_token: str = word_setting("<concept>", "The new word, none of the model's.")
    num_vectors: int = setting(1, "Embeddings the new word stands for.", at_least=1)
    initializer_token: str | None = setting(
        None, "Word or words to start from; None means random embeddings."
    )
    initializer_concept: str | None = setting(
        None, "Concept file of ELITE to start from: w0, or all its words with as many vectors."
    )
    learnable_property: str = setting(
        "object", "What is learned; chooses the captions.", choices=PROPERTIES
    )
    template_file: str | None = setting(
        None, "Text file of captions with {}, one a line; None means the built-in ones."
    )
    center_crop: bool = setting(False, "Crop the middle of pictures, not a random square.")
    learning_rate: float = setting(5e-4, "Learning rate of AdamW.", above=0)
    infer_during_train: bool = setting(False, "Draw previews while training.")
    infer_interval: int = setting(500, "Optimiser steps between two previews.", at_least=1)
    infer_prompt: str = setting(
        "a photo of a {}", "Prompt of the previews.", pattern=r".*\{\}.*", expected="a {} in it"
    )
    num_infer_images: int = setting(4, "Pictures in a preview.", at_least=1)


@dataclass(kw_only=True)
class ModelConfig(ModelFilesConfig):
    """A trained model and where it computes."""

    pretrained_model_name_or_path: str = setting(
        "checkpoints/small_world",
        "Stable Diffusion to draw with: a diffusers folder, a hub name or a single file.",
        shipped=True,
    )
    mixed_precision: str | None = setting(
        None, "Number type; None means fp16 on CUDA and no elsewhere.", choices=PRECISIONS
    )
    device: str | None = setting(
        None, "Device such as cpu, cuda:0 or mps; None means the fastest one present."
    )


@dataclass(kw_only=True)
class DrawingModelConfig(ModelConfig):
    """A trained model that draws."""

    lora: list[str] = setting(
        [],
        "LoRA files, as FILE or FILE:WEIGHT: .safetensors, a folder of diffusers, or on the hub "
        "OWNER/REPOSITORY or OWNER/REPOSITORY/FILE; their parts add up.",
    )
    low_memory: bool = setting(
        False,
        "Less memory for more time: on a GPU weights come layer by layer from the computer's; "
        "pictures are decoded one by one, those larger than the model draws in tiles.",
    )
    fp8_weights: bool = setting(
        False, "Store the UNet's weights in 8 bits: less memory, more time, other pictures."
    )
    compile: bool = setting(
        False, "Compile the UNet's transformer blocks: slow first picture, faster ones after it."
    )
    channels_last: bool = setting(
        False, "Order tensors as convolutions in fp16 and bf16 want them: faster there alone."
    )


@dataclass(kw_only=True)
class DrawConfig(DrawingModelConfig):
    """What all scripts that draw share."""

    output_dir: str = setting("outputs", "Folder that receives the pictures.")
    num_images: int = setting(
        1, "Pictures of each kind, with seeds counting up.", at_least=1, at_most=100_000
    )
    seed: int = setting(42, "Seed of the first picture's noise.", at_least=0, at_most=2**63 - 1)
    num_inference_steps: int = setting(
        DEFAULT_STEPS, "Denoising steps; the release takes 100.", at_least=1, at_most=1000
    )
    guidance_scale: float = setting(
        GUIDANCE_SCALE, "Classifier-free guidance; 1 or less means none.", at_least=0, at_most=1000
    )
    negative_prompt: str | None = setting(
        None,
        "What pictures should not show; works by guidance, so with guidance_scale above 1.",
        may_be_empty=True,
    )
    scheduler: str = setting(DEFAULT_SAMPLER, "Sampler; lms is the release's.", choices=SAMPLERS)
    resolution: int | None = side_setting()
    batch_size: int = batch_setting()


@dataclass(kw_only=True)
class ConceptConfig(ModelConfig):
    """What all scripts that encode pictures share."""

    image_encoder_name_or_path: str | None = image_encoder_setting()
    global_mapper_path: str | None = setting(
        None, "Trained global mapper; None means the model folder's own."
    )
    test_data_dir: str = setting(
        "test_datasets", "Folder of NAME.jpg and NAME_bg.png pairs.", shipped=True
    )


@dataclass(kw_only=True)
class FolderConfig:
    """How a folder of objects is worked through."""

    no_mask: bool = setting(
        False,
        "Read no masks and take each whole picture as the object; "
        "its background then becomes part of the concept.",
    )
    skip_existing: bool = setting(
        True, "Keep files of an earlier run that were made from the same input and settings."
    )


@dataclass(kw_only=True)
class EliteConfig(ConceptConfig, DrawConfig):
    """What all scripts that draw with ELITE share."""

    placeholder_token: str = word_setting(PLACEHOLDER, "The word that stands for the object.")
    speed: str = setting(
        "exact", "How much exactness is given up for time: a rung of knobs.", choices=tuple(RUNGS)
    )
    guidance_stop: float | None = setting(
        None,
        "Share of the steps that have guidance, the first ones; None means that of speed.",
        above=0,
        at_most=1,
    )
    deep_every: int | None = setting(
        None,
        "The UNet's inner blocks run at every so many steps, its outermost layer at each; "
        "None means that of speed.",
        at_least=1,
    )
    deep_first: int | None = setting(
        None,
        "Over so many of the first steps the distance between steps that run all of the UNet grows "
        "from 1 to deep_every; None means that of speed.",
        at_least=1,
    )


@dataclass(kw_only=True)
class WordConfig:
    """Which of the words is injected."""

    token_index: str = setting(
        "0",
        "Word to draw with: its index (0 is the primary word), or full for all of them.",
        pattern=r"\d+|full",
        expected='an index from 0 on, or "full"',
    )

    @property
    def words(self) -> int | Literal["all"]:
        return "all" if self.token_index == "full" else int(self.token_index)


@dataclass(kw_only=True)
class LocalMapperConfig:
    """The second mapper."""

    local_mapper_path: str | None = setting(
        None, "Trained local mapper; None means the model folder's own."
    )


@dataclass(kw_only=True)
class LocalConfig(LocalMapperConfig):
    """The local branch."""

    llambda: float = setting(
        LAMBDA,
        "Weight of the local features: 0.8 reproduces the object, 0.6 edits it.",
        at_least=0,
        at_most=1000,
    )


@dataclass(kw_only=True)
class EncodeConfig(HubConfig, FolderConfig, LocalMapperConfig, ConceptConfig):
    """Concept files of the pairs of a folder, to be drawn with --concept_path."""

    output_dir: str = setting("outputs/concepts", "Folder that receives the concept files.")


@dataclass(kw_only=True)
class InferenceConfig(FolderConfig, EliteConfig):
    """What both inference scripts of ELITE share."""

    concept_path: str | None = setting(
        None,
        "Concept file of encode.py, or a folder of them, drawn in place of pairs; "
        "needs the mappers it was encoded with.",
    )
    suffix: str = setting("object", "First part of the output folder's name.")
    template: str = setting("a photo of a {}", "Prompt; {} is replaced by the placeholder.")
    selected_data: int = setting(
        -1, "Index of the one pair or concept to draw; -1 means all.", at_least=-1
    )


@dataclass(kw_only=True)
class InferenceGlobalConfig(WordConfig, InferenceConfig):
    """Pictures from the words alone."""

    local_mapper_path: str | None = setting(
        None,
        "Local mapper that the files of --concept_path were encoded with, otherwise unused; "
        "None means the model folder's own.",
    )


@dataclass(kw_only=True)
class InferenceLocalConfig(LocalConfig, InferenceConfig):
    """Pictures from the primary word and the local features."""

    concept: list[str] = setting(
        [],
        "NAME=FILE for concepts of encode.py that are drawn together; the template says their "
        'names, as in "a S1 next to a S2".',
        pattern=r"[^\s=]+=.+",
        expected="NAME=FILE",
    )
    concept_llambda: list[str] = setting(
        [],
        "NAME=NUMBER for those of --concept that have a weight other than llambda.",
        pattern=r"[^\s=]+=(\d+\.?\d*|\.\d+)",
        expected="NAME=NUMBER",
    )
    region: list[str] = setting(
        [],
        "NAME=MASK for those of --concept that may only appear where this picture is not black.",
        pattern=r"[^\s=]+=.+",
        expected="NAME=MASK",
    )


@dataclass(kw_only=True)
class TextualInversionInferenceConfig(DrawConfig):
    """Pictures of learned words in stock pipelines of Stable Diffusion 1.x or SDXL."""

    embeddings: list[str] = required(
        "Embedding files of diffusers, A1111 or SDXL, or folders of them; several are combined."
    )
    prompt: list[str] = required("Prompts, each with one or several of the learned words.")
    output_dir: str = setting("outputs/textual_inversion", "Folder that receives the pictures.")


@dataclass(kw_only=True)
class MergeEmbeddingsConfig:
    """Several learned words in one folder."""

    embeddings: list[str] = required(
        "Embedding files of diffusers, A1111 or SDXL, folders of them, or concepts of ELITE."
    )
    output_dir: str = required("Folder for the merged files.")
    format: str = setting(
        "diffusers",
        "Form of the files: diffusers' own, or one for each word, named by it: A1111's .pt, or "
        "SDXL's clip_l and clip_g.",
        choices=EMBEDDING_FORMATS,
    )
    rename: list[str] = setting(
        [], "OLD=NEW for placeholders.", pattern=r".+=[^\s=]+", expected="OLD=NEW"
    )


@dataclass(kw_only=True)
class EvaluateConfig(WordConfig, LocalConfig, EliteConfig):
    """Draws every prompt for every concept of a folder and scores the pictures."""

    test_data_dir: str = setting(
        "test_datasets", "Folder of NAME.jpg + NAME_bg.png, or of DreamBench's.", shipped=True
    )
    output_dir: str = setting("outputs/evaluation", "Folder that receives pictures and scores.")
    prompts: str = setting(
        "configs/prompts/small_world.yaml",
        "Prompts and class words: YAML, or DreamBench's prompts_and_classes.txt.",
        shipped=True,
    )
    protocol: str | None = setting(
        None,
        "Measures as DreamBench does, by CLIP and DINO, says with what, and adds the scores of "
        "real pictures and of pasting the object.",
        choices=PROTOCOLS,
    )
    class_word: str = setting("object", "Class word of concepts that the prompts file leaves out.")
    llambda: float = setting(
        0.6, "Weight of the local features; 0 draws from the words alone.", at_least=0, at_most=1000
    )
    metrics: list[str] = setting(
        ["attributes"],
        "What is measured: CLIP-I and CLIP-T, DINO-I, the small world's attributes.",
        choices=METRICS,
    )
    clip_name_or_path: str = setting("openai/clip-vit-base-patch32", "CLIP that measures.")
    dino_name_or_path: str = setting("facebook/dino-vits16", "DINO that measures.")
    judge_path: str = setting(
        "checkpoints/small_world_judge", "Classifier of the small world's attributes.", shipped=True
    )
    crop_references: bool = setting(
        False, "Compare with the object's box in the concept's picture, not with all of it."
    )


@dataclass(kw_only=True)
class AppConfig(LocalMapperConfig, ConceptConfig, DrawingModelConfig):
    """ELITE in the browser: a picture of an object, its mask, a prompt, pictures."""

    test_data_dir: str = setting(
        "test_datasets", "Folder of NAME.jpg and NAME_bg.png pairs, the examples.", shipped=True
    )
    placeholder_token: str = word_setting(PLACEHOLDER, "The word that stands for the object.")
    resolution: int | None = side_setting()
    batch_size: int = batch_setting()
    sam_name_or_path: str | None = setting(
        None,
        "Folder or hub name of a Segment Anything model that finds the object, as "
        "facebook/sam-vit-base; None means GrabCut.",
    )
    host: str = setting(
        "127.0.0.1", "Address to listen at; any but this machine's own needs a password."
    )
    port: int | None = setting(
        None,
        "Port to listen at; None means the first free one from 7860 on.",
        at_least=1,
        at_most=65_535,
    )
    share: bool = setting(
        False, "Open a public link through Gradio's servers as well; needs a password."
    )
    auth: str | None = setting(
        None,
        "USER:PASSWORD to log in with; None means what ELITE_APP_AUTH says, which other users of "
        "the machine cannot see.",
        pattern=r"[^:]+:.+",
        expected="USER:PASSWORD",
        secret=True,
    )
    max_upload_mb: int = setting(20, "Largest upload in megabytes.", at_least=1)
    max_megapixels: float = setting(25.0, "Largest picture in million pixels.", above=0)
    queue_size: int = setting(
        32, "Requests that may wait; more are refused with a message.", at_least=1
    )
