"""Bad files of numbers: checkpoints, concept files, learned words, model folders."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from elite import ElitePipeline
from elite.concept import ConceptFolder
from elite.latents import Shard, read_row
from elite.loading import load_parts
from tests import tiny
from tests.hostile.harness import Case, World
from tests.hostile.tables import RunsCode, feed
from textual_inversion.files import load_embeddings, merge_embeddings

# --- checkpoints of the release -------------------------------------------------------------------


def torch_bytes(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def state_of(world: World) -> dict[str, Tensor]:
    return torch.load(world.mappers / "global_mapper.pt", weights_only=True)


def deflated(content: bytes, extra: int = 0) -> bytes:
    """The same archive with its entries compressed, one of them grown by zero bytes."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            grown = bytes(extra) if name.endswith("data.pkl") else b""
            new.writestr(name, old.read(name) + grown)
    return buffer.getvalue()


def states(world: World) -> Iterator[tuple[str, Callable[[dict[str, Tensor]], object]]]:
    """What a hostile checkpoint holds in place of a state dict."""
    first = "mapping_0.0.weight"

    def changed(**values: object) -> Callable[[dict[str, Tensor]], object]:
        return lambda state: {**state, **values}

    def every(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
        return lambda state: {key: change(value) for key, value in state.items()}

    yield "empty dict", lambda state: {}
    yield "list", lambda state: list(state.values())
    yield "one tensor", lambda state: torch.zeros(3)
    yield "nested", lambda state: {"state_dict": state}
    yield "numbers for tensors", changed(**{first: 3})
    yield "numbers for names", lambda state: {**state, 7: torch.zeros(1)}
    yield "one missing", lambda state: {k: v for k, v in state.items() if k != first}
    yield "one more", changed(evil=torch.zeros(1))
    yield "no axes", changed(**{first: torch.tensor(1.0)})
    yield "no rows", changed(**{first: torch.zeros(0, 24)})
    yield "other width", changed(**{first: torch.zeros(32, 25)})
    yield "2^40 rows", changed(**{first: torch.zeros(1).expand(2**40, 1)})
    yield (
        "many levels",
        lambda state: {
            **state,
            **{f"mapping_patch_{i}.0.weight": torch.zeros(1) for i in range(20_000)},
        },
    )
    yield "integers", every(lambda x: x.to(torch.int32))
    yield "complex", every(lambda x: x.to(torch.complex64))
    yield "fp8", every(lambda x: x.to(torch.float8_e4m3fn))
    yield (
        "one fp8",
        lambda s: {**s, "mapping_0.0.bias": s["mapping_0.0.bias"].to(torch.float8_e5m2)},
    )
    yield "one half", lambda s: {**s, "mapping_0.0.bias": s["mapping_0.0.bias"].half()}
    yield "nan", changed(**{"mapping_0.0.bias": torch.full((32,), torch.nan)})
    yield "infinite", changed(**{"mapping_0.0.bias": torch.full((32,), torch.inf)})
    yield "sparse", lambda s: {**s, first: s[first].to_sparse()}
    yield "code in it", lambda state: {**state, "evil": RunsCode(world)}
    yield "code alone", lambda state: RunsCode(world)


def checkpoint(world: World, content: bytes, name: str = "mapper.pt") -> None:
    load_checkpoint(world, world.write(name, content))


def load_checkpoint(world: World, path: Path) -> None:
    pipe = ElitePipeline.from_stable_diffusion(world.model, global_mapper=path)
    picture = tiny.draw(pipe, concept=pipe.encode_concept(*tiny.picture(0)))
    assert picture.isfinite().all()


def raw_checkpoints(world: World) -> Iterator[tuple[str, bytes]]:
    whole = (world.mappers / "global_mapper.pt").read_bytes()
    state = state_of(world)
    yield "empty", b""
    yield "noise", torch.randint(0, 256, (5000,), dtype=torch.uint8).numpy().tobytes()
    yield "text", b"state dict"
    yield "cut", whole[: len(whole) // 2]
    yield "without its end", whole[:-30]
    yield "pickle protocol 0", pickle.dumps(RunsCode(world), 0)
    yield "pickle protocol 5", pickle.dumps(RunsCode(world), 5)
    yield "global of os", b"cos\nsystem\n(S'touch " + str(world.canary).encode() + b"'\ntR."
    yield "eval", b"cbuiltins\neval\n(S'open(%r, \"w\")'\ntR." % str(world.canary).encode()
    yield (
        "old format, code",
        torch_bytes({**state, "evil": RunsCode(world)}, _use_new_zipfile_serialization=False),
    )
    yield "deflated", deflated(whole)
    yield "grows to 3 GB", deflated(whole, 600 << 20)
    yield "deep", b"\x80\x02" + b"(" * 100_000 + b"."
    yield "long string", b"\x80\x02X\xff\xff\xff\x7f" + bytes(100)
    yield "zip of nothing", b"PK\5\6" + bytes(18)


# --- mappers in our format ------------------------------------------------------------------------


def lying(length: int, text: bytes, rest: bytes = b"") -> bytes:
    """A safetensors file: length of the header, header, data."""
    return struct.pack("<Q", length) + text + rest


def headers() -> Iterator[tuple[str, bytes]]:
    def of(entry: object, rest: int = 16) -> bytes:
        text = json.dumps({"words": entry}).encode()
        return lying(len(text), text, bytes(rest))

    f32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    yield "empty", b""
    yield "7 bytes", bytes(7)
    yield "no header", lying(0, b"")
    yield "header of 2^63", lying(2**63, b"{}")
    yield "header of 100 MB", lying(100_000_000, b"{}")
    yield "header is no JSON", lying(4, b"{{{{")
    yield "header is a list", lying(2, b"[]")
    yield "header is no UTF-8", lying(4, b"\xff\xfe\xfd\xfc")
    yield "deep header", lying(20_000, b"[" * 20_000)
    yield "offsets past the end", of({**f32, "data_offsets": [0, 2**40]})
    yield "offsets backwards", of({**f32, "data_offsets": [16, 0]})
    yield "negative offsets", of({**f32, "data_offsets": [-16, 0]})
    yield "shape larger than data", of({**f32, "shape": [2**40]})
    yield "shape overflows", of({**f32, "shape": [2**33, 2**33]})
    yield "negative shape", of({**f32, "shape": [-4]})
    yield "unknown type", of({**f32, "dtype": "F1024"})
    yield "hole in the data", of(f32, 64)
    yield "a pickle", pickle.dumps({"words": 1})


def mapper_folder(world: World, change: Callable[[Path], object]) -> Path:
    folder = world.folder / "global_mapper"
    shutil.copytree(world.mappers / "global_mapper", folder)
    change(folder)
    return folder


def config_of(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def weights_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def mapper_folders(world: World) -> Iterator[tuple[str, Callable[[Path], object]]]:
    for name, content in headers():
        yield f"safetensors, {name}", lambda f, c=content: weights_file(f).write_bytes(c)
    yield "no config", lambda folder: (folder / "config.json").unlink()
    yield "no weights", lambda folder: weights_file(folder).unlink()
    yield "empty config", lambda folder: (folder / "config.json").write_text("")
    yield "config is a list", lambda folder: (folder / "config.json").write_text("[]")
    yield "config is binary", lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\0\1")
    yield "config is deep", lambda folder: (folder / "config.json").write_text("[" * 100_000)
    yield "layers are a word", config_of(hidden_layers="many")
    yield "layers are words", config_of(hidden_layers=["4", "8"])
    yield "a million layers", config_of(hidden_layers=list(range(1_000_000)))
    yield "negative layers", config_of(hidden_layers=[-1, 4])
    yield "no layers", config_of(hidden_layers=None)
    yield "width of 10^12", config_of(hidden_dim=10**12)
    yield "width of 100 000", config_of(hidden_dim=100_000)
    yield "negative width", config_of(hidden_dim=-1)
    yield "width is a list", config_of(hidden_dim=[32])
    yield "other input width", config_of(input_dim=25)
    yield "attention is a list", config_of(attention=["attn2"])
    yield "layers of other names", config_of(attention={"a.b": 3, "": 4})
    yield "huge attention", config_of(attention={"x": 10**12})
    yield "fp8", lambda folder: retyped(folder, torch.float8_e4m3fn)
    yield "integers", lambda folder: retyped(folder, torch.int32)
    yield "a pickle beside the config", lambda folder: pickled(world, folder)
    yield "nan", lambda folder: spoilt(folder)


def retyped(folder: Path, dtype: torch.dtype) -> None:
    path = weights_file(folder)
    path.write_bytes(save({k: v.to(dtype) for k, v in load_file(path).items()}))


def spoilt(folder: Path) -> None:
    path = weights_file(folder)
    path.write_bytes(save({k: v * torch.nan for k, v in load_file(path).items()}))


def pickled(world: World, folder: Path) -> None:
    weights_file(folder).unlink()
    name = "diffusion_pytorch_model.bin"
    (folder / name).write_bytes(torch_bytes({"evil": RunsCode(world)}))


# --- concept files --------------------------------------------------------------------------------


def concept_file(world: World, tensors: dict[str, Tensor], **metadata: str) -> bytes:
    origin = {"format": "elite-concept", "version": "1", "fingerprint": world.pipe.fingerprint}
    return save(tensors, {**origin, **metadata})


def concept_files(world: World) -> Iterator[tuple[str, bytes]]:
    words, tokens = world.concept.words.clone(), world.concept.feature_tokens.clone()

    def of(a: Tensor | None, b: Tensor | None = tokens, **metadata: str) -> bytes:
        parts = {"words": a, "feature_tokens": b}
        return concept_file(world, {k: x for k, x in parts.items() if x is not None}, **metadata)

    yield from headers()
    yield "no words", of(None)
    yield "other format", of(words, format="something")
    yield "other version", of(words, version="99")
    yield "other mappers", of(words, fingerprint="0" * 16)
    yield "fingerprint of control characters", of(words, fingerprint="\x1b[2J\n")
    yield "no axes", of(torch.tensor(1.0))
    yield "flat", of(words.flatten())
    yield "no objects", of(words[:0], tokens[:0])
    yield "two objects", of(words.repeat(2, 1, 1), tokens.repeat(2, 1, 1))
    yield "counts differ", of(words, tokens.repeat(2, 1, 1))
    yield "narrow words", of(words[..., :-1].contiguous())
    yield "narrow tokens", of(words, tokens[..., :-1].contiguous())
    yield "no words in words", of(words[:, :0].contiguous())
    yield "flat tokens", of(words, tokens.flatten())
    yield "no tokens in tokens", of(words, tokens[:, :0].contiguous())
    yield "tokens of another type", of(words, tokens.to(torch.int8))
    yield "integers", of(words.to(torch.int64))
    yield "booleans", of(words > 0)
    yield "fp8", of(words.to(torch.float8_e4m3fn), tokens.to(torch.float8_e5m2))
    yield "nan", of(words * torch.nan)
    yield "infinite tokens", of(words, tokens / 0)
    yield "1e38", of(words.sign() * 3e38, tokens.sign() * 3e38)
    yield "a checkpoint", weights_file(world.mappers / "global_mapper").read_bytes()


def draw_concept(world: World, content: bytes) -> None:
    path = world.write("evil.safetensors", content)
    concept = ConceptFolder(path).read(0)
    with torch.no_grad():
        picture = tiny.draw(world.pipe, concept=concept, lambda_=0.8)
    assert picture.isfinite().all()


# --- learned words --------------------------------------------------------------------------------


def embedding_files(world: World) -> Iterator[tuple[str, str, bytes]]:
    for name, content in headers():
        yield name, "e.safetensors", content
    yield "pickle", "learned_embeds.bin", torch_bytes({"<x>": RunsCode(world)})
    yield "three axes", "e.safetensors", save({"<x>": torch.zeros(1, 2, 3)})
    yield "no tensors", "e.safetensors", save({})
    yield "no rows", "e.safetensors", save({"<x>": torch.zeros(0, 24)})
    yield "no axes", "e.safetensors", save({"<x>": torch.tensor(1.0)})
    yield "integers", "e.safetensors", save({"<x>": torch.zeros(1, 24, dtype=torch.int32)})
    yield "nan", "e.safetensors", save({"<x>": torch.full((1, 24), torch.nan)})
    yield "other width", "e.safetensors", save({"<x>": torch.zeros(1, 25)})
    yield "empty name", "e.safetensors", save({"": torch.zeros(1, 24)})
    yield "name with a line break", "e.safetensors", save({"a\nb": torch.zeros(1, 24)})
    yield "a word of the model", "e.safetensors", save({"a": torch.zeros(1, 24)})


def good_embeddings() -> Iterator[tuple[str, str, bytes]]:
    yield "a good one", "e.safetensors", save({"<x>": torch.ones(2, 24)})
    yield "of one axis", "e.safetensors", save({"<x>": torch.ones(24)})
    yield "another alphabet", "e.safetensors", save({"犬": torch.ones(1, 24)})


def draw_embedding(world: World, name: str, content: bytes) -> None:
    path = world.write(name, content)
    words = list(load_embeddings(path)["text_encoder"])
    merge_embeddings([path])
    world.script(
        "inference_textual_inversion.py",
        *("--pretrained_model_name_or_path", world.model, "--embeddings", path),
        *("--prompt", f"a {words[0]}", "--num_inference_steps", "1", "--device", "cpu"),
        *("--output_dir", world.folder / "out"),
    )


# --- model folders --------------------------------------------------------------------------------


SCHEDULER_CONFIGS = (
    ("list", "[]"),
    ("no JSON", "{"),
    ("deep", "[" * 100_000),
    ("steps of words", '{"num_train_timesteps": "many"}'),
    ("no steps", '{"num_train_timesteps": 0}'),
    ("10^12 steps", '{"num_train_timesteps": 1000000000000}'),
    ("betas of words", '{"beta_start": "low"}'),
    ("betas that are no numbers", '{"beta_end": NaN}'),
    ("unknown schedule", '{"beta_schedule": "evil"}'),
    ("schedule is a list", '{"beta_schedule": []}'),
    ("unknown prediction", '{"prediction_type": "evil"}'),
    ("betas of its own", '{"trained_betas": [0.1, 0.2]}'),
    ("no signal at the end", '{"rescale_betas_zero_snr": true}'),
)


def model_folders(world: World) -> Iterator[tuple[str, Callable[[Path], object]]]:
    def unpickled(part: str) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            names = {"unet": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}
            weights_file(folder / part).unlink()
            content = torch_bytes({"evil": RunsCode(world)})
            (folder / part / names[part]).write_bytes(content)

        return change

    def config(part: str, **values: Any) -> Callable[[Path], object]:
        return lambda folder: config_of(**values)(folder / part)

    yield "unet pickled", unpickled("unet")
    yield "text encoder pickled", unpickled("text_encoder")
    yield (
        "unet of lying header",
        lambda f: weights_file(f / "unet").write_bytes(lying(2**40, b"{}")),
    )
    yield "no tokenizer", lambda folder: shutil.rmtree(folder / "tokenizer")
    yield "no vae", lambda folder: shutil.rmtree(folder / "vae")
    yield "unet config of words", config("unet", block_out_channels="wide")
    yield "text encoder of other width", config("text_encoder", hidden_size=25)
    yield "vae of no channels", config("vae", block_out_channels=[])
    yield (
        "tokenizer is no JSON",
        lambda f: [path.write_text("{") for path in (f / "tokenizer").glob("*.json")],
    )
    for name, config_file in SCHEDULER_CONFIGS:
        yield (
            f"scheduler: {name}",
            lambda f, c=config_file: (f / "scheduler/scheduler_config.json").write_text(c),
        )


def draw_model(world: World, change: Callable[[Path], object]) -> None:
    folder = world.folder / "model"
    shutil.copytree(world.model, folder)
    change(folder)
    mappers = {n: world.mappers / n for n in ("global_mapper", "local_mapper")}
    pipe = ElitePipeline.from_stable_diffusion(folder, **mappers)
    tiny.draw(pipe, concept=pipe.encode_concept(*tiny.picture(0)))


def code_beside_config(world: World) -> None:
    """What `auto_map` of a config names is not looked at; the model is drawn from its weights."""

    def change(folder: Path) -> None:
        code = f"open({str(world.canary)!r}, 'w')\nclass Evil:\n    pass\n"
        (folder / "text_encoder/evil.py").write_text(code)
        config_of(auto_map={"AutoModel": "evil.Evil"}, model_type="evil")(folder / "text_encoder")

    draw_model(world, change)


def both_kinds_of_weights(world: World) -> None:
    """Where safetensors are there, a pickle beside them is not looked at."""
    folder = world.folder / "model"
    shutil.copytree(world.model, folder)
    for part, name in (
        ("unet", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ):
        (folder / part / name).write_bytes(torch_bytes({"evil": RunsCode(world)}))
    load_parts(folder)


def pipeline_of_code(world: World, index: dict[str, object]) -> None:
    """A saved pipeline whose index names classes of its own."""
    folder = world.folder / "whole"
    world.pipe.save_pretrained(folder)
    code = f"open({str(world.canary)!r}, 'w')\nclass Evil:\n    pass\n"
    for name in ("evil.py", "unet/evil.py", "pipeline.py", "unet/unet.py"):
        (folder / name).write_text(code)
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
    try:
        pipe = ElitePipeline.from_pretrained(folder)
    except ValueError:
        raise
    except Exception as error:  # diffusers' own loader speaks for itself
        raise ValueError(f"{folder}: {str(error).splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=True)
    tiny.draw(pipe, concept=world.concept)


STATES_OF_FILES = torch.zeros(1, 2, dtype=torch.int64)
IMAGES = hashlib.sha256(STATES_OF_FILES.numpy().tobytes()).hexdigest()
SHARD_NEEDS = {"format": "f", "vae": "v", "resolution": "8", "rows": "r", "images": IMAGES}


def shard_file(**changes: Any) -> bytes:
    """A shard of one row as the cache writes it, but for tensors and metadata given by name; None
    leaves them out."""
    tensors = {"mean": torch.zeros(1, 4, 2, 2), "std": torch.ones(1, 4, 2, 2)}
    whole = {**tensors, "files": STATES_OF_FILES, **SHARD_NEEDS}
    parts = {k: x for k, x in {**whole, "failures": "[]", **changes}.items() if x is not None}
    metadata = {key: value for key, value in parts.items() if isinstance(value, str)}
    return save({key: x for key, x in parts.items() if isinstance(x, Tensor)}, metadata)


def shards() -> Iterator[tuple[str, bytes]]:
    yield from headers()
    mean = torch.zeros(1, 4, 2, 2)
    yield "no files", shard_file(files=None)
    yield "no mean", shard_file(mean=None)
    yield "mean without axes", shard_file(mean=torch.tensor(1.0))
    yield "wide mean", shard_file(mean=torch.zeros(1, 4, 2, 9))
    yield "more rows", shard_file(mean=mean.repeat(2, 1, 1, 1), std=mean.repeat(2, 1, 1, 1))
    yield "fp8", shard_file(mean=mean.to(torch.float8_e4m3fn), std=mean.to(torch.float8_e4m3fn))
    yield "integers", shard_file(mean=mean.int(), std=mean.int())
    yield "files are words", shard_file(files=torch.zeros(3))
    yield "another VAE", shard_file(vae="evil")
    yield "resolution of control characters", shard_file(resolution="\x1b[2J\n")
    yield "no metadata", shard_file(**dict.fromkeys((*SHARD_NEEDS, "failures")))
    yield "failures are no JSON", shard_file(failures="{")
    yield "failures are a word", shard_file(failures='"evil"')
    yield "deep failures", shard_file(failures="[" * 100_000)


def shard_case(world: World, content: bytes) -> None:
    """A file of the latent cache: as training reads it, and as it is kept or made again."""
    path, shape = world.write("000000.safetensors", content), (1, 4, 2, 2)
    read_row(path, 0, shape, str(path))
    shard = Shard(path.name, range(1), SHARD_NEEDS, STATES_OF_FILES, shape)
    if not shard.is_at(path, torch.float32):
        raise ValueError(f"{path}: is made again")


def cases(world: World) -> Iterator[Case]:
    for name, make in states(world):
        yield Case("checkpoint", name, lambda w, m=make: checkpoint(w, torch_bytes(m(state_of(w)))))
    for name, content in raw_checkpoints(world):
        yield feed("checkpoint", name, checkpoint, content)
    yield Case(
        "checkpoint",
        "old format",
        lambda w: checkpoint(w, torch_bytes(state_of(w), _use_new_zipfile_serialization=False)),
        refused=False,
    )
    yield Case(
        "checkpoint",
        "halves",
        lambda w: checkpoint(w, torch_bytes({k: v.half() for k, v in state_of(w).items()})),
        refused=False,
    )
    yield Case("checkpoint", "a folder", lambda w: load_checkpoint(w, w.folder))
    yield Case(
        "checkpoint",
        "of the local mapper",
        lambda w: load_checkpoint(w, w.mappers / "local_mapper.pt"),
        None,
    )
    for name, change in mapper_folders(world):
        yield Case(
            "checkpoint",
            f"folder: {name}",
            lambda w, c=change: load_checkpoint(w, mapper_folder(w, c)),
        )
    for name, content in concept_files(world):
        yield feed("concept", name, draw_concept, content)
    good = concept_file(world, world.concept.tensors)
    yield feed("concept", "a good one", draw_concept, good, refused=False)
    for name, file, content in good_embeddings():
        yield feed("embedding", name, draw_embedding, file, content, refused=False)
    for name, file, content in embedding_files(world):
        yield feed("embedding", name, draw_embedding, file, content)
    for name, content in shards():
        yield feed("latents", name, shard_case, content)
    yield feed("latents", "a good one", shard_case, shard_file(), refused=False)
    for name, change in model_folders(world):
        yield feed("model", name, draw_model, change)
    yield Case("model", "pickles beside safetensors", both_kinds_of_weights, refused=False)
    yield Case("model", "code in auto_map", code_beside_config, refused=False)
    for name, index in (
        ("module of its own", {"unet": ["evil", "Evil"]}),
        ("module named like its folder", {"unet": ["unet", "Evil"]}),
        ("function of os", {"unet": ["os", "system"]}),
        ("class of pickle", {"unet": ["pickle", "Unpickler"]}),
        ("number", {"unet": 7}),
        ("pipeline of its own", {"_class_name": ["pipeline", "Evil"]}),
    ):
        yield feed("model", f"index: {name}", pipeline_of_code, index, refused=None)
