"""The judge: a small classifier says what pictures of the small world show, and so scores models.

    python -m small_world.judge train [--work_dir runs/small_world]
    python -m small_world.judge score --report FILE.json [--model checkpoints/small_world]

`train` leaves its run in WORK_DIR/judge and the weights, fp16, in checkpoints/small_world_judge,
where `score` finds them. `score` prints a Markdown table of accuracies with 95 % intervals (Wilson)
and writes it as JSON: the judge itself on fresh renders, the base model on prompts, and ELITE on
held-out things, each encoded from one render and drawn in another scene. Exit code 2: bad input.
"""

import argparse
from pathlib import Path

from elite.console import OK, quiet_libraries, run

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


def train(args: argparse.Namespace) -> None:
    import torch

    from small_world.classifier import load_judge, train_judge
    from small_world.score import markdown, score_judge

    torch.manual_seed(0)
    train_judge(args.work_dir, args.target)
    print(markdown(score_judge(load_judge(args.target))))


def score(args: argparse.Namespace) -> None:
    from elite.files import write_json
    from small_world.classifier import load_judge
    from small_world.score import load_pipelines, markdown, score_model

    judge = load_judge(args.judge)
    base, elite = load_pipelines(args.model, args.global_mapper_path, args.local_mapper_path)
    if elite is None:
        print(f"{args.model}: has no global_mapper/, so ELITE is left out")
    options = {
        name: getattr(args, name) for name in ("guidance_scale", "num_inference_steps", "seed")
    }
    scores = score_model(
        judge, base, elite, samples=args.samples, batch_size=args.batch_size, **options
    )
    about = {"model": str(args.model), "scheduler": "dpm++", "samples": args.samples}
    write_json(args.report, {**about, **options, "rows": scores})
    print(markdown(scores))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="train | score")
    train_parser = commands.add_parser("train", help="train the judge on the pretraining renders")
    train_parser.add_argument("--work_dir", type=Path, default=Path("runs/small_world"))
    train_parser.add_argument(
        "--target",
        type=Path,
        default=CHECKPOINTS / "small_world_judge",
        help="where the fp16 weights go",
    )
    train_parser.set_defaults(act=train)
    score_parser = commands.add_parser("score", help="judge a model")
    score_parser.add_argument("--model", type=Path, default=CHECKPOINTS / "small_world")
    score_parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    score_parser.add_argument("--samples", type=int, default=500, help="pictures a row")
    score_parser.add_argument("--seed", type=int, default=0)
    score_parser.add_argument("--guidance_scale", type=float, default=5.0)
    score_parser.add_argument("--num_inference_steps", type=int, default=20)
    score_parser.add_argument("--batch_size", type=int, default=25)
    score_parser.add_argument(
        "--global_mapper_path", help="None: global_mapper/ in the model folder"
    )
    score_parser.add_argument("--local_mapper_path", help="None: local_mapper/ in the model folder")
    score_parser.add_argument(
        "--judge", type=Path, default=CHECKPOINTS / "small_world_judge", help="folder of the judge"
    )
    score_parser.set_defaults(act=score)
    args = parser.parse_args(arguments)
    for name in ("samples", "batch_size", "num_inference_steps"):
        if getattr(args, name, 1) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected 1 or more")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    quiet_libraries()
    args.act(args)
    return OK


if __name__ == "__main__":
    run(main)
