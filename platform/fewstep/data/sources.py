"""All sources by name, and how one is packed as shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ImageColor

from fewstep.data.decode import FORMATS, MAX_PIXELS, CorruptImage, OtherSize, read_picture, size_of
from fewstep.data.emoji import emoji
from fewstep.data.folder import folder
from fewstep.data.hub import parquet
from fewstep.data.known import cifar10, fashion_mnist
from fewstep.data.plan import mix
from fewstep.data.shards import Manifest, ShardWriter, refuse
from fewstep.data.source import Reading, Source, SourceError
from fewstep.data.tars import webdataset
from fewstep.storage.place import Place, Ref

_SELECT = 4  # the stream of hashes that chooses which rows a limit keeps

SOURCES: dict[str, Callable[[Path | None, str, Reading], Source]] = {
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "emoji": emoji,
    "folder": folder,
    "webdataset": webdataset,
    "parquet": parquet,
}


def pack(
    source: Source,
    out: Ref | Place,
    *,
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    channels: int = 3,
    format: str = "png",
    background: str = "white",
    max_pixels: int = MAX_PIXELS,
    max_corrupt: float = 0.001,
    overwrite: bool = False,
    **writer_options: int,
) -> Manifest:
    """Writes a source as shards and returns their manifest.

    limit: keep that many rows, chosen at random by the seed. size: resize the shorter side to it and crop the centre.
    channels: 1 or 3, of sources that are files. background: the colour, by name or #rrggbb, behind transparent parts.
    Files are kept byte for byte unless they are resized, or stored as people do not see them (ShardWriter); everything
    else is stored in `format`. A file that is no image, not of the set's size, or of more than max_pixels, is skipped
    and named in the manifest.
    overwrite: replace a shard set at `out`; the source, and a folder that holds it, are never replaced.
    Raises CorruptRows, naming every such file, and writes nothing, when more than max_corrupt of the rows are skipped.
    """
    chosen = np.ones(source.total, bool)
    if limit is not None and limit < source.total:
        chosen[np.argsort(mix(seed, _SELECT, np.arange(source.total)), kind="stable")[limit:]] = False
    behind = _colour(background)
    files = source.size is None
    shape = (channels, size, size) if files and size else source.size or _first_size(source, channels, max_pixels)
    allowed = int(max_corrupt * chosen.sum())
    skipped: list[str] = []
    way_out = "restore them or raise max_corrupt"
    writer = ShardWriter(
        out, shape, encoding="source" if files and not size else format, recode=format, background=behind,
        classes=source.classes, class_names=source.class_names, captions=source.captions, seed=seed,
        overwrite=overwrite, apart=(source.path,), **writer_options,
        source=source.info | {"rows": source.total, "limit": limit, "seed": seed},
    )  # fmt: skip
    writer.notes += source.notes
    with writer:
        for example, wanted in zip(source.examples(), chosen.tolist(), strict=True):
            if not wanted:
                continue
            try:
                image = example.image
                if isinstance(image, CorruptImage):
                    raise image
                if files and size:
                    picture = read_picture(image, channels, fit=size, background=behind, max_pixels=max_pixels)
                    writer.changes.update(picture.changes)
                    image = picture.pixels
                if len(skipped) > allowed:
                    writer.content(image)  # only the list of corrupt files is still wanted
                else:
                    writer.add(image, example.label, example.caption)
            except CorruptImage as error:
                if isinstance(error, OtherSize):
                    way_out = f"bring all to one size with size={min(shape[1:])} or another, or raise max_corrupt"
                skipped.append(f"{example.name}: {error}")
                writer.skip(skipped[-1])
        if len(skipped) > allowed:
            raise refuse(skipped, allowed, source.where, way_out=way_out)
    return writer.manifest


def _first_size(source: Source, channels: int, max_pixels: int) -> tuple[int, int, int]:
    reason = ""
    for example in source.examples():
        try:
            if isinstance(example.image, CorruptImage):
                raise example.image
            return (channels, *size_of(example.image, max_pixels))
        except CorruptImage as error:
            reason = reason or f"; the first, {example.name}: {error}"
    raise SourceError(f"path: no readable image in {source.where!r}; formats: {', '.join(FORMATS)}{reason}")


def _colour(background: str) -> tuple[int, int, int]:
    """A colour by its name or as #rrggbb."""
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError:
        raise SourceError(f"background: {background!r} is no colour; give white, black or #rrggbb") from None
