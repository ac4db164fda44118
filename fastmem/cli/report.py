"""``fastmem report``."""

from __future__ import annotations

from fastmem.cli.command import FROM_0, GENERAL, option
from fastmem.cli.command import command as make_command
from fastmem.cli.options import JSON, RunOptions, print_json, run_options, tell
from fastmem.cli.progress import terminal_reporter
from fastmem.stages.report import MOST_DECODED, report

PAGE = "The page"


@make_command("report", "report --run runs/xxl", "report --run runs/xxl --no-images --out study.html")
@run_options
@option("--out", GENERAL, "The HTML file.  [default: RUN/report.html]", metavar="FILE")
@option("--no-images", PAGE, "Leave every picture out; names and numbers stay.", is_flag=True)
@option("--pictures", PAGE, "Attacked images that are shown with what came back.", type=FROM_0, default=MOST_DECODED)
@JSON
def command(where: RunOptions, out: str | None, no_images: bool, pictures: int, as_json: bool) -> None:
    """Writes one HTML page of everything that a run has found, which needs no network.

    It has the numbers beside their controls, a map of the units, the images and their risk, a gallery of what came
    back, what edits stop and cost, and the commands that make it again. A stage that has not run is named with its
    command.
    """
    with terminal_reporter() as reporter:
        run = where.open(reporter)
        page = report(run, out, not no_images, pictures=pictures, reporter=reporter)
    document = {"run": str(run.path), "page": str(page), "bytes": page.stat().st_size, "images": not no_images}
    if as_json:
        print_json(document)
    else:
        tell(page)
