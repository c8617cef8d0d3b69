"""Scores ELITE on a folder of concepts: draws every prompt for each, measures, reports.

    python evaluate.py                           the small world, judged by attributes, no download
    python evaluate.py --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --global_mapper_path global_mapper.pt --local_mapper_path local_mapper.pt \\
        --test_data_dir DREAMBENCH --prompts prompts_and_classes.txt --num_images 4 \\
        --protocol dreambench
    accelerate launch evaluate.py ...            the work shared among processes

OUTPUT_DIR receives the pictures, results.json, results.csv, results.md and contact sheets. A second
run draws only what is missing. Exit code 3: some concepts could not be read, the rest is scored.
"""

from pathlib import Path
from typing import Any

from elite.config import parse_config, to_dict
from elite.console import BAD_INPUT, OK, PARTLY_FAILED, complain, quiet_libraries, run
from elite.settings import EvaluateConfig


def main() -> int:
    config = parse_config(EvaluateConfig)
    quiet_libraries()
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from elite.files import check_apart, quick_digest
    from elite.inference import build_pipeline, drawing_of, model_metadata
    from evaluation.cases import draw_cases, make_cases, my_share, report, score_cases
    from evaluation.protocol import Setup, by_protocol
    from evaluation.subjects import read_prompts, read_subjects

    check_apart(config.output_dir, config.test_data_dir)
    prompts = read_prompts(config.prompts)
    subjects = read_subjects(config.test_data_dir, prompts.classes, config.class_word)
    seeds = range(config.seed, config.seed + config.num_images)
    cases = make_cases(subjects, prompts, seeds)
    pipe = build_pipeline(config, local_mapper=config.local_mapper_path)
    metrics = build_metrics(config, cases, pipe.device)
    output_dir, mine = Path(config.output_dir), my_share(cases)
    failures = draw_cases(
        pipe,
        mine,
        output_dir,
        drawing_of(config, config.words, config.llambda),
        batch_size=config.batch_size,
        metadata={"scheduler": config.scheduler, **model_metadata(config)},
    )
    # A subject that cannot be read may still have pictures of an earlier run: not scored.
    drawn = [case for case in mine if case.subject.name not in failures]
    rows, unmeasured = score_cases(drawn, output_dir, metrics)
    failures = dict(gather_object(list((failures | unmeasured).items())))
    rows = [row for row in gather_object(rows) if row["subject"] not in failures]
    cases = [case for case in cases if case.subject.name not in failures]
    if not PartialState().is_main_process:
        return OK  # the main process speaks for all
    for failure in failures.values():
        complain(failure)
    if not rows:
        if (earlier := output_dir / "results.json").exists():
            complain(f"{earlier}: is of an earlier run; nothing was scored in this one")
        return BAD_INPUT
    references = {
        subject.name: subject.measured_with(config.crop_references)
        for subject in subjects
        if subject.name not in failures
    }
    weights = {m.name: quick_digest([m.network.state_dict()]) for m in metrics}
    more: dict[str, Any] = {"references": references, "weights": weights}
    below = ""
    if config.protocol:
        setup = Setup(
            config.prompts,
            config.clip_name_or_path,
            config.dino_name_or_path,
            config.crop_references,
        )
        protocol, below = by_protocol(cases, rows, metrics, setup)
        more |= protocol
    print(report(cases, rows, output_dir, to_dict(config), more, below))
    print(f"more in {output_dir}; look at {output_dir / 'grid_00.png'} first")
    return PARTLY_FAILED if failures else OK


def build_metrics(config: EvaluateConfig, cases: list, device: Any) -> list:
    """The metrics that were asked for."""
    from evaluation.cases import ClipScores, DinoScores, references
    from evaluation.metrics import Clip, Dino
    from evaluation.protocol import METRICS
    from small_world.attributes import AttributeScores
    from small_world.classifier import load_judge

    read = references(config.crop_references)
    makers = {
        "clip": lambda: ClipScores(Clip(config.clip_name_or_path, device), read),
        "dino": lambda: DinoScores(Dino(config.dino_name_or_path, device), read),
        "attributes": lambda: AttributeScores(
            load_judge(Path(config.judge_path)).to(device), cases
        ),
    }
    return [makers[name]() for name in (METRICS if config.protocol else config.metrics)]


if __name__ == "__main__":
    run(main)
