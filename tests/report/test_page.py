"""The page's content against the run that it tells of, and runs that it refuses."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import fastmem
from fastmem import InputFileError, UsageError
from fastmem.cli import cli
from fastmem.data.token_source import NoPixels
from fastmem.demo.lessons import lessons
from fastmem.extraction.verdicts import Count
from fastmem.report.page.album import MOST_BYTES, Album, in_bytes
from fastmem.report.page.provenance import commands
from fastmem.report.page.summary import findings, limits, tiles
from fastmem.report.page.trade_off import measured_edits, sweep_chart
from fastmem.report.page.unit_map import choose_opened
from fastmem.reporter import printable
from tests.conftest import exit_code, make_toy_model, random_images, run


@pytest.fixture(scope="module")
def page(hostile_run, tmp_path_factory) -> str:
    return fastmem.report(hostile_run.run, tmp_path_factory.mktemp("page") / "page.html").read_text()


@pytest.fixture(scope="module")
def data(page) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def unpack(text: str, low: float, high: float) -> np.ndarray:
    return low + np.frombuffer(base64.b64decode(text), np.uint8) / 255 * (high - low)


def test_the_map_has_every_unit_of_every_ranked_segment(data, hostile_run):
    stats, story = hostile_run.run.train, hostile_run.story()
    layers, _, units = stats.shape
    map_ = data["units"]
    assert (map_["layers"], map_["units"], map_["segments"]) == (layers, units, list(stats.segments))
    assert [colour["name"] for colour in map_["colours"]] == ["UnitMem", "gap"]
    for colour, scores in zip(map_["colours"], (stats.unitmem(), story.gap.value), strict=True):
        expected = [scores.amax(1), *scores.unbind(1)]
        step = (colour["high"] - colour["low"]) / 255
        for cells, own in zip(colour["cells"], expected, strict=True):
            shown = unpack(cells, colour["low"], colour["high"]).reshape(layers, units)
            np.testing.assert_allclose(shown, own.numpy(), atol=0.51 * step)


def test_an_opened_unit_has_its_images_and_its_responses_by_class(data, hostile_run):
    stats, opened, album = hostile_run.run.train, data["units"]["opened"], data["album"]
    # so small a model has fewer units than can be opened
    assert len(opened["unit"]) == stats.shape[0] * stats.shape[2]
    names = dict(
        zip(hostile_run.run.sources["train"].ids.tolist(), hostile_run.run.sources["train"].names, strict=True)
    )
    means = stats.class_mean.numpy()
    for i, (layer, unit, segment) in enumerate(zip(opened["layer"], opened["unit"], opened["segment"], strict=True)):
        assert opened["scores"]["UnitMem"][i] == pytest.approx(float(stats.unitmem()[layer, :, unit].max()), abs=1e-4)
        tops = [i for i in stats.top_image[layer, segment, unit].tolist() if i >= 0]
        assert [album["names"][n] for n in opened["images"][i]] == [printable(names[t]) for t in tops][:6]
        by_class = opened["classes"]["train"]
        count = len(by_class["labels"])
        shown = unpack(by_class["means"], 0, 1)[i * count : (i + 1) * count] * by_class["largest"][i]
        np.testing.assert_allclose(shown, means[:, layer, segment, unit], atol=0.004 * by_class["largest"][i] + 1e-5)


def test_the_highest_the_most_apart_and_random_units_can_be_opened(monkeypatch):
    for name, count in (("TOP", 10), ("TOP_BY_GAP", 5), ("RANDOM", 6)):
        monkeypatch.setattr(f"fastmem.report.page.unit_map.{name}", count)
    unitmem, gap = np.random.default_rng(3).random((2, 4, 2, 20))
    kinds = choose_opened(unitmem, gap)
    by_kind = {kind: [pair for pair, own in kinds.items() if own == kind] for kind in ("top", "gap", "random")}
    best = np.argsort(-unitmem.max(1).ravel())[:10]
    assert by_kind["top"] == [divmod(int(place), 20) for place in best]
    apart = {divmod(int(place), 20) for place in np.argsort(-gap.max(1).ravel())[:5]}
    assert set(by_kind["gap"]) == apart - set(by_kind["top"])
    assert len(by_kind["random"]) == 6
    assert len(kinds) == 16 + len(by_kind["gap"])
    assert choose_opened(unitmem, None).keys() >= set(by_kind["top"])


def test_rows_of_risk_have_what_the_run_knows_of_each_image(data, hostile_run):
    story = hostile_run.story()
    risk, album, manifest = data["risk"], data["album"], story.manifests["train"]
    where = {printable(str(name)): i for i, name in enumerate(manifest.names)}
    losses, verdicts = story.losses["train"], story.main.verdicts["train"]
    for row, image in enumerate(risk["image"]):
        at = where[album["names"][image]]
        assert risk["owned"][row] == story.owned[at]
        assert risk["loss"][row] == pytest.approx(float(losses.loss[at]), abs=1e-4)
        place = np.flatnonzero(verdicts.ids == manifest.ids[at])
        expected = float(verdicts.similarity[1, place[0]]) if len(place) else None
        assert risk["similarity"][row] == pytest.approx(expected, abs=1e-4)
        assert expected is not None or risk["owned"][row] > 0
    assert len(verdicts) <= len(risk["image"]) <= 12
    assert sum(risk["bars"]["owned"]) == story.owned.sum() == round(0.05 * 48)


def test_pictures_are_small_and_those_of_equal_tokens_are_kept_once(data, hostile_run):
    album = data["album"]
    for picture in album["pictures"]:
        with Image.open(BytesIO(base64.b64decode(picture))) as image:
            assert image.format == "WEBP"
            assert max(image.size) <= 96
    rebuilt = [extraction["rebuilt"] for extraction in data["extractions"]]
    # no edit changes what a target's reconstruction is
    assert rebuilt[0] == rebuilt[1] == rebuilt[2]
    assert set(rebuilt[0]) <= set(range(len(album["pictures"])))


def test_pictures_end_where_the_room_ends(hostile_run):
    story = hostile_run.story()
    whole = Album(story, True)
    numbers = [whole.number(int(i)) for i in story.manifests["train"].ids]
    whole.show(numbers)
    sizes = [len(base64.b64decode(picture)) for picture in whole.document()["pictures"]]
    assert len(sizes) == 12
    assert sum(sizes) < MOST_BYTES
    small = Album(story, True, sum(sizes[:5]))
    small.show([small.number(int(i)) for i in story.manifests["train"].ids])
    assert (len(small.document()["pictures"]), small.left_out) == (5, 7)
    assert Album(story, True).number(1) == -1


def test_a_set_of_tokens_alone_has_a_page_without_its_pictures(hostile_run, monkeypatch):
    def refuse(index: int) -> Image.Image:
        raise NoPixels("expected images, got their tokens alone")

    monkeypatch.setattr(hostile_run.run.sources["train"], "read", refuse)
    story = hostile_run.story()
    album = Album(story, True)
    album.show([album.number(int(i)) for i in story.manifests["train"].ids])
    assert (album.document()["picture"], album.left_out) == ([-1] * 12, 0)


def test_the_summary_has_each_count_with_interval_and_control(hostile_run):
    story = hostile_run.story()
    d = story.main.document
    count = Count(d.extracted["3"], d.candidates)
    low, high = count.interval
    found = [f for f in findings(story) if f.what.startswith("Extracted from 3 tokens")]
    assert [f.what.partition("under the edit ")[2].split(",")[0] for f in found] == ["", "drawn", "halved"]
    assert found[0].value == f"{count.k} of {count.n} candidates"
    assert found[0].interval == f"{100 * low:.1f} to {100 * high:.1f} %"
    assert found[0].control.startswith(f"held out: {d.heldout_extracted['3']} of {d.heldout_candidates} (")
    assert {tile.label for tile in tiles(story)} == {"scored", "extracted", "held-out control", "after the edit halved"}
    said = " ".join(limits(story))
    assert "not released weights" in said
    assert "no held-out images" not in said


def test_five_sentences_tell_what_was_learnt(hostile_run):
    story = hostile_run.story()
    d = story.main.document
    told = lessons(story, 4)
    assert [line[:2] for line in told] == ["1.", "2.", "3.", "4.", "5."]
    assert str(Count(d.extracted["3"], d.candidates)) in told[0]
    assert f"AUC {story.score.membership['loss'].auc:.2f}" in told[1]
    assert f"{story.score.gap.called} of 96 units stand out" in told[2]
    under = {e.document.edit: e.document.extracted["3"] for e in story.extractions}
    assert f"the top 4.17 % of the units by unitmem leaves {under['halved']} of {d.candidates}" in told[3]
    assert f"random 4.17 % of the units leaves {under['drawn']} of {d.candidates}" in told[3]
    assert "kd-sscd by " in told[4]


def test_edits_stand_beside_their_controls(hostile_run):
    found = measured_edits(hostile_run.story())
    by_name = {row["edit"]: row for row in found["rows"]}
    assert list(by_name) == [None, "drawn", "halved"]
    assert [row["control"] for row in by_name.values()] == [False, True, False]
    assert by_name[None]["cost"] == 0
    assert found["cost"] == "kd-sscd"
    lines = {line["by"]: line for line in sweep_chart(hostile_run.story())["lines"]}
    assert {by: line["kind"] for by, line in lines.items()} == {"none": "none", "unitmem": "line", "random": "band"}
    assert [point["chosen"] for point in lines["unitmem"]["points"] if point["share"] == "5 %"] == ["halved"]
    assert {point["seeds"] for point in lines["random"]["points"]} == {2}


def test_the_commands_are_ones_that_fastmem_takes(hostile_run):
    told = commands(hostile_run.story())
    assert [line.split()[1] for line in told] == [
        "score", "index", "mitigate", "mitigate", "extract", "extract", "extract", "evaluate", "evaluate", "evaluate",
        "sweep", "report",
    ]  # fmt: skip
    for line in told:
        name, *arguments = shlex.split(line)[1:]
        command = cli.get_command(None, name)
        # raises where an option is unknown, or a value is none
        with command.make_context(name, arguments):
            pass


def test_the_page_loads_nothing_and_runs_its_own_scripts_alone(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data: blob:;")
    assert policy.count("sha256-") == page.count("<script>") == 2
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href|action)="(?!#|data:)[^"]*"', outside)


def test_no_name_of_the_data_reaches_the_html(page, hostile_run):
    head, _, rest = page.partition('id="data">')
    content, _, tail = rest.partition("</script>")
    for name in hostile_run.names:
        assert name not in head
        assert name not in tail
    assert "<" not in content
    assert ">" not in content


def test_a_hostile_edit_or_path_is_escaped(hostile_run, tmp_path):
    place = shutil.copytree(hostile_run.run.path, tmp_path / "<b onclick=x>&\u202e")
    opened = fastmem.open_run(place, model=hostile_run.run.model)
    text = fastmem.report(opened).read_text()
    assert "<b onclick" not in text
    assert "\u202e" not in text
    assert "&lt;b onclick=x&gt;&amp;\\u202e" in text


def test_the_command_writes_the_page_and_says_where(capsys, tiny_run, tmp_path):
    code, out, err = run(capsys, "report", "--run", tiny_run)
    assert (code, out.strip()) == (0, str(tiny_run / "report.html")), err
    code, out, err = run(capsys, "report", "--run", tiny_run, "--no-images", "--out", tmp_path / "a.html", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["page"] == str(tmp_path / "a.html")
    assert document["bytes"] == (tmp_path / "a.html").stat().st_size
    content = (tmp_path / "a.html").read_text()
    assert '"pictures":[]' in content
    assert content.count("fastmem extract --run") == 2


RESULT, VERDICTS = "extractions/unedited-*/result.json", "extractions/unedited-*/verdicts.parquet"
COMPLETIONS, EVALUATION = "extractions/halved-*/completions.safetensors", "evaluations/halved-*.json"
SWEEP, EDIT = "sweep/sweep.json", "edits/halved.safetensors"
# what is changed, how, and what the sentence has
REFUSED: dict[str, tuple[str, Any, str]] = {
    "result of another run": ("result.json", {"run_id": "0" * 16}, "expected run_id"),
    "result of another form": ("result.json", {"reliability": 3}, "expected a whole"),
    "no result": ("result.json", None, "expected a file .*result.json"),
    "extraction of another run": (RESULT, {"run_id": "0"}, "expected run_id"),
    "extraction without a count": (RESULT, {"extracted": {}}, "expected counts for the prefixes 0, 3"),
    "extraction without prefixes": (RESULT, {"prefixes": []}, "expected counts for the prefixes"),
    "other counts": (RESULT, {"extracted": {"0": 99, "3": 99}}, "expected 99, 99 extracted images"),
    "verdicts of other images": (VERDICTS, "images.parquet", "expected verdicts in"),
    "damaged verdicts": (VERDICTS, b"x", "expected verdicts in"),
    "no verdicts": (VERDICTS, None, "expected verdicts in"),
    "damaged completions": (COMPLETIONS, b"x", "expected a whole safetensors file"),
    "evaluation of another run": (EVALUATION, {"run_id": "0"}, "expected run_id"),
    "damaged evaluation": (EVALUATION, b"{", "expected a JSON document"),
    "sweep of another run": (SWEEP, {"run_id": "0"}, "expected run_id"),
    "damaged edit": (EDIT, b"x", "expected a whole safetensors file"),
}


def damage(folder: Path, pattern: str, how: Any) -> None:
    """Remove a file, write other bytes or another file's, or change entries of a document."""
    (file,) = folder.glob(pattern)
    if how is None:
        file.unlink()
    elif isinstance(how, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | how))
    else:
        file.write_bytes(how if isinstance(how, bytes) else (folder / how).read_bytes())


@pytest.mark.parametrize(("pattern", "how", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_or_foreign_file_is_refused_in_one_sentence(hostile_run, tmp_path, pattern, how, sentence):
    folder = shutil.copytree(hostile_run.run.path, tmp_path / "run")
    damage(folder, pattern, how)
    with pytest.raises(InputFileError, match=sentence):
        fastmem.report(fastmem.open_run(folder, model=hostile_run.run.model))
    assert not (folder / "report.html").exists()


def test_an_extraction_that_kept_no_completions_or_is_not_finished_leaves_them_out(hostile_run, tmp_path):
    folder = shutil.copytree(hostile_run.run.path, tmp_path / "run")
    damage(folder, "extractions/unedited-*/completions.safetensors", None)
    damage(folder, "extractions/drawn-*/result.json", None)
    opened, notes = fastmem.open_run(folder, model=hostile_run.run.model), []
    page = fastmem.report(opened, reporter=fastmem.Reporter(note=notes.append))
    assert "drawn-" in notes[0]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    assert [extraction["decoded"] for extraction in data["extractions"]] == [False, True]
    assert set(data["extractions"][0]["made"]) == {-1}


@pytest.mark.parametrize("scores", ["one image", "no held-out images"])
def test_a_run_with_little_in_it_has_a_page(scores, toy_source, tmp_path):
    model = make_toy_model()
    source = toy_source
    if scores == "one image":
        source = fastmem.ArraySource(np.zeros((1, 16, 16, 3), np.uint8), [0])
    fastmem.score(model, source, views=1, check_classes=False, pictures=False, out=tmp_path / "run")
    opened = fastmem.open_run(tmp_path / "run", model=model, data=source)
    text = fastmem.report(opened).read_text()
    assert ('"units":null' in text) == (scores == "one image")
    assert "There are no held-out images" in text


def test_scales_that_see_the_class_alone_are_not_on_the_map(small_var, tmp_path):
    source = fastmem.ArraySource(random_images(6, 64), [0, 0, 1, 1, 2, 2])
    fastmem.score(small_var, source, views=1, check_classes=False, pictures=False, out=tmp_path / "run")
    text = fastmem.report(fastmem.open_run(tmp_path / "run", model=small_var, data=source)).read_text()
    map_ = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["units"]
    assert map_["segments"] == ["scale2", "scale3", "scale4"]
    assert [len(colour["cells"]) for colour in map_["colours"]] == [4]
    assert {len(base64.b64decode(cells)) for cells in map_["colours"][0]["cells"]} == {2 * 512}


def test_wrong_options_are_refused(hostile_run, tmp_path):
    with pytest.raises(UsageError, match="at least 0"):
        fastmem.report(hostile_run.run, pictures=-1)
    with pytest.raises(UsageError, match="got the folder"):
        fastmem.report(hostile_run.run, tmp_path)
    assert exit_code("report", "--run", tmp_path / "none") == InputFileError.exit_code
    assert CliRunner().invoke(cli, ["report"]).exit_code == 2


def test_numbers_as_bytes_keep_their_ends_and_take_nan_for_the_low_one():
    found = base64.b64decode(in_bytes(np.array([-1.0, 0.0, 1.0, np.nan, 7.0]), -1, 1))
    assert list(found) == [0, 128, 255, 0, 255]
    assert list(base64.b64decode(in_bytes(np.array([0.5, 0.5]), 0.5, 0.5))) == [0, 0]
