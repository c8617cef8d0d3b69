"""The benchmarks: their arithmetic on made-up clocks, the page they write, and that they run."""

import json
import math
import shlex
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import (
    encoding,
    folder,
    generation,
    gpu,
    hardware,
    ladder,
    loader,
    memory,
    table,
    training,
)
from benchmarks.harness import RESULTS, Goal, Row, Table, alternate, default_output, spread, timed
from elite.console import BAD_INPUT, run
from elite.mappers import GlobalMapper
from elite.shards import open_source
from elite.speed import RUNGS

CPU = torch.device("cpu")


class Clock:
    """Every reading is the next of the given times."""

    def __init__(self, *times: float) -> None:
        self.times = iter(times)

    def __call__(self) -> float:
        return next(self.times)


# --- arithmetic -----------------------------------------------------------------------------------


def test_cases_take_turns():
    turns: list[str] = []

    def measure(name: str) -> float:
        turns.append(name)
        return len(turns)

    figures = alternate({name: partial(measure, name) for name in "AB"}, rounds=3)
    assert turns == ["A", "B"] * 3
    assert figures == {"A": [1, 3, 5], "B": [2, 4, 6]}


def test_timed_is_the_difference_of_two_readings():
    calls: list[int] = []
    measure = timed(lambda: calls.append(1), clock=Clock(10, 12.5, 20, 21))
    assert [measure(), measure()] == [2.5, 1]
    assert len(calls) == 2


def test_spread_is_median_and_quartiles():
    assert spread([5, 1, 2, 4, 3]) == (3, 2, 4)


def test_ratios_compare_the_same_round():
    """The machine slows down tenfold; the second case stays a quarter slower."""
    row = Row("drift", {"stock": [1.0, 10.0, 100.0], "ELITE": [1.25, 12.5, 125.0]})
    assert row.medians == {"stock": 10, "ELITE": 12.5}
    assert row.ratios == {"ELITE": (1.25, 1.25, 1.25)}


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("ELITE", 1.25), True),
        (Goal("ELITE", 1.24), False),
        (Goal("ELITE", 12, "least", "median"), True),
        (Goal("ELITE", 13, "least", "median"), False),
        (Goal("stock", 10, "most", "median"), True),
    ],
    ids=str,
)
def test_goals(goal, met):
    row = Row("drift", {"stock": [1.0, 10.0, 100.0], "ELITE": [1.25, 12.5, 125.0]})
    assert goal.met(row) == met


def test_a_step_lasts_from_the_end_of_the_first_to_the_end_of_the_last():
    unet = nn.Identity()

    def draw(num_inference_steps, callback_on_step_end):
        for step in range(num_inference_steps):
            unet(torch.zeros(1))
            callback_on_step_end(None, step, None, {})

    # Read at the start, before the UNet, after the first of four steps and after the last.
    times = generation.step_time(draw, unet, 4, CPU, Clock(100, 103, 110, 116))
    assert times == (2, 3, 0)
    assert not unet._forward_pre_hooks


def test_cross_attentions_are_timed_within_the_steps_that_count():
    attention = nn.Identity()
    unet = nn.Sequential(attention)

    def draw(num_inference_steps, callback_on_step_end):
        for step in range(num_inference_steps):
            unet(torch.zeros(1))
            callback_on_step_end(None, step, None, {})

    clock = Clock(0, 1, 1, 2, 3, 4, 6, 7, 9, 10)  # in and out at 1-2, 4-6 and 7-9
    assert generation.step_time(draw, unet, 3, CPU, clock, [attention]) == (3.5, 1, 2)
    assert not attention._forward_hooks and not attention._forward_pre_hooks


def test_the_stock_step_with_other_cross_attentions():
    attention = Row("a", {"stock": [2.0, 3.0], "ELITE": [2.5, 4.0]})
    step = Row("a", {"stock": [10.0, 20.0], "ELITE": [9.0, 30.0]})
    rounds = generation.stock_step_with(attention, step).rounds
    assert rounds == {"stock": [10.0, 20.0], "ELITE": [10.5, 21.0]}


def test_the_fused_attention_of_cpus_is_counted():
    """Twice, for Q K^T and for the product with V, a multiplication and an addition."""
    Q, heads, tokens, width = torch.randn(1, 3, 16, 8), 3, 16, 8
    counted = ladder.counted_flops(lambda: F.scaled_dot_product_attention(Q, Q, Q))
    assert counted == 2 * 2 * heads * tokens * tokens * width


def test_each_knob_of_the_rungs_is_measured_alone():
    alone = ladder.single_knobs()
    assert {name: str(speed) for name, speed in alone.items()} == {name: name for name in alone}
    assert all(len(name.split(", ")) == 1 for name in alone)
    of_rungs = {str(rung) for rung in RUNGS.values()}
    knobs = {part for rung in of_rungs for part in rung.split(", ") if part}
    does_nothing_alone = {knob for knob in knobs if knob.startswith("deep_first")}
    assert alone.keys() == knobs - of_rungs - does_nothing_alone


def test_needless_gradients_end_with_their_block():
    mapper = GlobalMapper(4, 4, 4, hidden_layers=[]).requires_grad_(False)
    levels = [torch.randn(1, 3, 4)]
    with torch.no_grad(), training.all_gradients(mapper):
        assert mapper(levels).requires_grad
    assert not mapper(levels).requires_grad


# --- the page -------------------------------------------------------------------------------------

PAGE = """# Costs

Prose above.

<!-- results: steps -->
old
<!-- end: steps -->

Prose between.

<!-- results: unmeasured -->
old
<!-- end: unmeasured -->

Prose below.
"""


def result(seconds: float, rounds: int = 5) -> dict:
    rows = [Row("512 px", {"stock": [2.0] * rounds, "ELITE": [seconds] * rounds})]
    return {
        "command": "python -m benchmarks.generation",
        "date": "2026-01-01",
        "commit": "abc",
        "machine": {"cpu": "a CPU", "cores": 2, "threads": 1, "gpu": None},
        "libraries": {"torch": "2"},
        "tables": [Table("Steps", "s", Goal("ELITE", 1.02), rows).to_dict()],
    }


def lines_of(seconds: float, rounds: int = 5) -> dict[str, list[str]]:
    return {"steps": table.result_lines(result(seconds, rounds))}


def test_the_page_keeps_its_prose():
    page = table.render(PAGE, lines_of(2.02))
    assert "old" not in page
    kept = ["# Costs\n\nProse above.\n\n<", ">\n\nProse between.\n\n<", ">\n\nProse below.\n"]
    assert [part in page for part in kept] == [True] * 3
    assert "<!-- results: unmeasured -->\n<!-- end: unmeasured -->" in page
    assert table.render(page, lines_of(2.02)) == page


@pytest.mark.parametrize(
    ("seconds", "rounds", "verdict"),
    [
        (2.02, 5, "met"),
        (2.2, 5, "**not met**"),
        (2.02, 4, "too few rounds"),
        (2.2, 4, "too few rounds"),
    ],
)
def test_a_row_says_whether_its_goal_is_met(seconds, rounds, verdict):
    page = table.render(PAGE, lines_of(seconds, rounds))
    (row,) = (line for line in page.splitlines() if line.startswith("| 512 px"))
    ratio = f"x {seconds / 2:.3f}, {seconds / 2:.3f} to {seconds / 2:.3f}"
    assert row == f"| 512 px | 2 | {seconds} ({ratio}) | ELITE at most x 1.02 | {verdict} |"


def test_new_results_get_a_section():
    page = table.with_sections(PAGE, ["bf16"])
    assert page.startswith(PAGE.partition("<")[0])
    assert page.rstrip().endswith("<!-- end: bf16 -->") and "\n## bf16\n" in page


def test_a_section_may_show_some_rows():
    """Those whose first cell matches as a whole; head and other sections stay."""
    marked = "<!-- results: {}{} -->\n<!-- end: {} -->\n"
    page = marked.format("score", ", rows: .*w0|its .*", "score") + marked.format("a", "", "a")
    lines = ["| % | body |", "|---|---|", "| its colours | 1 |", "| w0 | 2 |", "| w0, new | 3 |"]
    shown = table.render(page, {"score": lines, "a": lines})
    first, second = shown.split("<!-- end: score -->")
    assert first.splitlines()[2:-1] == lines[:-1] and second.splitlines()[3:-2] == lines
    assert table.render(shown, {"score": lines, "a": lines}) == shown


def test_table_script(tmp_path):
    results, pages = tmp_path / "results", [tmp_path / "page.md", tmp_path / "other.md"]
    results.mkdir()
    pages[0].write_text(PAGE)
    pages[1].write_text("Other.\n\n<!-- results: told -->\nold\n<!-- end: told -->\n")
    (results / "steps.json").write_text(json.dumps(result(2)))
    (results / "told.md").write_text("| a |\n|---|\n| 1 |\n")
    (results / "more.md").write_text("| b |\n|---|\n| 2 |\n")
    arguments = ["--results", str(results), "--pages", *map(str, pages)]
    assert table.main(arguments) == 0
    page, other = (page.read_text() for page in pages)
    assert "**Steps** (s)" in page and "| 1 |" not in page
    assert "\n## more\n" in page and "| 2 |" in page, "what no page shows"
    assert (
        other == "Other.\n\n<!-- results: told -->\n\n| a |\n|---|\n| 1 |\n\n<!-- end: told -->\n"
    )
    for damaged in ("{", "{}", "[]", '{"tables": [{}]}', '{"tables": [], "machine": []}'):
        (results / "steps.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"steps\.json: not a file of results"):
            table.main(arguments)


def test_the_pages_show_what_was_measured():
    """`python -m benchmarks.table` brings them up to date."""
    results, names = table.read_results(table.RESULTS), set()
    for name in table.PAGES:
        page = (table.REPOSITORY / name).read_text(encoding="utf-8")
        assert table.render(page, results) == page, name
        names |= {match["name"] for match in table.SECTION.finditer(page)}
    expected = "generation ladder hardware encoding training loader folder gpu score reproduce"
    assert names >= {*expected.split(), *results}


def test_tiny_figures_stay_out_of_the_page():
    assert default_output("gpu", "full").parent == table.RESULTS
    assert default_output("gpu", "tiny").parent != table.RESULTS


# --- they run -------------------------------------------------------------------------------------


def tables_of(path: Path) -> dict[str, dict]:
    """Tables of a file of results by title, after a look at their figures."""
    results = json.loads(path.read_text())
    assert {"command", "date", "commit", "machine", "libraries", "settings"} <= results.keys()
    tables = {measured["title"]: measured for measured in results["tables"]}
    for row in (row for measured in tables.values() for row in measured["rows"]):
        figures = [figure for rounds in row["rounds"].values() for figure in rounds]
        assert all(math.isfinite(figure) and figure >= 0 for figure in figures), row
    return tables


def in_this_process(measure, *given) -> dict[str, float]:
    """What is measured, but for memory: a process that is not fresh may also give some back."""
    return {kind: max(figure, 1.0) for kind, figure in measure(*given).items()}


def test_ladder_runs(tmp_path):
    path = tmp_path / "ladder.json"
    arguments = ["--rounds", "1", "--steps", "5", "--device", "cpu", "--output", str(path)]
    assert ladder.main(arguments) == 0
    tables = tables_of(path)
    assert len(tables) == 5
    assert [tables[f"Time of a whole picture, {rung}"]["goal"]["limit"] for rung in RUNGS] == [
        *(1.02, 0.5, 0.3)
    ]
    work = tables["Work of a whole picture"]["rows"][0]["medians"]
    assert list(work) == [ladder.STOCK, *ladder.CASES]
    assert work["fast"] < work["balanced"] < work["exact"]
    assert all(work[rung] < work[case] for case in ladder.single_knobs() for rung in ("fast",))
    assert work[ladder.STOCK] < work["exact"] < work[ladder.STOCK_DEFAULT]


def test_hardware_runs(tmp_path, monkeypatch):
    """In this process."""
    monkeypatch.setattr(memory, "in_fresh_process", in_this_process)
    path = tmp_path / "hardware.json"
    cases = ["plain", "low_memory, fp8_weights"]
    arguments = ["--rounds", "1", "--cases", *cases, "--device", "cpu", "--output", str(path)]
    assert hardware.main(arguments) == 0
    tables = tables_of(path)
    assert len(tables) == 3
    for measured in tables.values():
        (row,) = measured["rows"]
        assert list(row["medians"]) == cases and measured["goal"] is None


@pytest.mark.parametrize("size", ["tiny", "tiny_xl"])
def test_generation_runs(size, tmp_path):
    path = tmp_path / "generation.json"
    arguments = [
        "--size",
        size,
        "--rounds",
        "2",
        "--steps",
        "2",
        "--batch_sizes",
        "1",
        "--resolutions",
        "64",
    ]
    arguments += ["--memory_rounds", "0", "--device", "cpu", "--output", str(path)]
    assert generation.main(arguments) == 0
    tables = tables_of(path)
    assert len(tables) == 5
    whole = tables["Time of a denoising step, by pictures a batch"]["rows"][0]["medians"]
    part = tables["Time of a step in its cross-attentions"]["rows"][0]["medians"]
    assert all(0 < part[case] < whole[case] for case in generation.CASES)
    (row,) = tables["Time of a denoising step, by resolution, one picture"]["rows"]
    assert list(row["rounds"]) == list(generation.CASES)
    assert all(len(rounds) == 2 for rounds in row["rounds"].values())


def test_the_cases_of_generation_are_what_they_say():
    """Stock draws something else than ELITE; K and V at each step change nothing."""
    pipes = generation.Pipelines("tiny", CPU, torch.float32, "dpm++", compiled=False)
    seen: dict[str, torch.Tensor] = {}

    def keep(case, pipe, step, timestep, tensors):
        seen[case] = tensors["latents"]
        return tensors

    for case in generation.CASES:
        options = {"num_inference_steps": 2, "callback_on_step_end": partial(keep, case)}
        with pipes.ready(case):
            pipes.draw(case, 64, 1, **options)
    stock, elite, each_step = (seen[case] for case in generation.CASES)
    assert torch.isfinite(stock).all()
    assert (stock - elite).abs().max() > 1e-3
    torch.testing.assert_close(elite, each_step, rtol=1e-5, atol=1e-6)  # another order of sums


def test_folder_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(folder.PAIRS_DRAWN, "tiny", 2)
    monkeypatch.setitem(folder.STEPS, "tiny", 2)
    path = tmp_path / "folder.json"
    arguments = ["--rounds", "1", "--batch_sizes", "1", "2", "--device", "cpu"]
    assert folder.main([*arguments, "--output", str(path)]) == 0
    (measured,) = tables_of(path).values()
    assert list(measured["rows"][0]["rounds"]) == ["batch 1", "batch 2"]


def test_encoding_runs(tmp_path):
    path = tmp_path / "encoding.json"
    assert encoding.main(["--rounds", "1", "--device", "cpu", "--output", str(path)]) == 0
    (measured,) = tables_of(path).values()
    cases = ["two CLIP passes", "encode_concept", "views", "mappers", "Concept.load"]
    assert list(measured["rows"][0]["rounds"]) == cases
    assert json.loads(path.read_text())["bytes_of_a_concept"] > 0


def test_loader_runs(tmp_path, monkeypatch):
    """In this process."""
    monkeypatch.setattr(memory, "in_fresh_process", in_this_process)
    path = tmp_path / "loader.json"
    arguments = ["--rounds", "1", "--count", "6", "--shard_rows", "9000", "--output", str(path)]
    assert loader.main(arguments) == 0
    tables = tables_of(path)
    for title in ("Samples a second of CPU time, one core", loader.SHARD_RATES):
        rows = tables[title]["rows"]
        assert [row["name"] for row in rows] == ["stage 1, boxes", "stage 2, masks"]
    (waits,) = tables[loader.SERVED_EPOCH]["rows"]
    assert 0 < waits["medians"][loader.FIRST] < waits["medians"][loader.EPOCH]
    assert waits["medians"][loader.LATER] > 0, "one window holds all shards"


def test_the_index_of_simulated_shards_is_that_of_shards(tmp_path):
    loader.write_shard_index(tmp_path, 9000)
    source = open_source(tmp_path)
    image_ids, boxes = source.boxes()
    assert len(boxes) == 9000 and source.shards_of(image_ids).sizes.tolist() == [8000, 1000]


def test_a_slow_server_sends_whole_files_at_its_pace(tmp_path, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    content = bytes(range(256)) * 1200  # two blocks
    (tmp_path / "a.tar").write_bytes(content)
    with loader.served_slowly(tmp_path) as url, urlopen(f"{url}/a.tar") as answer:
        assert answer.read() == content
    assert sum(slept) == pytest.approx(len(content) / 100e6)


def test_a_stage_without_a_case_has_no_row():
    only = "+ cached latents"  # of stage 1
    args = training.parse_args(["--stages", "local", "--cases", only, "--memory_rounds", "1"])
    assert [table.rows for table in training.tables(args, CPU)] == [[], []]


def test_every_training_case_steps():
    trainer = training.Trainer("local", "tiny", CPU, 1)
    weights = {name: p.detach().clone() for name, p in trainer.objective.named_parameters()}
    for measures in training.CASES.values():
        if not measures.compiled:
            with trainer.under(measures):
                trainer.step(measures)
    for name, parameter in trainer.objective.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.is_contiguous()
        assert parameter.requires_grad == name.startswith("local_mapper"), name
    moved = trainer.objective.local_mapper.mapping_0[0].weight
    assert not torch.equal(moved, weights["local_mapper.mapping_0.0.weight"])


def test_what_is_frozen_in_bf16_never_is_in_float32():
    """As SDXL's sizes need it."""
    cases = ["+ bf16, frozen in bf16", "+ bf16, checkpointing"]
    trainer = training.make_trainer("global", "tiny_xl", CPU, 1, cases)
    mapper = trainer.objective.global_mapper
    before = mapper.mapping_0[0].weight.detach().clone()
    for case in cases:
        with trainer.under(training.CASES[case]):
            trainer.step(training.CASES[case])
        for parameter in trainer.objective.parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert not torch.equal(mapper.mapping_0[0].weight, before)
    trainer = training.make_trainer("global", "tiny_xl", CPU, 1, ["plain", *cases])
    assert all(parameter.dtype == torch.float32 for parameter in trainer.objective.parameters())


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (generation.main, ["--rounds", "0"], "--rounds 0: expected 1 or more"),
        (generation.main, ["--steps", "1"], "--steps 1: expected 2 or more"),
        (loader.main, ["--count", "1"], "--count 1: expected 4 or more"),
        (loader.main, ["--output", "/dev/null/x/y.json"], "/dev/null/x: cannot be written"),
        (table.main, ["--pages", "nowhere.md"], "nowhere.md: no such file"),
        (table.main, ["--results", "nowhere"], "nowhere: no results in it"),
        (folder.main, ["--output", "/tmp"], "/tmp: is a folder; expected the name of a file"),
    ],
    ids=lambda x: x.__module__ if callable(x) else str(x),
)
def test_a_mistake_is_one_line(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        run(partial(main, arguments))
    assert exit.value.code == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.timeout(900)
def test_gpu_runs_at_the_tiny_size_on_a_cpu(tmp_path, monkeypatch):
    """Everything but what is compiled, memory in this process, two of the cases of training (others
    take minutes where bf16 is emulated)."""
    monkeypatch.setattr(memory, "in_fresh_process", in_this_process)
    two = {name: training.CASES[name] for name in (training.PLAIN, training.BEST)}
    monkeypatch.setattr(gpu, "CASES", two)
    monkeypatch.setattr(gpu, "DEFAULT_STEPS", 5)
    arguments = ["--eager", "--dtypes", "fp32", "--batch_sizes", "1", "--rounds", "1"]
    arguments += ["--steps", "2", "--output", str(tmp_path / "gpu.json")]
    assert gpu.main(arguments) == 0
    tables = tables_of(tmp_path / "gpu.json")
    assert list(tables) == [
        "Time of a denoising step",
        "Rate of a denoising step",
        "Time before the first step: text, and K and V once",
        *(f"Time of a whole picture, {rung}" for rung in RUNGS),
        "Work of a whole picture",
        "Peak memory of a whole picture, loaded models included",
        "Peak memory of a whole picture above the resting level",
        "Time of a whole picture in little memory and with other kernels",
        "Time of a training step, stage 1",
        "Time of a training step, stage 2",
        "Peak memory of training above the loaded models",
        "Peak memory of training, loaded models included",
    ]
    cases = list(tables["Time of a whole picture in little memory and with other kernels"]["rows"])
    assert [list(row["medians"]) for row in cases] == [
        [case for case in hardware.CASES if case != "compile"]
    ] * 2


def test_gpu_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        run(partial(gpu.main, ["--size", "full"]))
    assert exit.value.code == BAD_INPUT
    assert capsys.readouterr().err == (
        "error: no CUDA device here; run this on a machine with an NVIDIA GPU\n"
    )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_command_under_a_table_measures_that_table(path, monkeypatch):
    """Cases that hold blanks stood there without quotes."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.chdir(RESULTS.parents[1])
    found = json.loads(path.read_text(encoding="utf-8"))
    _, _, module, *argv = shlex.split(found["command"])
    args = import_module(module).parse_args(argv)
    assert args.output.resolve() == path
    assert args.command == found["command"]
