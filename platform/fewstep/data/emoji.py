"""Emoji: drawings that three published sets have under the same names, as pictures with captions."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.config import ConfigError, parse_json
from fewstep.data.decode import CorruptImage, read_picture
from fewstep.data.plan import mix
from fewstep.data.source import IMAGE_BYTES, PLAIN, Example, Reading, Source, SourceError, read_image
from fewstep.data.tars import members
from fewstep.texts import one_line

SIZE = 64
MARGIN = 1 / 16  # of the drawing's side, on each side of it, so that the background shows
COLOURS = {
    "white": (255, 255, 255), "grey": (150, 150, 150), "black": (20, 20, 20), "red": (220, 50, 50),
    "yellow": (250, 220, 90), "green": (80, 180, 90), "blue": (70, 130, 230), "purple": (150, 80, 200),
}  # fmt: skip
NEEDED = ("package.json", "icons.json", "metadata.json")
_HELD_OUT = 5  # the stream of hashes that chooses the pairs of the test split


@dataclass(frozen=True)
class Style:
    """A set of drawings: its npm package, the package's version, its licence, and whom it names as its author."""

    package: str
    version: str
    licence: str
    author: str

    @property
    def archive(self) -> str:
        """The file that `npm pack` writes."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


STYLES = {
    "twemoji": Style("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter and other contributors"),
    "fluent": Style("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation"),
    "noto": Style("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc"),
}


def emoji(path: Path | None = None, split: str = "train", reading: Reading = PLAIN) -> Source:
    """Emoji of 64x64 in three styles on eight plain backgrounds; `caption` says which.

    The names are those that all three packages have. Of three names in ten one style is held out: these pairs are the
    split "test", so a tenth of all pairs, and every name and style is in "train"; "all" are both.
    path: a folder with the packages, as `npm pack` writes them or as `npm install` unpacks them below node_modules;
    None fetches them with npm. reading: its `groups` are those of names to take, all without any.
    Raises SourceError naming the package and the way out.
    """
    if split not in ("train", "test", "all"):
        raise SourceError(f"split: {split!r}; this set has train, test and all")
    if path is None:
        with tempfile.TemporaryDirectory(prefix="fewstep-emoji-") as folder:
            _fetch(Path(folder))
            drawings = {key: _drawings(Path(folder), style, reading.groups) for key, style in STYLES.items()}
    else:
        drawings = {key: _drawings(path, style, reading.groups) for key, style in STYLES.items()}
    names = sorted(set.intersection(*map(set, drawings.values())))
    pairs = [(name, style) for name in names for style in STYLES]
    if split != "all":
        pairs = [(name, style) for name, style in pairs if (held_out(name) == style) == (split == "test")]

    def examples() -> Iterator[Example]:
        for name, style in pairs:
            picture = rasterised(drawings[style][name])
            for colour, rgb in COLOURS.items():
                pixels = read_picture(picture, 3, background=rgb).pixels
                yield Example(f"{style} {name} on {colour}", pixels, caption=caption(name, style, colour))

    info = {"source": "emoji", "split": split, "names": len(names), "held_out": "one style of three names in ten"}
    info["groups"] = list(reading.groups)
    info["sets"] = [
        {"style": key, "package": f"{s.package}@{s.version}", "licence": s.licence, "author": s.author}
        for key, s in STYLES.items()
    ]
    where = "npm" if path is None else str(path)
    return Source(
        len(pairs) * len(COLOURS), examples, (3, SIZE, SIZE), captions=True, where=where, info=info, path=path,
        notes=("drawings laid over a plain background",),
    )  # fmt: skip


def caption(name: str, style: str, colour: str) -> str:
    """The caption of a picture. name: as the packages spell it, such as red-heart."""
    return f"{name.replace('-', ' ')}, in {style} style, on a {colour} background"


def held_out(name: str) -> str | None:
    """The style in which a name is only in the test split; None for seven names in ten."""
    number = int(mix(_HELD_OUT, *name.encode())[0])
    return list(STYLES)[number % 3] if number // 3 % 10 < 3 else None


def rasterised(svg: str) -> bytes:
    """A PNG of 64x64 pixels, transparent where nothing is drawn. Raises CorruptImage where `svg` is no SVG."""
    import resvg_py

    try:
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
    except ValueError as error:
        raise CorruptImage(one_line(error)) from None


def _fetch(folder: Path) -> None:
    """Downloads the packages with the npm client into a folder. Raises SourceError naming the package."""
    for style in STYLES.values():
        wanted = f"{style.package}@{style.version}"
        try:
            done = subprocess.run(
                ["npm", "pack", wanted, "--silent", "--pack-destination", folder], capture_output=True, text=True
            )
        except OSError as error:
            raise SourceError(f"emoji: {wanted}: npm cannot be run ({error.strerror}); {_remedy(style)}") from None
        if done.returncode:
            reason = one_line(done.stderr) or f"npm ended with {done.returncode}"
            raise SourceError(f"emoji: {wanted}: the download failed ({reason}); {_remedy(style)}")


def _remedy(style: Style) -> str:
    wanted = f"{style.package}@{style.version}"
    return f"run `npm pack {wanted}` where there is a network, and give path=<the folder with {style.archive}>"


def _drawings(folder: Path, style: Style, groups: Sequence[str] = ()) -> dict[str, str]:
    """The SVG texts of a package by name: those of some groups, or all but those of a skin tone. Raises SourceError."""
    files = _files(folder, style)
    drawings = {}
    try:
        package, icons, metadata = (
            parse_json(files[name], f"{style.package}/{name}", limit=IMAGE_BYTES) for name in NEEDED
        )
        if package["version"] != style.version:
            raise SourceError(f"path: {folder} has {style.package} {package['version']}; {_remedy(style)}")
        known = metadata["categories"]
        if unknown := [group for group in groups if group not in known]:
            raise SourceError(f"groups: {unknown[0]!r} is not one of {', '.join(known)}")
        wanted = {name for group in groups for name in known[group]} if groups else icons["icons"].keys()
        for name, icon in icons["icons"].items():
            if name in wanted and "skin-tone" not in name:
                drawings[name] = _svg({key: icons.get(key) for key in ("width", "height")} | icon)
    except SourceError:
        raise
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"path: {style.package} in {folder} is damaged ({one_line(error)}); {_remedy(style)}"
        ) from None
    return drawings


def _files(folder: Path, style: Style) -> dict[str, bytes]:
    """package.json and icons.json of a package, from its archive or its unpacked folder."""
    archive = folder / style.archive
    for unpacked in (folder / style.package, folder / "node_modules" / style.package):
        if all((unpacked / name).is_file() for name in NEEDED):
            files: dict[str, Any] = {name: read_image(unpacked / name) for name in NEEDED}
            break
    else:
        if not archive.is_file():
            raise SourceError(f"path: no {style.archive} in {str(folder)!r}; {_remedy(style)}")
        inside = members(archive, lambda name: IMAGE_BYTES * (name.removeprefix("package/") in NEEDED))
        files = {name.removeprefix("package/"): data for name, data in inside if data}
    missing = [name for name in NEEDED if not isinstance(files.get(name), bytes)]
    if missing:
        raise SourceError(f"path: {style.package} in {folder} has no readable {missing[0]}; {_remedy(style)}")
    return files


def _svg(icon: dict[str, Any]) -> str:
    """A drawing with its margin as an SVG text; the package holds its body and its size alone."""
    width, height, left, top = (float(icon.get(key) or 0) for key in ("width", "height", "left", "top"))
    side = max(width, height)
    edge = side * MARGIN
    corner, whole = (left - (side - width) / 2 - edge, top - (side - height) / 2 - edge), side + 2 * edge
    box = f"{corner[0]:g} {corner[1]:g} {whole:g} {whole:g}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
