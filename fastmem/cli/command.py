"""The form of every command: a sentence, two examples, and its options in groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

import click

from fastmem.reporter import printable

Function = TypeVar("Function", bound=Callable[..., Any])
GENERAL = "Options"
# kinds of whole numbers
FROM_0, FROM_1 = click.IntRange(0), click.IntRange(1)


class GroupedOption(click.Option):
    """An option that stands under a heading in the help text."""

    def __init__(self, *arguments: Any, group: str = GENERAL, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help has examples, and its options under headings.

    Args:
        examples: calls to show, each one line without the leading ``fastmem``.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples = tuple(examples)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(printable(error.format_message()), ctx) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"), formatter.indentation():
                for example in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}fastmem {example}\n")
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", GENERAL), []).append(record)
        # what every command has comes last
        for name in sorted(groups, key=lambda group: group == GENERAL):
            with formatter.section(name):
                formatter.write_dl(groups[name])


def command(name: str, *examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command, with ``examples`` in its help text."""
    return click.command(name, cls=GroupedCommand, examples=examples)


def option(names: str | tuple[str, ...], group: str, help_text: str, **settings: Any) -> Callable[[Function], Function]:
    """An option of a command, whose default value stands in the help text.

    Args:
        names: such as "--seed"; a last name without dashes is the parameter that gets the value.
        group: heading under which the option stands.
        help_text: one sentence.
        settings: the others that ``click.option`` takes.
    """
    shown = settings.get("default") is not None and not settings.get("is_flag")
    declared = (names,) if isinstance(names, str) else names
    return click.option(*declared, cls=GroupedOption, group=group, help=help_text, show_default=shown, **settings)


def option_group(
    kind: type[Any], parameter: str, *options: Callable[[Function], Function]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that reach a command as one frozen dataclass.

    Args:
        kind: the dataclass; each of its fields is the destination of one option.
        parameter: name under which the function gets it.
        options: in the order of the help text.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **given: Any) -> Any:
            given[parameter] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            return function(*arguments, **given)

        for add in reversed(options):
            call = add(call)
        return call

    return decorate
