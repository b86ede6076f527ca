"""The command line of a job: `key.sub=value` arguments, --help, and one way to report a mistake."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..texts import masked, quoted
from .keys import help_text, names
from .reading import ConfigError, UserError, parse_yaml
from .settings import Strict, nearest, override_all, validate

FORM = "arguments have the form key=value or key.sub=value, such as seed=1"


def parse_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """`key.sub=value` arguments as {dotted key: value}; values are YAML.

    Raises ConfigError for an argument of another form, a key given twice, or a value with a comment in it.
    """
    values: dict[str, Any] = {}
    wrong = []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals or not all(key.split(".")):
            wrong.append(f"{quoted(argument)}: {FORM}")
        elif key in values:
            wrong.append(f"{key}: given twice")
        elif text.startswith("#") or (" #" in text and text[0] not in "'\"[{"):
            wrong.append(f"{key}: a # begins a comment; put the value in quotes: '{key}=\"{text}\"'")
        else:
            try:
                values[key] = parse_yaml(text, key)
            except ConfigError as error:
                wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return values


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Prints an error that the user can mend as it is, without a traceback, and exits with status 2.

    Those are UserError, ValueError, OSError and FloatingPointError. Ctrl-C exits with status 130. The environment
    variable FEWSTEP_TRACEBACK=1 keeps tracebacks.
    """
    try:
        yield
    except BrokenPipeError:  # the reader, such as `head`, has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (UserError, ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("FEWSTEP_TRACEBACK"):
            raise
        print(_message(error), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _message(error: Exception) -> str:
    """The error's text, its secrets masked; of the system's own errors the file and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return masked(f"{error.filename}: {error.strerror}")
    return masked(str(error)) or type(error).__name__


class Command:
    """A job as people start it: reads the command line, answers --help, and reports mistakes.

    main: called with the settings; and where `others` is given, with the other arguments as {dotted key: value}. It
    returns the exit status, None for 0. others: the model that those are keys of.
    """

    def __init__(self, main: Callable[..., int | None], settings: type[Strict], others: type[Strict] | None = None):
        self.main, self.settings, self.others = main, settings, others
        self.doc = (main.__globals__.get("__doc__") or settings.__doc__ or "").strip()

    def __call__(self, argv: Sequence[str] | None = None) -> None:
        """Runs the job, by default with the process's arguments. Raises SystemExit for a status other than 0."""
        argv = sys.argv[1:] if argv is None else argv
        with plain_errors():
            if {"--help", "-h"} & set(argv):
                prefixes = [argument for argument in argv if "=" not in argument and not argument.startswith("-")]
                print(help_text(self.doc, self.models, prefixes))
                sys.stdout.flush()
                return
            status = self.main(*self.read(argv))
        if status:
            raise SystemExit(status)

    @property
    def models(self) -> list[type[Strict]]:
        """The models whose keys the job takes, its own first."""
        return [self.settings, *([self.others] if self.others else [])]

    def read(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The arguments of `main`. `--dry-run` stands for `dry_run=true`. Raises ConfigError with every mistake."""
        own = names(self.settings)
        flags = {f"--{name.replace('_', '-')}": name for name, kind in own.items() if kind is bool}
        unknown = [
            argument for argument in argv if argument.startswith("-") and "=" not in argument and argument not in flags
        ]
        if unknown:
            hint = nearest(unknown[0], [*flags, "--help"])
            raise ConfigError("\n".join(f"{argument}: no such option; {hint}" for argument in unknown))
        given = parse_arguments([f"{flags[argument]}=true" if argument in flags else argument for argument in argv])
        if self.others is None:
            return (validate(self.settings, override_all({}, given)),)
        known = [*own, *names(self.others)]
        mine = {}
        for key in list(given):
            head = key.split(".")[0]
            near = difflib.get_close_matches(head, known, n=1)
            if head in own or (head not in known and near and near[0] in own):  # a slip in one of the job's own keys
                mine[key] = given.pop(key)
        return validate(self.settings, override_all({}, mine)), given


def command(
    settings: type[Strict], others: type[Strict] | None = None
) -> Callable[[Callable[..., int | None]], Command]:
    """Makes a function a Command, which reads its arguments as `settings`."""
    return lambda main: Command(main, settings, others)
