"""Where the numbers come from: versions, hashes and hardware, and the commands that make them again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from fastmem.data.sources import EMBEDDED, IN_MEMORY
from fastmem.report.page.story import Story


def facts(story: Story) -> list[tuple[str, str]]:
    """Names and values of everything that the run's numbers depend on."""
    identity, inputs, settings = story.identity, story.inputs, story.identity["settings"]
    found = [
        ("model", identity["model"]),
        ("weights, SHA-256", identity["checkpoint"]),
        ("tokenizer, SHA-256", identity["tokenizer"]),
        ("type and device", f"{identity['dtype']} on {identity['device']}"),
        ("operators", identity["backend"]),
        ("training images", _place(inputs.data)),
        ("held-out images", _place(inputs.heldout) if "heldout" in story.manifests else "none"),
        *((f"images and folds of {split}, SHA-256", digest) for split, digest in identity["manifests"].items()),
        ("views", str(settings["views"])),
        ("segments", ", ".join(settings["segments"])),
        ("activation", f"{settings['activation']} GELU"),
        ("seed", str(settings["seed"])),
        ("speed", f"{story.score.images_per_second:.3g} images/s, {story.score.seconds:,.0f} s"),
        ("files that could not be read", str(story.score.skipped)),
        *story.score.environment.items(),
    ]
    if story.main is not None:
        found.append(("judge", f"{story.main.document.embedder} above {story.main.document.threshold}"))
    if story.main is not None and story.main.document.index is not None:
        found.append(("index", story.main.document.index))
    found += [
        (f"edit {plan.name}", f"{len(plan):,} units by {plan.by}, chosen for weights {plan.checkpoint[:12]}")
        for plan in story.edits
    ]
    return found


def _place(path: str | None) -> str:
    if path in (None, EMBEDDED):
        return "those that come with fastmem"
    return "in memory" if path == IN_MEMORY else str(path)


def commands(story: Story) -> list[str]:
    """The commands that make the run again, in order; stages that have not run are left out."""
    run = ["--run", str(story.path)]
    found = [_join("score", _score_options(story))]
    if any(extraction.document.index is not None for extraction in story.extractions):
        found.append(_join("index", _path_option("--data", story.inputs.data)))
    found += [_join("mitigate", [*run, *_mitigate_options(story, name)]) for name in _edit_names(story)]
    for extraction in story.extractions:
        d = extraction.document
        options = [*run, "--prefix", ",".join(map(str, d.prefixes)), "--top-per-class", str(d.settings.top_per_class)]
        options += ["--judge", "tokens" if d.embedder == "token-match" else "sscd", "--threshold", str(d.threshold)]
        found.append(_join("extract", [*options, *_edit(d.edit)]))
    for evaluation in story.evaluations:
        options = [*run, *(["--samples", str(evaluation.samples)] if evaluation.samples else ["--features", "none"])]
        options += ["--seed", str(evaluation.settings.seed)] if evaluation.settings.seed else []
        found.append(_join("evaluate", [*options, *_edit(evaluation.edit)]))
    if story.sweep is not None:
        found.append(_join("sweep", [*run, *_sweep_options(story)]))
    return [*found, _join("report", run)]


def _join(command: str, options: list[str]) -> str:
    return shlex.join(["fastmem", command, *options])


def _path_option(name: str, path: str | None) -> list[str]:
    return [] if path in (None, EMBEDDED, IN_MEMORY) else [name, str(path)]


def _edit(name: str | None) -> list[str]:
    return [] if name is None else ["--edit", name]


def _edit_names(story: Story) -> Iterator[str]:
    # a search or attribution chooses by more than a command says, and its edits are files of the run
    yield from (plan.name for plan in story.edits if not plan.name.startswith("search-"))


def _mitigate_options(story: Story, name: str) -> list[str]:
    plan = next(plan for plan in story.edits if plan.name == name)
    options = ["--top", f"{plan.fraction:.6%}".rstrip("0%").rstrip(".") + "%", "--by", plan.by]
    options += ["--factor", f"{float(plan.factor[0]):g}"] if len(plan) else []
    options += ["--scope", plan.scope] if plan.scope != "global" else []
    options += ["--merge", plan.merge] if plan.merge != "max" else []
    options += ["--seed", str(plan.seed)] if plan.seed else []
    return [*options, "--name", plan.name]


def _sweep_options(story: Story) -> list[str]:
    rows = [] if story.sweep is None else [row for row in story.sweep.rows if row.by != "none"]
    by = list(dict.fromkeys(row.by for row in rows))
    fractions = sorted({row.fraction for row in rows})
    return ["--by", ",".join(by), "--fractions", ",".join(f"{fraction:g}" for fraction in fractions)] if rows else []


def _score_options(story: Story) -> list[str]:
    identity, inputs, settings = story.identity, story.inputs, story.identity["settings"]
    options = ["--model", inputs.model, *_path_option("--data", inputs.data)]
    if "heldout" in story.manifests:
        options += _path_option("--heldout", inputs.heldout)
    options += _path_option("--classes", inputs.classes)
    options += [*_path_option("--checkpoint", inputs.checkpoint), *_path_option("--tokenizer", inputs.tokenizer)]
    options += ["--views", str(settings["views"]), "--segments", ",".join(settings["segments"])]
    options += ["--dtype", identity["dtype"], "--seed", str(settings["seed"])]
    if settings.get("per_class"):
        options += ["--per-class", str(settings["per_class"])]
    options += ["--activation", settings["activation"]] if settings["activation"] != "post" else []
    options += ["--cfg"] if settings.get("unconditional") else ["--per-image"] if settings.get("per_image") else []
    return [*options, "--out", str(story.path)]
