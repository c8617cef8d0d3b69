"""Settings: precedence, types, ranges, errors, secrets; all of configs/ and all wrappers."""

import json
import re
import subprocess
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers.optimization import SchedulerType

from elite import settings
from elite.config import (
    build_config,
    build_parser,
    parse_config,
    print_config,
    read_yaml,
    save_config,
    shipped,
    to_dict,
)
from elite.defaults import DEFAULT_SAMPLER, DEFAULT_STEPS
from elite.loading import SCHEDULERS
from elite.settings import (
    AppConfig,
    EncodeConfig,
    EvaluateConfig,
    InferenceGlobalConfig,
    InferenceLocalConfig,
    TrainGlobalConfig,
    TrainLocalConfig,
)

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
ALL = (TrainGlobalConfig, TrainLocalConfig, InferenceGlobalConfig, InferenceLocalConfig)
REQUIRED = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "data"]
PRESETS = {
    "train_global.yaml": TrainGlobalConfig,
    "train_local.yaml": TrainLocalConfig,
    "small_world_global.yaml": TrainGlobalConfig,
    "small_world_local.yaml": TrainLocalConfig,
}
STABLE_DIFFUSION = CONFIGS / "stable_diffusion.yaml"
MODELS = {"pretrained_model_name_or_path", "global_mapper_path", "local_mapper_path"}
DRAWING = (InferenceGlobalConfig, InferenceLocalConfig, EncodeConfig, EvaluateConfig, AppConfig)
# name: (processes, machines, several processes?)
LAUNCHES = {
    "cpu.json": (1, 1, False),
    "cpu_2.json": (2, 1, True),
    "1_gpu.json": (1, 1, False),
    "4_gpu.json": (4, 1, True),
    "two_nodes.json": (8, 2, True),
}


def train(*flags: str) -> TrainGlobalConfig:
    return parse_config(TrainGlobalConfig, [*REQUIRED, *flags])


def infer(*flags: str) -> InferenceLocalConfig:
    return parse_config(InferenceLocalConfig, flags)


def failure(capsys: pytest.CaptureFixture[str], config_class: type, *argv: str) -> str:
    """The one line that a mistake prints."""
    with pytest.raises(SystemExit) as exit_:
        parse_config(config_class, argv)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    return err


@pytest.fixture
def preset(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "preset.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_win_over_yaml_and_yaml_over_defaults(preset) -> None:
    path = preset("seed: 1\nlearning_rate: 0.5\n")
    config = train("--config", path, "--seed", "2")
    assert (config.seed, config.learning_rate, config.train_batch_size) == (2, 0.5, 4)


def test_paper_defaults() -> None:
    stage_1 = train()
    stage_2 = parse_config(TrainLocalConfig, [*REQUIRED, "--global_mapper_path", "g"])
    for config, rate, batch in ((stage_1, 1e-6, 4), (stage_2, 1e-5, 2)):
        assert (config.learning_rate, config.train_batch_size) == (rate, batch)
        assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.999, 1e-8)
        assert (config.adam_weight_decay, config.max_grad_norm) == (1e-2, 1.0)
        assert (config.gradient_accumulation_steps, config.lr_scheduler) == (4, "constant")
        assert config.hidden_layers == [4, 8, 12, 16]
    inference = infer()
    assert (inference.llambda, inference.seed, inference.guidance_scale) == (0.8, 42, 5.0)
    assert (inference.scheduler, inference.num_inference_steps) == (DEFAULT_SAMPLER, DEFAULT_STEPS)


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--scale_lr"], "scale_lr", True),
        (["--scale_lr", "--no-scale_lr"], "scale_lr", False),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning_rate", "1"], "learning_rate", 1.0),
        (["--learning_rate=2e-6"], "learning_rate", 2e-6),
        (["--hidden_layers", "1", "2", "3"], "hidden_layers", [1, 2, 3]),
        (["--resolution", "256"], "resolution", 256),
        (["--resolution", "none"], "resolution", None),
        (["--mixed_precision", "no"], "mixed_precision", "no"),
        (["--placeholder_token", "sks"], "placeholder_token", "sks"),
        (["--seed", "7", "--seed", "8"], "seed", 8),
    ],
)
def test_flag_types(flags: list[str], name: str, value: Any) -> None:
    read = getattr(train(*flags), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-6", "learning_rate", 1e-6),  # YAML 1.1 reads text here
        ("learning_rate: 1.5e-6", "learning_rate", 1.5e-6),
        ("learning_rate: .5", "learning_rate", 0.5),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("mixed_precision: no", "mixed_precision", "no"),  # YAML 1.1 reads false here
        ("mixed_precision: null", "mixed_precision", None),
        ("scale_lr: true", "scale_lr", True),
        ("hidden_layers: [1, 2]", "hidden_layers", [1, 2]),
        ("placeholder_token: true-story", "placeholder_token", "true-story"),
        ("revision: 1.0.x", "revision", "1.0.x"),
        ("revision: 1.5", "revision", "1.5"),
        ("revision: 1e5", "revision", "1e5"),
        ("revision: 0123456", "revision", "0123456"),  # YAML 1.1 reads 42798 here,
        ("output_dir: 2026_11_28", "output_dir", "2026_11_28"),  # 20261128
        ("output_dir: 2026-11-28", "output_dir", "2026-11-28"),  # and a date
        ("max_train_steps: 70_000", "max_train_steps", 70_000),
        ("", "seed", 42),
    ],
)
def test_yaml_types(preset, line: str, name: str, value: Any) -> None:
    read = getattr(train("--config", preset(line)), name)
    assert read == value and type(read) is type(value)


def test_yaml_token_index_is_text(preset) -> None:
    config = parse_config(InferenceGlobalConfig, ["--config", preset("token_index: 0")])
    assert config.token_index == "0"


def test_a_list_default_is_not_shared() -> None:
    train().hidden_layers.append(99)
    assert train().hidden_layers == [4, 8, 12, 16]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--lerning_rate", "1"], ["--lerning_rate", "unknown", "did you mean --learning_rate?"]),
        (["--lerning_rate=1"], ["did you mean --learning_rate?"]),
        (["--qqqqqq"], ["--qqqqqq", "unknown", "--help"]),
        (["--learning", "1"], ["--learning", "unknown"]),  # no abbreviations
        (["stray"], ["stray", "unexpected"]),
        (["--seed", "x"], ["--seed", "'x'", "a whole number"]),
        (["--seed", "1.5"], ["--seed", "'1.5'", "a whole number"]),
        (["--seed"], ["--seed", "expected one argument"]),
        (["--learning_rate", "nan"], ["--learning_rate", "'nan'", "a number"]),
        (["--learning_rate", "0"], ["--learning_rate", "0.0", "more than 0"]),
        (["--train_batch_size", "0"], ["--train_batch_size", "got 0", "at least 1"]),
        (["--max_train_steps", "0"], ["--max_train_steps", "got 0", "at least 1"]),
        (["--resolution", "big"], ["--resolution", "'big'", "a whole number or none"]),
        (["--adam_beta1", "1"], ["--adam_beta1", "1.0", "less than 1"]),
        (["--hidden_layers", "4", "-1"], ["--hidden_layers", "-1", "at least 0"]),
        (["--hidden_layers", "4", "x"], ["--hidden_layers", "list of whole numbers"]),
        (["--mixed_precision", "fp8"], ["--mixed_precision", "'fp8'", "no, fp16, bf16"]),
        (["--lr_scheduler", "cos"], ["--lr_scheduler", "'cos'", "cosine"]),
        (["--placeholder_token", "my dog"], ["--placeholder_token", "'my dog'", "one word"]),
        (["--resume_from_checkpoint", ""], ["--resume_from_checkpoint: got ''", "not empty"]),
        (["--output_dir="], ["--output_dir: got ''", "not empty; leave it out for the default"]),
        (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
        (["--config", "."], [".: Is a directory"]),
    ],
)
def test_mistakes_on_the_command_line(capsys, argv: list[str], parts: list[str]) -> None:
    line = failure(capsys, TrainGlobalConfig, *REQUIRED, *argv)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lerning_rate: 1", ["preset.yaml: lerning_rate: unknown", "did you mean learning_rate?"]),
        ("seed: 1.5", ["preset.yaml: seed: got '1.5'", "a whole number"]),
        ("seed: true", ["seed: got True", "a whole number"]),
        ("scale_lr: 1", ["scale_lr: got '1'", "true or false"]),
        ("scale_lr: yes", ["scale_lr: got 'yes'", "true or false"]),
        ("hidden_layers: 4", ["hidden_layers: got '4'", "a list of whole numbers"]),
        ("output_dir: [a]", ["output_dir: got ['a']", "text"]),
        ("save_steps: -1", ["preset.yaml: save_steps: got -1", "at least 0"]),
        ("learning_rate: 1" + 400 * "0", ["learning_rate: got '1", "a number"]),
        ("learning_rate: null", ["learning_rate: got None", "a number"]),
        ("seed: [1", ["preset.yaml: not YAML"]),
        ("seed: 2000-13-45", ["preset.yaml: seed: got '2000-13-45'", "a whole number"]),
        ("seed: 1\nseed: 2", ["preset.yaml: not YAML (seed is given twice)"]),
        ("output_dir: ''", ["preset.yaml: output_dir: got ''", "a text that is not empty"]),
        ("- seed", ["preset.yaml: got list", "name: value"]),
        ("1: 2", ["1: unknown setting"]),
        ("!!python/object/apply:os.getcwd []", ["not YAML"]),
    ],
)
def test_mistakes_in_the_file(capsys, preset, text: str, parts: list[str]) -> None:
    line = failure(capsys, TrainGlobalConfig, *REQUIRED, "--config", preset(text))
    for part in parts:
        assert part in line


def test_a_file_that_is_not_text(capsys, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not text" in failure(capsys, TrainGlobalConfig, "--config", str(tmp_path / "x.yaml"))


@pytest.mark.parametrize("left_out", ["pretrained_model_name_or_path", "train_data_dir"])
def test_what_training_cannot_do_without(capsys, left_out: str) -> None:
    rest = [REQUIRED[2:], REQUIRED[:2]][left_out == "train_data_dir"]
    line = failure(capsys, TrainGlobalConfig, *rest)
    assert f"{left_out}: not given; add --{left_out}" in line


def test_stage_2_needs_a_global_mapper(capsys) -> None:
    assert "global_mapper_path: not given" in failure(capsys, TrainLocalConfig, *REQUIRED)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--batch_size", "0"], "at least 1"),
        (["--num_images", "0"], "at least 1"),
        (["--num_inference_steps", "0"], "at least 1"),
        (["--selected_data", "-2"], "at least -1"),
        (["--scheduler", "huen"], "lms, dpm++, dpm++_karras, unipc, euler, heun, ddim, pndm"),
        (["--speed", "fats"], "one of exact, balanced, fast"),
        (["--guidance_stop", "0"], "more than 0"),
        (["--deep_every", "0"], "at least 1"),
        (["--deep_first", "0"], "at least 1"),
        (["--resolution", "100"], "a multiple of 8"),
        (["--llambda", "-1"], "at least 0"),
        (["--token_index", "0"], "unknown flag"),  # of the other script
    ],
)
def test_mistakes_at_inference(capsys, argv: list[str], part: str) -> None:
    assert part in failure(capsys, InferenceLocalConfig, *argv)


@pytest.mark.parametrize("index", ["0", "4", "full"])
def test_token_index(index: str) -> None:
    assert parse_config(InferenceGlobalConfig, ["--token_index", index]).token_index == index


@pytest.mark.parametrize("index", ["-1", "all", "0.5", "0 "])
def test_wrong_token_index(capsys, index: str) -> None:
    line = failure(capsys, InferenceGlobalConfig, f"--token_index={index}")
    assert 'an index from 0 on, or "full"' in line


def test_selected_data_may_be_minus_one() -> None:
    assert infer("--selected_data", "-1").selected_data == -1


def test_steps_of_a_run() -> None:
    assert train("--max_train_steps", "3", "--num_train_epochs", "2").total_steps(10) == 3
    assert train("--num_train_epochs", "2").total_steps(10) == 20
    assert train().total_steps(10) == 70_000


@pytest.mark.parametrize("config_class", ALL)
def test_saved_settings_read_back(tmp_path: Path, config_class: type) -> None:
    flags = ["--output_dir", "ö: #1", "--mixed_precision", "no"]
    if issubclass(config_class, settings.TrainConfig):
        flags += [*REQUIRED, "--global_mapper_path", "none.pt", "--learning_rate", "1e-20"]
    config = parse_config(config_class, flags)
    path = tmp_path / "run" / "config.yaml"
    save_config(to_dict(config), path)
    assert parse_config(config_class, ["--config", str(path)]) == config
    assert build_config(config_class, to_dict(config)) == config
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_saving_replaces_whole_files_only(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "config.yaml"
    save_config(to_dict(train("--seed", "1")), path)
    before = path.read_text()

    def no_space(self: Path, text: str, **_: Any) -> None:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(ValueError, match="No space left"):
        save_config(to_dict(train("--seed", "2")), path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_secrets_stay_in_memory(tmp_path: Path, capsys) -> None:
    config = train("--hub_token", "hf_secret")
    assert config.hub_token == "hf_secret"
    save_config(to_dict(config), tmp_path / "config.yaml")
    print_config(config)
    shown = (tmp_path / "config.yaml").read_text() + capsys.readouterr().out + str(to_dict(config))
    assert "hf_secret" not in shown


def test_printed_settings_mark_what_was_changed(capsys) -> None:
    print_config(train("--seed", "5"))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.match(r"\* seed +5$", line)]
    assert [line for line in lines if re.match(r"  train_batch_size +4$", line)]


def test_shipped_defaults_are_found_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped("configs/cpu.json") == str(CONFIGS / "cpu.json")
    assert shipped("hub/name") == "hub/name"
    assert infer().test_data_dir == shipped("test_datasets")
    assert infer("--test_data_dir", "test_datasets").test_data_dir == "test_datasets"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cpu.json").touch()
    assert shipped("configs/cpu.json") == "configs/cpu.json"


@pytest.mark.parametrize("config_class", ALL)
def test_help_explains_every_flag(config_class: type, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(config_class, ["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for item in fields(config_class):
        assert f"--{item.name}" in text
        assert item.metadata["help"].endswith(".")


@pytest.mark.parametrize("config_class", ALL)
def test_defaults_pass_their_own_checks(config_class: type) -> None:
    """The default of every field, given as a value, is accepted and unchanged."""
    needed = [f.name for f in fields(config_class) if f.default is f.default_factory is MISSING]
    config = config_class(**{name: "given" for name in needed})
    assert config_class(**to_dict(config)) == build_config(config_class, to_dict(config))


def test_a_percent_sign_in_a_help_text() -> None:
    @dataclass
    class Sale:
        """Nothing."""

        discount: int = settings.setting(10, "In % of the price.")

    assert "In % of the price. Default: 10." in build_parser(Sale).format_help()


def test_samplers_are_those_of_the_pipeline() -> None:
    assert set(settings.SAMPLERS) == set(SCHEDULERS)


def test_learning_rate_schedulers_are_those_of_diffusers() -> None:
    names = {str(item.value) for item in SchedulerType}
    assert names - {"piecewise_constant"} == set(settings.LR_SCHEDULERS)


def test_every_preset_is_known_here() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == {*PRESETS, STABLE_DIFFUSION.name}
    assert {path.name for path in CONFIGS.glob("*.json")} == set(LAUNCHES)


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str) -> None:
    path = CONFIGS / name
    given = yaml.safe_load(re.sub(r"(\d)e-", r"\1.0e-", path.read_text()))
    assert to_dict(parse_config(PRESETS[name], ["--config", str(path)])).items() >= given.items()
    header = path.read_text().split("\n\n")[0]
    assert "# Hardware" in header and "# Batch" in header


@pytest.mark.parametrize("config_class", DRAWING, ids=lambda config_class: config_class.__name__)
def test_one_file_names_stable_diffusion_for_every_script_that_draws(config_class: type) -> None:
    given = read_yaml(STABLE_DIFFUSION)
    plain = to_dict(parse_config(config_class, []))
    assert set(given) == MODELS and all(plain[name] != given[name] for name in MODELS)
    read = to_dict(parse_config(config_class, ["--config", str(STABLE_DIFFUSION)]))
    assert read == {**plain, **given}


@pytest.mark.parametrize(("stage", "pictures"), [("global", 64), ("local", 32)])
def test_batch_arithmetic_of_the_full_size_presets(stage: str, pictures: int) -> None:
    path = CONFIGS / f"train_{stage}.yaml"
    config = parse_config(PRESETS[path.name], ["--config", str(path)])
    processes = json.loads((CONFIGS / "4_gpu.json").read_text())["num_processes"]
    factor = config.train_batch_size * config.gradient_accumulation_steps * processes
    assert factor == pictures and f"= {pictures} pictures a step" in path.read_text()
    assert f"= {config.learning_rate * factor:.1e}".replace("e-0", "e-") in path.read_text()
    assert config.scale_lr


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_reads_the_launch_file(name: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    argv = ["--config_file", str(CONFIGS / name), "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    processes, machines, several = LAUNCHES[name]
    assert (args.num_processes, args.num_machines, args.multi_gpu) == (processes, machines, several)
    assert args.use_cpu == name.startswith("cpu") and args.mixed_precision == "no"


@pytest.mark.parametrize("script", sorted(path.name for path in REPOSITORY.glob("*.sh")))
def test_shell_wrapper(script: str, tmp_path: Path) -> None:
    """What the wrapper starts: known flags, files that exist, the user's flags last."""
    for tool in ("accelerate", "python"):
        (tmp_path / tool).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / tool).chmod(0o755)
    result = subprocess.run(
        ["bash", REPOSITORY / script, "--seed", "9"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    argv = result.stdout.splitlines()
    start = argv.index(script.replace(".sh", ".py"))
    if argv[0] == "launch":
        assert argv[1] == "--config_file" and (REPOSITORY / argv[2]).is_file()
    stage = {"train_global": TrainGlobalConfig, "train_local": TrainLocalConfig}
    draw = {"inference_global": InferenceGlobalConfig, "inference_local": InferenceLocalConfig}
    config_class = (stage | draw)[script.removesuffix(".sh")]
    flags = [str(REPOSITORY / f) if f.startswith("configs/") else f for f in argv[start + 1 :]]
    assert parse_config(config_class, flags).seed == 9
