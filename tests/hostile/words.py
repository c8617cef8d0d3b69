"""Bad prompts, flags and settings files."""

from collections.abc import Iterator

from elite.config import build_config, read_yaml
from elite.settings import InferenceLocalConfig
from tests import tiny
from tests.hostile.harness import Case, World
from tests.hostile.tables import feed

OTHERS = (
    "это {}",
    "これは{}です",
    "这是 {}",
    "هذه {} هنا",
    "זה {}",
    "یہ {} ہے",
    "นี่คือ {}",
    "😀 {} 🦊🏽‍🚀",
)


def drawn_prompts() -> Iterator[tuple[str, str]]:
    """Prompts with the placeholder once: drawn."""
    for i, text in enumerate(OTHERS):
        yield f"alphabet {i}", text.replace("{}", " S ")
    yield "alone", "S"
    yield "first", "S on the beach"
    yield "last", "on the beach S"
    yield "in marks", 'a (S), "S2", s, Ss'
    yield "before a comma", "a S, on grass"
    yield "in brackets", "a [S] {} {0} %s %(x)s ${HOME}"
    yield "10 000 words after", "a S " + "grass " * 10_000
    yield "one word of 100 000 letters after", "a S " + "x" * 100_000
    yield "line breaks", "a\nS\r\n\ton\vgrass"
    yield "null", "a S on \0 grass"
    yield "control", "a S " + "".join(map(chr, range(1, 32)))
    yield "escape codes", "a S \x1b[2J\x1b]0;title\x07"
    yield "direction marks", "a S \u202egrass\u202c\u200b\ufeff"
    yield "combining", "a S e" + "\u0301" * 500
    yield "markup", "a S <|endoftext|><|startoftext|>"
    yield "html", "a S <script>alert(1)</script>"
    yield "private and unassigned", "a S \ue000\U0010ffff\ufdd0"


def refused_prompts() -> Iterator[tuple[str, str]]:
    yield "empty", ""
    yield "blank", " \t\n"
    yield "none", "a dog"
    yield "twice", "a S and a S"
    yield "only small", "a s"
    yield "inside a word", "aSa S1 S_ _S"
    yield "10 000 words before", "grass " * 10_000 + "S"
    yield "100 000 letters before", "x" * 100_000 + " S"
    yield "a thousand times", "S " * 1000
    yield "tied to an emoji's half", "\ud83d S"
    yield "lone surrogate", "a S \udc80"
    yield "escape codes without", "a \x1b[2J dog"


def draw_prompt(world: World, prompt: str) -> None:
    latents = tiny.draw(world.pipe, prompt, concept=world.concept, num_inference_steps=1)
    assert latents.isfinite().all()


def draw_placeholder(world: World, placeholder: str) -> None:
    tiny.draw(
        world.pipe,
        f"a {placeholder} here",
        concept=world.concept,
        placeholder_token=placeholder,
        num_inference_steps=1,
    )


PLACEHOLDERS = (
    "",
    " ",
    "\n",
    "a b",
    ".",
    ".*",
    "(",
    "\\",
    "[a-z]+",
    "<|endoftext|>",
    "<|startoftext|>",
    "{}",
    "%s",
    "\0",
    "\ud800",
    "\u200b",
    "\u0301",
    "😀",
    "犬",
    "S" * 5000,
    "a" * 200_000,
)


def scripted(world: World, *flags: str) -> None:
    """inference_local.py as a user calls it, one picture."""
    world.script(
        "inference_local.py",
        *world.model_flags,
        "--test_data_dir",
        world.pairs,
        "--device",
        "cpu",
        "--num_inference_steps",
        "1",
        "--selected_data",
        "0",
        "--output_dir",
        world.folder / "out",
        *flags,
    )


TEMPLATES = (
    ("{}{}", True),
    ("{} {}", True),
    ("", True),
    ("a dog", True),
    ("{{}}", False),
    ("{0}", True),
    ("a {}, {0}", False),
    ("é{}é", True),
    ("S {}", True),
    ("{}S", True),
    ("-{}-", False),
    ("a {} " + "long " * 5000, False),
    ("long " * 5000 + "{}", True),
    ("a\n{}\x1b[31m", False),
    ("\udcff {}", True),
    ("犬 {} 😀", False),
)

HUGE = "9" * 5000
FLAGS: tuple[tuple[str, ...], ...] = (
    ("--nonsense", "1"),
    ("nonsense",),
    ("--",),
    ("-x",),
    ("--seed",),
    ("--seed", "one"),
    ("--seed", "1.5"),
    ("--seed", "-1"),
    ("--seed", "nan"),
    ("--seed", str(2**64)),
    ("--seed", HUGE),
    ("--seed", ""),
    ("--num_images", "0"),
    ("--num_images", str(10**15)),
    ("--batch_size", "-3"),
    ("--batch_size", str(10**12)),
    ("--batch_size", "1e3"),
    ("--num_inference_steps", "0"),
    ("--num_inference_steps", str(10**9)),
    ("--num_inference_steps", "2000"),
    ("--resolution", "7"),
    ("--resolution", "33"),
    ("--resolution", str(10**6)),
    ("--resolution", HUGE),
    ("--resolution", "none!"),
    ("--guidance_scale", "nan"),
    ("--guidance_scale", "inf"),
    ("--guidance_scale", "-1"),
    ("--guidance_scale", "1e39"),
    ("--guidance_scale", "1e308"),
    ("--llambda", "1e308"),
    ("--llambda", "-0.1"),
    ("--llambda", "many"),
    ("--llambda", "nan"),
    ("--scheduler", "evil"),
    ("--scheduler", ""),
    ("--mixed_precision", "fp8"),
    ("--device", "gpu"),
    ("--device", "cuda:99"),
    ("--device", "meta"),
    ("--device", "cpu:x"),
    ("--device", "mps"),
    ("--device", "xla"),
    ("--device", "hpu"),
    ("--device", "vulkan"),
    ("--device", "privateuseone"),
    ("--device", "lazy"),
    ("--selected_data", "99"),
    ("--selected_data", "-2"),
    ("--placeholder_token", ""),
    ("--placeholder_token", "two words"),
    ("--placeholder_token", "\n"),
    ("--test_data_dir", ""),
    ("--test_data_dir", "nowhere"),
    ("--test_data_dir", "/dev/null"),
    ("--test_data_dir", "n" * 5000),
    ("--test_data_dir", "\x1b[2Jnowhere\n"),
    ("--test_data_dir", "/proc/self/fd"),
    ("--pretrained_model_name_or_path", ""),
    ("--pretrained_model_name_or_path", "n" * 5000),
    ("--pretrained_model_name_or_path", "/dev/null"),
    ("--pretrained_model_name_or_path", "../../../nowhere"),
    ("--pretrained_model_name_or_path", "https://127.0.0.1:9/evil"),
    ("--global_mapper_path", ""),
    ("--global_mapper_path", "/dev/null"),
    ("--global_mapper_path", "nowhere.pt"),
    ("--global_mapper_path", "n" * 5000),
    ("--global_mapper_path", "/dev/zero.pt"),
    ("--local_mapper_path", "/etc/passwd"),
    ("--concept_path", ""),
    ("--concept_path", "/dev/null"),
    ("--concept_path", "/dev/zero"),
    ("--concept_path", "n" * 5000),
    ("--concept", "S"),
    ("--concept", "=x"),
    ("--concept", "S=nowhere"),
    ("--concept", "S=/dev/zero"),
    ("--concept", "S=a", "S=b"),
    ("--region", "S=nowhere.png"),
    ("--concept_llambda", "S=x"),
    ("--suffix", "n" * 5000),
    ("--output_dir", "/dev/null/x"),
    ("--output_dir", "/proc/x"),
    ("--config", "nowhere.yaml"),
    ("--config", "/dev/null/x"),
    ("--config", "/etc/shadow/x"),
    ("--config", "/dev/zero"),
    ("--config", "n" * 5000),
    ("--no_mask", "yes"),
    ("--token_index", "1"),
    ("--hub_token", "x"),
    ("--template",),
    ("--templat", "{}"),
)

YAMLS: tuple[tuple[str, str | bytes], ...] = (
    ("list", "- 1\n- 2\n"),
    ("text", "hello"),
    ("number", "7"),
    ("unclosed", "seed: [1, 2"),
    ("tabs", "seed:\t1\n\tx: 2"),
    ("binary", bytes(range(256))),
    ("utf16", "seed: 1".encode("utf-16")),
    ("control", "seed: \x07"),
    ("python object", "seed: !!python/object/apply:os.system ['touch canary']"),
    ("python name", "seed: !!python/name:os.system"),
    ("python module", "!!python/module:antigravity {}"),
    ("unknown key", "sed: 1"),
    ("key is a number", "1: 2"),
    ("key is a list", "[a, b]: 1"),
    ("key is null", "null: 1"),
    ("key is a mapping", "{a: 1}: 2"),
    ("seed is text", "seed: one"),
    ("seed is a list", "seed: [1]"),
    ("seed is null", "seed: null"),
    ("seed is true", "seed: true"),
    ("seed is a float", "seed: 1.0"),
    ("seed is a date", "seed: 2001-01-01"),
    ("seed is a wrong date", "seed: 2001-99-99"),
    ("seed is a mapping", "seed: {a: 1}"),
    ("seed of 5000 digits", "seed: " + HUGE),
    ("seed is not finite", "seed: .inf"),
    ("lambda is not a number", "llambda: .nan"),
    ("template is a number", "template: 7\nseed: x"),
    ("template has a null", 'template: "a \\0 {}"'),
    ("template has half a pair", 'template: "\\ud83d {}"'),
    ("concept is a number", "concept: 7"),
    ("concept holds numbers", "concept: [7]"),
    ("aliases", "seed: &a [*a]"),
    (
        "ten to the nine",
        "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
        "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
        "e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
        "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g,*g,*g]\nseed: *h",
    ),
    (
        "seed ten to the nine",
        "seed: [&a [x,x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a],"
        "&c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c],"
        "&e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e],"
        "&g [*f,*f,*f,*f,*f,*f,*f,*f,*f,*f], &h [*g,*g,*g,*g,*g,*g,*g,*g,*g,*g]]",
    ),
    ("deep", "seed: " + "[" * 20_000),
    ("deep mapping", "{a: " * 5000),
    ("long value", "seed: " + "x" * 100_000),
    ("10 MB", "seed: 1\n" * 1_250_000),
    ("10 MB line", "x" * 10_000_000),
    ("two documents", "seed: 1\n---\nseed: 2\n"),
    ("merge of nothing", "<<: 1\nseed: 1"),
    ("escape codes in a key", '"\\e[2J": 1'),
)


def settings_file(world: World, content: str | bytes) -> None:
    build_config(InferenceLocalConfig, read_yaml(world.write("c.yaml", content)))


def cases(world: World) -> Iterator[Case]:
    for name, prompt in drawn_prompts():
        yield feed("prompt", name, draw_prompt, prompt, refused=False)
    for name, prompt in refused_prompts():
        yield feed("prompt", name, draw_prompt, prompt)
    for token in PLACEHOLDERS:
        yield feed("prompt", f"placeholder {token[:20]!r}", draw_placeholder, token, refused=None)
    for template, refused in TEMPLATES:
        yield feed(
            "prompt",
            f"template {template[:20]!r}",
            scripted,
            f"--template={template}",
            refused=refused,
        )
    for flags in FLAGS:
        name = " ".join(flags)[:40]
        yield feed("flags", repr(name), scripted, *flags, refused=True)
    for name, content in YAMLS:
        yield feed("yaml", name, settings_file, content)
