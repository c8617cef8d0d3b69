"""The judge: a small classifier says what pictures of the small world show, and so scores models.

    python -m small_world.judge train [--work_dir runs/small_world] [--scale 1]
    python -m small_world.judge score --report FILE.json [--model checkpoints/small_world]
    python -m small_world.judge couples --output_dir FOLDER [--model checkpoints/small_world]
    python -m small_world.judge art ART_FOLDER --output_dir FOLDER [--held_out] [--model MODEL]

`train` leaves its run in WORK_DIR/judge and the weights, fp16, in checkpoints/small_world_judge,
where `score` finds them. `score` prints a Markdown table of accuracies with 95 % intervals (Wilson;
of parts a bootstrap over critters) and writes it as JSON: the judge itself on fresh renders, the
base model on prompts, and ELITE on held-out critters, each encoded from one render and drawn in
another scene. `couples` draws two concepts side by side and tells whose colour each half shows,
with and without regions (couples.md, couples.json, grid.png). `art` draws other people's things
(see `small_world.art`; art.md, art.json, grid.png). Exit code 2: bad input.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from elite.console import OK, check_least, quiet_libraries, run, script_parser
from elite.files import check_writable, check_writable_file
from small_world.flags import JUDGE, add_drawing, add_scale, check_drawing, scaled

if TYPE_CHECKING:
    from PIL import Image

JUDGED = 2000  # renders of each kind that tell how good the judge is


def train(args: argparse.Namespace) -> None:
    import torch

    from small_world.classifier import load_judge, train_judge
    from small_world.score import markdown, score_judge

    torch.manual_seed(0)
    train_judge(args.work_dir, args.target, args.scale)
    print(markdown(score_judge(load_judge(args.target), scaled(JUDGED, args.scale))))


def score(args: argparse.Namespace) -> None:
    from elite.files import write_json, write_text
    from small_world.classifier import load_judge
    from small_world.score import load_base, load_elite, markdown, score_model

    judge = load_judge(args.judge)
    if args.global_mapper_path or (args.model / "global_mapper").is_dir():
        elite = load_elite(args.model, args.global_mapper_path, args.local_mapper_path)
    else:
        elite = None
        print(f"{args.model}: has no global_mapper/, so ELITE is left out")
    options = {
        name: getattr(args, name) for name in ("guidance_scale", "num_inference_steps", "seed")
    }
    scores = score_model(
        judge,
        load_base(args.model),
        elite,
        samples=args.samples,
        batch_size=args.batch_size,
        **options,
    )
    about = {"model": str(args.model), "scheduler": "dpm++", "samples": args.samples}
    write_json(args.report, {**about, **options, "rows": scores})
    write_text(args.report.with_suffix(".md"), markdown(scores) + "\n")
    print(markdown(scores))


def couples(args: argparse.Namespace) -> None:
    from small_world.classifier import load_judge
    from small_world.couples import halves_of, make_couples, markdown, score_couples, sheet
    from small_world.score import load_elite

    elite = load_elite(args.model, args.global_mapper_path, args.local_mapper_path)
    options = {name: getattr(args, name) for name in ("guidance_scale", "num_inference_steps")}
    pairs = make_couples(args.samples, args.seed)
    judge = load_judge(args.judge).to(elite.device)
    outcomes, pictures = score_couples(
        judge, elite, pairs, args.batch_size, lambda_=args.llambda, **options
    )
    about = {"model": str(args.model), "scheduler": "dpm++", "samples": args.samples}
    about |= {"seed": args.seed, "lambda": args.llambda, **options, "halves": halves_of(outcomes)}
    _report(args.output_dir / "couples", about, markdown(outcomes), sheet(pairs, pictures))


def art(args: argparse.Namespace) -> None:
    from small_world.art import ASKED, art_rows, make_art_tasks, score_art, sheet
    from small_world.classifier import load_judge
    from small_world.score import load_base, load_elite, markdown

    tasks = make_art_tasks(args.art, args.samples, args.seed, args.held_out or None)
    base = load_base(args.model)
    elite = load_elite(args.model, args.global_mapper_path, args.local_mapper_path)
    options = {name: getattr(args, name) for name in ("guidance_scale", "num_inference_steps")}
    rows = art_rows(base, elite, tasks, **options)
    judge = load_judge(args.judge).to(base.device)
    scores, pictures = score_art(judge, rows, tasks, args.batch_size)
    about = {"model": str(args.model), "art": str(args.art), "samples": len(tasks)}
    about |= {"held_out": args.held_out, "seed": args.seed, **options, "rows": scores}
    _report(args.output_dir / "art", about, markdown(scores, ASKED), sheet(tasks, pictures))


def _report(path: Path, content: dict, text: str, grid: "Image.Image") -> None:
    """Writes PATH.json, PATH.md and grid.png beside them, and shows the text."""
    from elite.files import write_atomically, write_json, write_text

    write_json(path.with_suffix(".json"), content)
    write_text(path.with_suffix(".md"), text)
    write_atomically(path.with_name("grid.png"), grid.save)
    print(text)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="train | score | couples | art")
    train_parser = commands.add_parser(
        "train", help="render critters of all kinds and train the judge"
    )
    train_parser.add_argument("--work_dir", type=Path, default=Path("runs/small_world"))
    train_parser.add_argument(
        "--target", type=Path, default=JUDGE, help="where the fp16 weights go"
    )
    add_scale(train_parser)
    train_parser.set_defaults(act=train)
    score_parser = commands.add_parser("score", help="judge a model")
    score_parser.add_argument(
        "--report", type=Path, required=True, help="JSON file; the table beside it"
    )
    _add_models(score_parser, samples=500)
    score_parser.set_defaults(act=score)
    couples_parser = commands.add_parser("couples", help="judge two concepts in one picture")
    couples_parser.add_argument("--output_dir", type=Path, default=Path("runs/small_world/couples"))
    couples_parser.add_argument("--llambda", type=float, default=0.8, help="of both local branches")
    _add_models(couples_parser, samples=200)
    couples_parser.set_defaults(act=couples)
    art_parser = commands.add_parser("art", help="judge things that are no critters")
    art_parser.add_argument("art", type=Path, help="folder of PNGs with transparency")
    art_parser.add_argument("--output_dir", type=Path, default=Path("runs/small_world/art"))
    art_parser.add_argument(
        "--held_out", action="store_true", help="only what small_world.large never trains on"
    )
    _add_models(art_parser, samples=300)
    art_parser.set_defaults(act=art)
    args = parser.parse_args(arguments)
    if args.act is not train:
        check_drawing(args)
    if args.act is couples:
        check_least(args, llambda=0)
    if args.act is score:
        check_writable_file(args.report)
    for name in ("work_dir", "target", "output_dir"):
        if (written := getattr(args, name, None)) is not None:
            check_writable(written)
    return args


def _add_models(parser: argparse.ArgumentParser, samples: int) -> None:
    add_drawing(parser, samples, "a row")
    parser.add_argument("--global_mapper_path", help="None: global_mapper/ in the model folder")
    parser.add_argument("--local_mapper_path", help="None: local_mapper/ in the model folder")


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    quiet_libraries()
    args.act(args)
    return OK


if __name__ == "__main__":
    run(main, keeps="train" in sys.argv[1:2])
