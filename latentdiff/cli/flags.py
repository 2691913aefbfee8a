"""A command's flags, made by cyclopts from its function's signature and docstring."""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import docstring_parser
from cyclopts import App, Parameter, Token, exceptions
from rich.console import Console

from latentdiff.cli.commands import COMMANDS, Command, load
from latentdiff.errors import UserError

PYTHON_ONLY = ("progress", "pipeline", "callback")  # parameters that have no flag
PYTHON_TYPES = {"Config": str, "LatentDiffusionPipeline": object}  # types in annotations; importing them would take time
NO_VERIFY = "Do not check weights against the hashes published beside them. Checking takes seconds a gigabyte."
IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false, or no value"}


class HelpConsole(Console):
    """Prints help. Where its reader has gone, as after `| head`, rich alone would end with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def parse(name: str, command: Command, tokens: Sequence[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The command's function and its keyword arguments, with no_verify besides where the command opens weights.

    Raises:
        UserError: the tokens have no meaning. Its line names the flag and what would be valid.
        SystemExit: --help was given, and the help page is printed.
    """
    function = load(command.function)
    documentation, helps = _documentation(function)
    if command.flags_of:
        helps = _documentation(load(COMMANDS[command.flags_of].function))[1] | helps
    parameters = _parameters(function, command, helps)
    app = App(
        f"latentdiff {name}",
        help=_paragraphs(documentation.description),
        usage=" ".join(["Usage: latentdiff", name, *filter(None, map(_in_usage, parameters)), "[OPTIONS]"]),
        help_format="plaintext",
        version_flags=(),
        console=HelpConsole(),
        group_parameters="Options",
    )
    app["--help"].group = "Options"

    def target(*positional: Any, **options: Any) -> None:
        """What cyclopts binds the tokens to. It is not called."""

    target.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.default(target)
    try:
        chosen, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except exceptions.CycloptsError as error:
        raise UserError(f"{_explain(error, tokens, command)} (see latentdiff {name} --help)") from None
    if chosen is not target:
        chosen(*bound.args, **bound.kwargs)
        sys.stdout.flush()
        sys.exit(0)
    bound.apply_defaults()
    # What is given by position in any number is bound as a tuple
    lists = {key: list(bound.arguments[key]) for key in command.positional if isinstance(bound.arguments[key], tuple)}
    return function, {**bound.arguments, **lists}


def _documentation(function: Callable[..., Any]) -> tuple[docstring_parser.Docstring, dict[str, str]]:
    """(a function's docstring, what it says of each parameter)."""
    documentation = docstring_parser.parse(inspect.getdoc(function) or "", docstring_parser.DocstringStyle.GOOGLE)
    return documentation, {entry.arg_name: _paragraphs(entry.description) for entry in documentation.params}


def _parameters(function: Callable[..., Any], command: Command, helps: dict[str, str]) -> list[inspect.Parameter]:
    """The function's parameters as cyclopts is to see them: those given by position first, then the options."""
    signature = inspect.signature(function).parameters
    hints = typing.get_type_hints(function, localns=PYTHON_TYPES)
    options = [key for key in signature if key not in (*command.positional, *PYTHON_ONLY)]
    parameters = [_positional(signature[key], hints[key], helps.get(key)) for key in command.positional]
    parameters += [_option(key, hints[key], signature[key].default, helps.get(key)) for key in options]
    return parameters + ([_option("no_verify", bool, False, NO_VERIFY)] if command.opens_weights else [])


def _positional(parameter: inspect.Parameter, hint: Any, description: str | None) -> inspect.Parameter:
    """A parameter given by position: one value, or any number where the function takes a list."""
    typed = _on_the_command_line(hint)
    required = parameter.default is inspect.Parameter.empty and type(None) not in typing.get_args(hint)
    about = Parameter(help=description, required=required)
    if typing.get_origin(typed) is list:
        annotation = Annotated[typing.get_args(typed)[0], about]
        return inspect.Parameter(parameter.name, inspect.Parameter.VAR_POSITIONAL, annotation=annotation)
    default, annotation = (parameter.default, typed) if required else (None, typed | None)
    return parameter.replace(kind=inspect.Parameter.POSITIONAL_ONLY, default=default, annotation=Annotated[annotation, about])


def _option(name: str, hint: Any, default: Any, description: str | None) -> inspect.Parameter:
    """A parameter given as --name VALUE, or several values where the function takes a list."""
    typed = _on_the_command_line(hint)
    several = typing.get_origin(typed) is list
    about = Parameter(
        help=description,
        required=default is inspect.Parameter.empty,
        show_default=default is not False and default not in (None, ()),
        negative=(),  # no --no-name
        consume_multiple=1 if several else None,  # one value at least
        # Of a flag that is given twice the last value counts. Of a list that would not be clear
        allow_repeating=not several,
        converter=_numbers if {int, float} & {typed, *typing.get_args(typed)} else None,
        json_list=False,
        json_dict=False,
    )
    annotation = Annotated[typed if default is not None else typed | None, about]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _in_usage(parameter: inspect.Parameter) -> str:
    """A parameter in the usage line; nothing for an option that may be left out."""
    about = typing.get_args(parameter.annotation)[1]
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        return f"--{parameter.name.replace('_', '-')} VALUE" if about.required else ""
    shown = parameter.name.upper() + ("..." if parameter.kind is inspect.Parameter.VAR_POSITIONAL else "")
    return shown if about.required else f"[{shown}]"


def _on_the_command_line(hint: Any) -> Any:
    """The type of a value that is typed: str of what may be a str, a list of any sequence, and never None."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, collections.abc.Sequence):
        return list[_on_the_command_line(members[0])]
    if origin is tuple or origin is Literal or not members:
        return hint
    if str in members:
        return str
    (member,) = (member for member in members if member is not type(None))
    return _on_the_command_line(member)


def _numbers(hint: Any, tokens: Sequence[Token]) -> Any:
    """What int or float makes of a flag's values. cyclopts alone would round 3.7, and take the word none for None."""
    number = (typing.get_args(hint) or (hint,))[0]
    values = []
    for token in tokens:
        try:
            values.append(number(token.value))
        except ValueError:
            raise exceptions.CoercionError(token=token, target_type=number) from None
    return values[0] if hint is number else (typing.get_origin(hint) or list)(values)


def _paragraphs(text: str | None) -> str:
    """A docstring's text with a line break between paragraphs alone; help is wrapped to the terminal's width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


def _explain(error: exceptions.CycloptsError, tokens: Sequence[str], command: Command) -> str:
    """In words, what is wrong with which token."""
    name = error.argument.name if error.argument is not None else ""
    if isinstance(error, exceptions.UnknownOptionError):
        unknown = error.token.keyword or error.token.value
        known = [option for argument in error.argument_collection for option in argument.names if option.startswith("--")]
        near = [option for option in known if option.startswith(unknown)] or difflib.get_close_matches(unknown, known, n=1)
        advice = f"; did you mean {near[0]}?" if near and unknown.startswith("--") else ""
        if not advice and "overrides" in command.positional:
            advice = "; a key of the config is written without dashes, such as train.steps=100"
        return f"{unknown}: unknown option{advice}"
    if isinstance(error, exceptions.UnusedCliTokensError):
        return f"{error.unused_tokens[0]!r}: one argument too many"
    if isinstance(error, exceptions.RepeatArgumentError):
        return f"{error.token.keyword}: given twice; give it once, with all its values"
    if isinstance(error, exceptions.CoercionError) and error.token is not None:
        choices = ", ".join(map(str, typing.get_args(error.target_type)))
        expected = f"valid: {choices}" if choices else f"give {IN_WORDS.get(error.target_type, 'another value')}"
        return f"{error.token.keyword or name} {error.token.value!r}: {expected}"
    if isinstance(error, exceptions.MissingArgumentError):
        count = error.argument.token_count()[0]
        if name.startswith("--") and any(token.partition("=")[0] == name for token in tokens):
            return f"{name}: give {count} values" if count > 1 else f"{name}: give a value"
        description = (error.argument.parameter.help or "a value").partition(". ")[0].removesuffix(".")
        return f"{name}: missing; give {description}"
    return str(error)
