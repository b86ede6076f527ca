"""Paths that people write: one rule for what jobs read, one for what they write, wherever a job runs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from .reading import ConfigError

ASSETS = Path(__file__).parents[1] / "assets"


def home() -> Path:
    """The folder in which jobs write, and find what earlier jobs wrote: FEWSTEP_HOME, else the working directory.

    A job that was submitted with --working-dir runs in a copy of that folder, which Ray removes: its home is
    ~/fewstep.
    """
    if os.environ.get("FEWSTEP_HOME"):
        return Path(os.environ["FEWSTEP_HOME"]).expanduser().absolute()
    here = Path.cwd()
    return Path.home() / "fewstep" if "runtime_resources" in here.parts else here


def resolve(path: str | Path) -> Path:
    """Absolute path of a file or folder to read; `shipped:x` is x in the package's embedded defaults.

    A relative path is looked for in the working directory, which travels along with a submitted job, and then in
    `home`. Raises ConfigError for one that is in both, for an empty path, for a URL, and for the home of a user who is
    not known here.
    """
    path = _expanded(path)
    here, there = Path.cwd() / path, home() / path
    if here == there or not os.path.exists(here):
        return there
    if os.path.exists(there) and not os.path.samefile(here, there):
        raise ConfigError(f"{str(path)!r} is there twice, as {here} and as {there}; give the absolute path of one")
    return here


def resolve_out(path: str | Path) -> Path:
    """Absolute path of a file or folder to write; a relative one lies in `home`. Raises ConfigError as `resolve`."""
    return home() / _expanded(path)


def resolve_ref(ref: str | Path) -> Path | str:
    """A URL such as s3://bucket/x as it is, and anything else as `resolve` has it."""
    return str(ref) if "://" in str(ref) else resolve(ref)


def resolve_out_ref(ref: str | Path) -> Path | str:
    """A URL such as s3://bucket/x as it is, and anything else as `resolve_out` has it."""
    return str(ref) if "://" in str(ref) else resolve_out(ref)


def checked(check: Callable[[str], Any]) -> AfterValidator:
    """Returns a validator of a settings field that calls `check` on its text and leaves the text unchanged."""
    return AfterValidator(lambda text: (check(text), text)[1])


def _expanded(path: str | Path) -> Path:
    text = str(path)
    if text.startswith("shipped:"):
        return ASSETS / text.removeprefix("shipped:")
    if url := re.match(r"([A-Za-z][\w+.-]+):/(/?)", text):
        way = "give a path of this machine" if url[2] else f"a URL has two slashes: {url[1]}://..."
        raise ConfigError(f"{text!r} is no path; {way}")
    if not text:
        raise ConfigError("an empty path; leave the key out, or give a path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{text!r}: {error}") from None


# Fields of settings, for which an error names the key
LocalPath = Annotated[str, checked(resolve)]
PathOrURL = Annotated[str, checked(resolve_ref)]
OutPath = Annotated[str, checked(resolve_out)]
OutPathOrURL = Annotated[str, checked(resolve_out_ref)]
