"""Write the page: the parts of a run's story as JSON and HTML in one file, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from fastmem import __version__
from fastmem.files import write_atomically
from fastmem.report.page import provenance
from fastmem.report.page.album import Album
from fastmem.report.page.gallery import gallery
from fastmem.report.page.image_risk import image_risk
from fastmem.report.page.story import Story
from fastmem.report.page.summary import findings, limits, tiles
from fastmem.report.page.trade_off import measured_edits, sweep_chart
from fastmem.report.page.unit_map import unit_map
from fastmem.reporter import printable

HERE = Path(__file__).parent
# one after the other they are the page's own script
SCRIPTS = ("common.js", "units.js", "images.js", "gallery.js", "trade_off.js", "start.js")


def write_page(path: Path, story: Story, with_pictures: bool, most_decoded: int) -> int:
    """Write the page of a run.

    Args:
        path: the HTML file.
        story: the run.
        with_pictures: show pictures; without them there is not one in the file.
        most_decoded: how many targets of an extraction have pictures of what the model made of them.

    Returns: how many pictures did not fit.

    Raises: UsageError where the file cannot be written; InputFileError where a class row of the statistics is damaged.
    """
    data, left_out = page_data(story, with_pictures, most_decoded)
    plotly = (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    page = page_text(story, data, with_pictures, plotly)
    write_atomically(path, lambda partial_path: partial_path.write_text(page, encoding="utf-8"))
    return left_out


def page_data(story: Story, with_pictures: bool, most_decoded: int) -> tuple[dict[str, Any], int]:
    """Return what the page's script works with, and how many pictures did not fit; arguments as for `write_page`."""
    album = Album(story, with_pictures)
    # in this order pictures are taken while there is room
    data: dict[str, Any] = {"units": unit_map(story, album), "risk": image_risk(story, album)}
    data["extractions"] = gallery(story, album, most_decoded if with_pictures else 0)
    if data["units"] is not None:
        album.show(number for row in data["units"]["opened"]["images"] for number in row)
    album.show(data["risk"]["image"])
    data |= {"sweep": sweep_chart(story), "edits": measured_edits(story), "withPictures": with_pictures}
    # last, because the other parts number the images
    return data | {"album": album.document()}, album.left_out


def page_text(story: Story, data: Mapping[str, Any], with_pictures: bool, plotly: str) -> str:
    """Return the page as HTML.

    Args:
        story: the run.
        data: what `page_data` gave.
        with_pictures: whether there are pictures in it.
        plotly: the script that draws charts.
    """
    script = "(() => {\n'use strict';\n" + "\n".join((HERE / name).read_text() for name in SCRIPTS) + "})();"
    return (
        _environment()
        .get_template("page.html")
        .render(
            story=story,
            model=story.identity["model"],
            run=str(story.path),
            version=__version__,
            tiles=tiles(story),
            findings=findings(story),
            limits=limits(story),
            edits=data["edits"],
            facts=provenance.facts(story),
            commands=provenance.commands(story),
            with_pictures=with_pictures,
            data=htmlsafe_json_dumps(data, partial(json.dumps, separators=(",", ":"), allow_nan=False)),
            style=Markup((HERE / "page.css").read_text()),
            # both are the package's own
            plotly=Markup(plotly),
            script=Markup(script),
            hashes=[_hash(plotly), _hash(script)],
        )
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_control_characters,
    )


def _without_control_characters(value: Any) -> Any:
    """Names on one line, and free of what would act and not show; the page's own parts are as they are."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _hash(script: str) -> str:
    """What a browser compares a script with before it runs it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
