"""What a run finds in its folder when it starts: damaged checkpoints, other settings, another run,
a full disk."""

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from elite import run_folder
from elite.config import read_yaml, to_dict
from elite.run_folder import LOCK, RunFolder
from elite.run_state import HASHES, MAY_CHANGE, check_settings, checkpoints, fault
from elite.settings import TextualInversionConfig, TrainGlobalConfig, TrainLocalConfig
from elite.training import make_accelerator
from tests.conftest import forget_accelerate
from tests.faults.runs import leftovers, metrics, outcome
from tests.faults.toy import Numbers, train

FILES = ("weights.safetensors", "training_state.pt", "config.json", HASHES)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"truncated": truncate, "bit flipped": flip_a_bit, "deleted": os.unlink}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """The folder of a run that has ended after step 5 of 6."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "toy.safetensors").unlink()
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damaged_newest_checkpoint_is_passed_over(file, damage, stopped, whole, capfd):
    DAMAGES[damage](stopped / "checkpoint-5" / file)
    assert fault(stopped / "checkpoint-5") is not None
    assert fault(stopped / "checkpoint-4") is None
    train(stopped, resume="latest")
    said = capfd.readouterr().out
    assert "checkpoint-5: " in said and "using the one before" in said
    assert outcome(stopped) == outcome(whole)


def test_checkpoint_without_files_is_passed_over(stopped, whole):
    shutil.rmtree(stopped / "checkpoint-5")
    (stopped / "checkpoint-5").mkdir()
    train(stopped, resume="latest")
    assert outcome(stopped) == outcome(whole)


def test_no_whole_checkpoint_is_an_error(stopped):
    for checkpoint in checkpoints(stopped):
        truncate(checkpoint / "weights.safetensors")
    with pytest.raises(ValueError, match="none of 5 checkpoints is whole"):
        train(stopped, resume="latest")


def test_damaged_checkpoint_is_not_resumed_from_by_name(stopped):
    flip_a_bit(stopped / "checkpoint-5" / "training_state.pt")
    with pytest.raises(ValueError, match=r"not a whole checkpoint, training_state\.pt is damaged"):
        train(stopped, resume="checkpoint-5")


def test_limit_never_removes_the_last_whole_checkpoint(stopped, capfd):
    """Newer ones are damaged, the run goes on from an old one and saves between."""
    for step in (4, 5):
        truncate(stopped / f"checkpoint-{step}" / "weights.safetensors")
    train(stopped, resume="latest", max_steps=4, save_steps=4, checkpoints_total_limit=1)
    assert [p.name for p in checkpoints(stopped)] == ["checkpoint-4", "checkpoint-5"]
    assert fault(stopped / "checkpoint-4") is None


def test_limit_removes_nothing_while_the_newest_is_damaged(tmp_path, monkeypatch, capfd):
    train(tmp_path, max_steps=2)
    monkeypatch.setattr("elite.run_folder.seal", lambda folder: (folder / HASHES).write_text("{"))
    train(tmp_path, max_steps=3, resume="latest", checkpoints_total_limit=1)
    assert [p.name for p in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert "older checkpoints are kept" in capfd.readouterr().out


# --- settings -------------------------------------------------------------------------------------


def test_folder_of_other_settings_is_refused_with_the_keys(tmp_path):
    config = {"seed": 1, "resolution": 64, "save_steps": 1, "output_dir": "a"}
    train(tmp_path, max_steps=2, config=config)
    before = outcome(tmp_path), (tmp_path / "config.yaml").read_text()
    other = {"seed": 2, "resolution": 32, "save_steps": 5, "output_dir": "b"}
    for resume in ("latest", None):
        with pytest.raises(ValueError, match="holds a run of other settings") as caught:
            train(tmp_path, config=other, resume=resume)
        assert "resolution is 64 there, 32 here; seed is 1 there, 2 here" in str(caught.value)
        assert "save_steps" not in str(caught.value) and "\n" not in str(caught.value)
    assert before == (outcome(tmp_path), (tmp_path / "config.yaml").read_text())
    train(tmp_path, config={**config, "save_steps": 5}, resume="latest", max_steps=3)
    branch = tmp_path / "branch"
    train(branch, config=other, resume=str(tmp_path / "checkpoint-2"), max_steps=3)
    assert [line["step"] for line in metrics(branch)] == [3]


def test_a_branch_learns_at_its_own_rate(tmp_path):
    """The checkpoint's would stay otherwise, while config.yaml named the new one."""
    usual = {"lr_scheduler": "linear", "ema_decay": 0.9}
    train(tmp_path / "a", max_steps=4, learning_rate=1e-2, weight_decay=0.1, **usual)
    branch = {"max_steps": 4, "resume": str(tmp_path / "a" / "checkpoint-2"), **usual}
    train(tmp_path / "b", learning_rate=1e-3, **branch)
    assert [line["lr"] for line in metrics(tmp_path / "b")] == pytest.approx([5e-4, 2.5e-4])
    train(tmp_path / "c", learning_rate=1e-2, weight_decay=0.1, **branch)
    assert metrics(tmp_path / "c") == metrics(tmp_path / "a")[2:], "one that changes nothing"
    others = {"learning_rate": 1e-2, "own_rates": {"linear.bias": 1e-3}}
    with pytest.raises(ValueError, match="checkpoint-2: checkpoint with other weights learning at"):
        train(tmp_path / "d", **branch, **others)


def test_only_what_is_named_as_a_checkpoint_is_one(tmp_path):
    train(tmp_path, max_steps=2)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-good-1")
    (tmp_path / "checkpoint-\N{SUPERSCRIPT TWO}").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]


def test_other_number_of_samples_per_step_is_refused(tmp_path):
    train(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="samples_per_step is 4 there, 8 here"):
        train(tmp_path, resume="latest", accumulation=2)
    train(tmp_path, resume="latest", accumulation=2, batch_size=2)


def test_starting_anew_does_not_overwrite_a_run(tmp_path):
    train(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="holds 2 steps of such a run; go on with --resume_from"):
        train(tmp_path)
    assert len(metrics(tmp_path)) == 2


def test_settings_that_may_change_exist():
    kinds = (TrainGlobalConfig, TrainLocalConfig, TextualInversionConfig)
    assert {item.name for kind in kinds for item in fields(kind)} >= MAY_CHANGE


def test_stage_of_elite_is_held_to_what_it_learns(tmp_path):
    """E.g. seed, learning rate and data; but no setting of how it runs."""
    config = TrainGlobalConfig(pretrained_model_name_or_path="m", train_data_dir="d")
    train(tmp_path, max_steps=1, config=to_dict(config))
    held = set()
    for name, value in to_dict(config).items():
        try:
            check_settings(tmp_path, {**to_dict(config), name: [value]}, resumes=True)
        except ValueError:
            held.add(name)
    assert held == to_dict(config).keys() - MAY_CHANGE
    assert {"seed", "learning_rate", "train_data_dir", "lr_scheduler", "ema"} <= held


def test_latest_is_of_the_try_that_went_on(whole, tmp_path, capfd):
    """The run went back from step 6 to 2 and on to 4: checkpoints 5 and 6 are of the try before."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    train(folder, resume="checkpoint-2", max_steps=4)
    capfd.readouterr()
    train(folder, resume="latest")
    said = capfd.readouterr().out
    for step in (5, 6):
        assert f"checkpoint-{step}: is of an earlier try; the run has since gone back" in said
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert outcome(folder) == outcome(whole)


def test_other_data_of_the_same_name_are_refused(stopped):
    with pytest.raises(ValueError, match="dataset_size is 100 there, 99 here"):
        train(stopped, Numbers(99), resume="latest")


def test_what_a_run_is_held_to_besides_its_settings(tmp_path):
    train(tmp_path, held={"global_mapper": "one"}, max_steps=1)
    with pytest.raises(ValueError, match="global_mapper is 'one' there, 'two' here"):
        train(tmp_path, held={"global_mapper": "two"}, resume="latest")


def test_a_branch_counts_bad_samples_anew(tmp_path):
    train(tmp_path / "one", Numbers(100, bad=range(4)), max_steps=25, save_steps=0)
    assert metrics(tmp_path / "one")[-1]["unreadable"] >= 4
    train(tmp_path / "two", resume=str(tmp_path / "one/checkpoint-25"), max_steps=26)
    assert "unreadable" not in metrics(tmp_path / "two")[-1]


def test_a_schedule_that_begins_anew_is_told(tmp_path, capfd):
    train(tmp_path, lr_scheduler="linear")
    assert "learning rate" not in capfd.readouterr().out
    train(tmp_path, lr_scheduler="linear", resume="latest", max_steps=12)
    told = "learning rate 0.005 at step 6, where the checkpoint's schedule had 0: another rate"
    assert told in capfd.readouterr().out


def test_the_saved_settings_do_not_lead_back(tmp_path):
    config = {"seed": 0, "resume_from_checkpoint": "elsewhere"}
    train(tmp_path, config=config, max_steps=1)
    assert read_yaml(tmp_path / "config.yaml") == {"seed": "0"}


# --- another run ----------------------------------------------------------------------------------

HOLD = """
import sys, pathlib
from elite.files import sole_writer
with sole_writer(pathlib.Path(sys.argv[1]), "trains"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_second_run_into_a_folder_is_refused(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / LOCK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        message = rf"another process \({holder.pid}\) trains into it; wait.*another --output_dir"
        with pytest.raises(ValueError, match=message):
            train(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [LOCK], "the second run has written"
    finally:
        holder.kill()
        holder.wait()
    train(tmp_path)  # the lock went with the process


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path):
    half = tmp_path / ".checkpoint-7.4711.tmp"
    half.mkdir()
    (half / "weights.safetensors").write_text("half")
    (tmp_path / ".metrics.4711.tmp.jsonl").write_text("half")
    (tmp_path / ".mine").write_text("kept")
    previews = tmp_path / "previews"
    previews.mkdir()
    (previews / ".1.4711.tmp.png").write_text("half")
    assert len(leftovers(tmp_path)) == 2 and len(leftovers(previews)) == 1
    train(tmp_path)
    assert (tmp_path / ".mine").exists() and not leftovers(tmp_path) and not leftovers(previews)


# --- a full disk ----------------------------------------------------------------------------------


def test_file_that_cannot_grow_keeps_the_last_checkpoint(tmp_path, whole):
    train(tmp_path, max_steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot be written \(.*\); free some space"):
            train(tmp_path, resume="latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [fault(p) for p in checkpoints(tmp_path)] == [None, None]
    assert not leftovers(tmp_path)
    train(tmp_path, resume="latest")
    assert outcome(tmp_path) == outcome(whole)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 96 kB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_stops_the_run_with_the_last_checkpoint_intact(small_disk, whole):
    with pytest.raises(ValueError, match=r"cannot be written \(.*\); free some space") as caught:
        train(small_disk)
    assert "\n" not in str(caught.value)
    kept = checkpoints(small_disk)
    assert kept and {fault(checkpoint) for checkpoint in kept} == {None}
    assert not leftovers(small_disk)
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    train(small_disk, resume="latest")
    assert outcome(small_disk) == outcome(whole)


def test_a_linked_checkpoint_is_pruned_and_its_target_stays(stopped, tmp_path):
    """It ended the run in a traceback, and every later one in the same folder."""
    elsewhere = tmp_path / "elsewhere"
    (stopped / "checkpoint-1").rename(elsewhere)
    (stopped / "checkpoint-1").symlink_to(elsewhere)
    train(stopped, resume="latest", checkpoints_total_limit=2)
    assert not (stopped / "checkpoint-1").is_symlink() and fault(elsewhere) is None
    assert not list(stopped.glob(".*"))


def test_a_linked_checkpoint_of_the_run_is_no_branch(tmp_path):
    """What the run had counted began anew."""
    data, run = Numbers(100, bad=range(4)), tmp_path / "run"
    train(tmp_path / "whole", data, max_steps=40, save_steps=20)
    train(run, data, max_steps=20, save_steps=20)
    (run / "checkpoint-20").rename(tmp_path / "checkpoint-20")
    (run / "checkpoint-20").symlink_to(tmp_path / "checkpoint-20")
    train(run, data, max_steps=40, save_steps=20, resume="latest")
    assert metrics(run) == metrics(tmp_path / "whole")


def test_only_the_main_process_looks_into_the_folder(stopped, monkeypatch):
    """That of another node may hold a run of its own."""
    forget_accelerate()
    accelerator = make_accelerator("no", cpu=True)
    options = {"dataset": Numbers(100), "samples_per_step": 8, "config": {}, "held": {}}
    run = RunFolder(stopped, "logs", accelerator, **options)
    run.is_main = False
    monkeypatch.setattr(run_folder, "broadcast_object_list", lambda found: None)
    assert run.start(None, None, 6) == 0
    run.is_main = True
    with pytest.raises(ValueError, match="a run of other settings: samples_per_step is 4 there"):
        run.start(None, None, 6)


def test_precision_is_held_by_what_it_came_to(tmp_path):
    """A run begun with `auto` could not go on with the precision that it ran in."""
    train(tmp_path, max_steps=2, config={"mixed_precision": "auto"})
    train(tmp_path, max_steps=3, config={"mixed_precision": "no"}, resume="latest")
