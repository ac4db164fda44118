"""Scores your own images with a model, and prints the ten units that memorise most with the image behind each.

    .venv/bin/python examples/score_my_images.py --data MY_IMAGES

MY_IMAGES has one folder per class with the images inside. The folders stand for the model's classes in sorted order, or
in the order of ``--classes FILE``, one folder name per line. So take the images that the model was trained on; where
not all of its classes are there, the file has to name them all.

The model is rar-tiny, which ships with fastmem and knows its own pictures alone. Name another one with ``--model``
(``fastmem models`` lists them), and weights that you have trained with ``--checkpoint``. Tables, pictures and
statistics are left in the run folder ``--out``, which all later stages start from.
"""

from __future__ import annotations

import argparse
import sys

import fastmem

SHOWN = 10


def read_arguments() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with one folder of images per class")
    parser.add_argument("--classes", help="file with the model's class folders in order, one per line")
    parser.add_argument("--model", default="rar-tiny", help="name of a model (default: %(default)s)")
    parser.add_argument("--checkpoint", help="the model's weights, where they are not the official ones")
    parser.add_argument("--tokenizer", help="the tokenizer's weights, likewise")
    parser.add_argument("--out", default="runs/my-images", help="new run folder (default: %(default)s)")
    parser.add_argument("--views", default="10", help="views of each image, or center for one (default: %(default)s)")
    parser.add_argument("--no-class-check", action="store_true", help="take the class order without checking it")
    arguments = parser.parse_args()
    if arguments.views != "center" and not arguments.views.isdecimal():
        parser.error(f"expected --views as a number or center, got {arguments.views!r}")
    return arguments


def score_images(arguments: argparse.Namespace) -> None:
    """Score the images, and print the highest units."""
    model = fastmem.load_model(arguments.model, arguments.checkpoint, arguments.tokenizer)
    source = fastmem.FolderSource(arguments.data, classes=arguments.classes)
    result = fastmem.score(
        model,
        source,
        views=arguments.views if arguments.views == "center" else int(arguments.views),
        out=arguments.out,
        check_classes=not arguments.no_class_check,
        token_cache="auto",
        reporter=fastmem.Reporter(note=talk, planned=talk),
    )
    highest = fastmem.select(result.train, fraction=SHOWN / (model.num_layers * model.num_units), by="unitmem")
    print(f"{result.train.count} images, {model.num_layers} blocks of {model.num_units} units\n")
    print(f"{'block':>5} {'unit':>6} {'UnitMem':>8}  largest response from")
    rows = zip(highest.layer, highest.unit, highest.score, fastmem.owners(result.train, highest), strict=True)
    for block, unit, unitmem, image in rows:
        print(f"{int(block):>5} {int(unit):>6} {float(unitmem):>8.3f}  {source.name(int(image))}")
    print(f"""
What to do next:
  look at {arguments.out}/top-images.png: do these images look alike, or does one stand out?
  fastmem extract --run {arguments.out}             which of the images can be pulled out
  fastmem mitigate --run {arguments.out} --top 5%   weaken the highest units
A high UnitMem alone does not show that an image was memorised: score again with held-out images as a control,
  fastmem score --model {arguments.model} --data {arguments.data} --heldout OTHER_IMAGES""")


def talk(sentence: object) -> None:
    """One line on stderr; a plan that has nothing to say is passed over."""
    if str(sentence):
        print(sentence, file=sys.stderr)


def main() -> None:
    """Run the script; an error is one sentence."""
    try:
        score_images(read_arguments())
    except fastmem.FastmemError as error:
        talk(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
