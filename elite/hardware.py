"""Which device it is, and how a pipeline sits on it: less memory for more time, faster kernels."""

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, UNet2DConditionModel

from elite.loading import side_in_pixels
from elite.wording import note

# As torch.cpu.get_capabilities names them, of x86 and of ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
FP8 = torch.float8_e4m3fn
KINDS_COMPILED = 64  # of calls: sizes, rows, numbers of concepts; torch's own limit is 8


def pick_device(name: str | None) -> torch.device:
    """The device of this process: the one named, else CUDA, MPS or the CPU, as there is.

    Raises:
        ValueError: no such device here.
    """
    # Without being told so, accelerate shares no work among processes on a machine of CPUs only.
    only_cpu = not torch.accelerator.is_available()
    try:
        device = torch.device(name) if name else PartialState(cpu=only_cpu).device
        torch.zeros(1, device=device).item()  # "meta" holds nothing
    except Exception:  # each backend that is not there has an error of its own
        raise ValueError(
            f"device {name!r} is not available; leave out --device or use --device cpu"
        ) from None
    if device.type == "cpu":
        PartialState(cpu=True)
    return device


def computes_in_bf16(device: torch.device) -> bool:
    """Whether CPU or CUDA device has instructions for bfloat16, and need not emulate it; of others
    that is assumed."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def note_emulation(device: torch.device, precision: str) -> None:
    """Tells who asked for bf16 where it is emulated: training took thirteen times as long as in
    float32 on a CPU without it."""
    if precision == "bf16" and not computes_in_bf16(device):
        note(
            f"bf16: this {device.type.upper()} only emulates it, which can take ten times as long "
            "as float32; --mixed_precision no avoids that"
        )


def decode_in_parts(pipe: DiffusionPipeline) -> None:
    """The VAE decodes the pictures of a batch one by one, and pictures larger than its model draws
    in tiles, whose seams are blended; others stay what they were."""
    vae = pipe.vae
    vae.enable_slicing()
    vae.enable_tiling()
    # Of its own, a VAE tiles by the size that it was trained at.
    vae.tile_latent_min_size = pipe.unet.config.sample_size
    vae.tile_sample_min_size = side_in_pixels(pipe.unet, vae)


def decodes_in_tiles(pipe: DiffusionPipeline, resolution: int | None) -> bool:
    """Whether pictures of this side (None: the model's own) are decoded in tiles."""
    return pipe.vae.use_tiling and (resolution or 0) > pipe.vae.tile_sample_min_size


def offload_in_groups(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Keeps each layer's weights in the computer's memory but for its turn on the device; on CUDA
    the next layer's come while one computes. Pictures stay what they were.

    To be called in place of moving the pipeline there, which would take all the memory at once.
    """
    options = {"onload_device": device, "offload_type": "leaf_level"}
    streams = device.type == "cuda"
    pipe.enable_group_offload(**options, use_stream=streams, exclude_modules=["vae"])
    # A stream expects layers in one order, and tiles repeat them.
    pipe.vae.enable_group_offload(**options)


def store_in_fp8(unet: UNet2DConditionModel) -> None:
    """Stores the UNet's weights but for its norms in 8 bits, and computes in the number type it
    has. A quarter of the memory of float32; changes pictures."""
    unet.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=unet.dtype)


def order_channels_last(pipe: DiffusionPipeline) -> None:
    """Keeps the channels of UNet and VAE beside each other in memory, as convolutions in half
    precision want them; changes the order of sums alone."""
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """Compiles each transformer block, where the attentions are, as one graph when it is first
    called. Another number of rows, as where guidance ends, is compiled once more, up to
    KINDS_COMPILED.

    The blocks, not the whole: what runs around them may change from step to step.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS_COMPILED)
    unet.compile_repeated_blocks(fullgraph=True, isolate_recompiles=True)
