"""Encoded images and arrays of pixels, one into the other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
MODES = {1: "L", 3: "RGB"}
# Pillow lets other threads run only inside the codec: below this many pixels the threads wait for each other.
_THREAD_PIXELS = 64 * 64


class CorruptImage(ValueError):
    """Bytes that are no image, or an image of another size than the set's."""


# What Pillow raises over bad bytes, by codec and by how they are bad.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def corrupt(error: BaseException) -> CorruptImage:
    """One of PILLOW_ERRORS as the reason why a row cannot be used: the same text each time."""
    if isinstance(error, CorruptImage):
        return error
    if isinstance(error, UnidentifiedImageError):
        return CorruptImage(f"no {', '.join(FORMATS)} file")
    return CorruptImage(" ".join(str(error).split()) or type(error).__name__)


def decode(data: bytes, size: tuple[int, int, int]) -> np.ndarray:
    """The pixels of a PNG, JPEG or WebP file: uint8 (C, H, W).

    size: (C, H, W) that it must have; colours are converted to C = 1 (grey) or 3 (RGB), the picture is never resized.
    The size in the header is compared before the pixels are unpacked, so a forged file costs no memory.
    Raises CorruptImage with the reason.
    """
    channels, height, width = size
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.size != (width, height):
                raise CorruptImage(f"{image.size[1]}x{image.size[0]} pixels where the set has {height}x{width}")
            if image.mode != MODES[channels]:
                image = image.convert(MODES[channels])
            pixels = np.frombuffer(image.tobytes(), np.uint8)
    except PILLOW_ERRORS as error:
        raise corrupt(error) from None
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def size_of(data: bytes) -> tuple[int, int, int]:
    """(C, H, W) from an image's header; C is 1 for grey pictures and 3 for all others. Raises CorruptImage."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return (1 if image.mode in ("1", "L") else 3, image.size[1], image.size[0])
    except PILLOW_ERRORS as error:
        raise corrupt(error) from None


def decode_all(
    blobs: Sequence[bytes | None], size: tuple[int, int, int], pool: Executor | None = None, threads: int = 1
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Many images: uint8 (n, C, H, W), and (index, reason) of those that are corrupt; their pixels are zero."""
    pixels = np.zeros((len(blobs), *size), np.uint8)

    def span(start: int, stop: int) -> list[tuple[int, str]]:
        bad = []
        for i in range(start, stop):
            try:
                pixels[i] = decode(blobs[i] or b"", size)
            except CorruptImage as error:
                bad.append((i, str(error)))
        return bad

    if pool is None or threads < 2 or size[1] * size[2] < _THREAD_PIXELS:
        return pixels, span(0, len(blobs))
    cuts = np.linspace(0, len(blobs), threads + 1).astype(int).tolist()
    parts = pool.map(span, cuts[:-1], cuts[1:])
    return pixels, [bad for part in parts for bad in part]


def encode(pixels: np.ndarray, format: str = "png") -> bytes:
    """A file of uint8 (C, H, W) pixels; png and webp keep every pixel, jpeg (quality 95, full colour) does not."""
    picture = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(picture))
    options = {
        "png": {"optimize": True},
        "jpeg": {"quality": 95, "subsampling": 0},
        "webp": {"lossless": True},
    }[format]
    buffer = io.BytesIO()
    image.save(buffer, format.upper(), **options)
    return buffer.getvalue()
