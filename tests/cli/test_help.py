"""Help texts: a sentence, two examples that are right, options under headings, and words that nobody has to guess."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import click
import pytest

from fastmem.cli import COMMANDS
from fastmem.cli.command import GENERAL, GroupedCommand, GroupedOption
from tests.conftest import run


def load(name: str) -> GroupedCommand:
    return import_module(COMMANDS[name][0]).command


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_two_examples_that_it_understands(name):
    command = load(name)
    assert len(command.examples) == 2
    for example in command.examples:
        first, *arguments = shlex.split(example)
        assert first == name
        with command.make_context(name, arguments) as ctx:
            assert ctx.params
        # an example that a terminal wraps cannot be copied
        assert len(f"    fastmem {example}") <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_explains_itself_under_a_heading(name):
    for option in load(name).params:
        # what stands without a name is explained by the text and the examples
        if isinstance(option, click.Argument):
            continue
        assert isinstance(option, GroupedOption)
        text = option.help or ""
        assert len(text) > 10
        assert text.split("  [default:")[0].endswith(".")
        # no fragment such as "Of each set."
        assert not re.match(r"(Of|Where|Whose|Which|What the) ", text) or "?" in text or " multiplied " in text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_is_one_screen_of_groups(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert "\nExamples:\n    fastmem " in out
    headings = re.findall(r"^(\S.*):$", out, flags=re.MULTILINE)
    # general options come last
    assert headings[-1] == GENERAL
    assert len(headings) == len(set(headings))
    first = out.split("\n\n")[1].strip()
    assert first[0].isupper()
    assert first.endswith(".")
    assert COMMANDS[name][1].endswith(".")


def test_options_that_commands_share_are_written_once():
    shared = ("run", "judge", "threshold", "sscd", "trust_sscd", "sscd_size", "samples", "checkpoint")
    seen: dict[str, set[int]] = {name: set() for name in shared}
    for name in COMMANDS:
        for option in load(name).params:
            # with their own default numbers in the text, samples differ between commands
            if isinstance(option, GroupedOption) and option.name in seen and option.name != "samples":
                seen[option.name].add(hash((tuple(option.opts), option.help, option.group)))
    # a status is of any stage's folder, all else of a scored run's
    assert {name: len(kinds) for name, kinds in seen.items() if len(kinds) > 1} == {"checkpoint": 2, "run": 2}


TYPOS = {
    "command": (("scroe",), "Did you mean 'score'?"),
    "command like none": (("zzz",), "There are models, fetch, score"),
    "option": (("score", "--vews", "10"), "--views"),
    "option of a run": (("extract", "--run", "x", "--top-per-clas", "2"), "--top-per-class"),
}


@pytest.mark.parametrize(("arguments", "text"), TYPOS.values(), ids=TYPOS)
def test_a_typo_gets_what_was_meant(capsys, arguments, text):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert text in err


def test_an_unknown_option_of_no_command_is_not_taken_for_a_command(capsys):
    code, _, err = run(capsys, "--no-such-thing")
    assert code == 2
    assert "No such option" in err


def test_a_group_of_options_becomes_its_dataclass():
    from dataclasses import dataclass

    from fastmem.cli.command import command, option, option_group

    @dataclass(frozen=True)
    class Size:
        width: int
        height: int

    sides = (option(f"--{name}", "Size", "One side.", type=int, default=3) for name in ("width", "height"))
    sizes = option_group(Size, "size", *sides)

    @command("draw", "draw --width 5", "draw")
    @sizes
    @option("--colour", "Ink", "A colour.", default="red")
    def draw(size: Size, colour: str) -> tuple[Size, str]:
        """Draws."""
        return size, colour

    assert draw.main(["--width", "5"], standalone_mode=False) == (Size(5, 3), "red")
    assert [parameter.name for parameter in draw.params] == ["width", "height", "colour"]
    assert isinstance(draw, click.Command)
