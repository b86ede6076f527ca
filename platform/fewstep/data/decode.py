"""Encoded images into pixels as people see them, and pixels into encoded images."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from fewstep.texts import one_line

FORMATS = ("PNG", "JPEG", "WEBP")
MODES = {1: "L", 3: "RGB"}
WHITE = (255, 255, 255)
MAX_PIXELS = 100_000_000
# Pillow lets other threads run only inside the codec: below this many pixels the threads wait for each other.
_THREAD_PIXELS = 64 * 64

# What a picture needed before its pixels were those that people see.
TURNED = "turned as the EXIF tag says"
LAID = "with transparency, laid over the background"
COLOURS = "converted to sRGB from CMYK or from another colour profile"
DEPTH = "of 16 bits a grey value, scaled to 8"
FRAME = "animated, of which the first frame is taken"
ENLARGED = "smaller than size, enlarged"


class CorruptImage(ValueError):
    """Bytes that are no image of the set; the text is the reason."""


class OtherSize(CorruptImage):
    """An image of another size than the set's."""


# What Pillow raises over bad bytes, by codec and by how they are bad.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error,
                 Image.DecompressionBombError)  # fmt: skip


def corrupt(error: BaseException) -> CorruptImage:
    """One of PILLOW_ERRORS as the reason why a row cannot be used: the same text each time."""
    if isinstance(error, CorruptImage):
        return error
    return CorruptImage(one_line(error))


@dataclass(frozen=True)
class Picture:
    """A picture as people see it. pixels: uint8 (C, H, W). changes: the constants above that apply to its file."""

    pixels: np.ndarray
    changes: tuple[str, ...]


def read_picture(
    data: bytes,
    channels: int,
    *,
    size: tuple[int, int] | None = None,
    fit: int | None = None,
    background: tuple[int, int, int] = WHITE,
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """The picture in a PNG, JPEG or WebP file, as a viewer shows it.

    It is turned as its EXIF tag says, laid over `background` (RGB) where it is transparent, and converted to sRGB; of
    an animated file it is the first frame. Then it is made grey (channels 1) or RGB (channels 3).
    size: (H, W) that it must have. fit: resize the shorter side to this many pixels and crop the centre.
    max_pixels: more are refused where size is None. Both are compared with the file's header before pixels are
    unpacked, so that a forged or huge file costs no memory.
    Raises CorruptImage with the reason.
    """
    try:
        try:
            return _read(data, channels, size, fit, background, max_pixels)
        except ValueError as error:
            if not re.search("MAX_TEXT_(CHUNK|MEMORY)", str(error)):
                raise
            # Pillow refuses a PNG with megabytes of text or profile, which says nothing about its pixels.
            return _read(_without_text(data), channels, size, fit, background, max_pixels)
    except PILLOW_ERRORS as error:
        raise corrupt(error) from None


def _read(
    data: bytes,
    channels: int,
    size: tuple[int, int] | None,
    fit: int | None,
    background: tuple[int, int, int],
    max_pixels: int,
) -> Picture:
    with _open_image(data) as image:
        if size is None and image.width * image.height > max_pixels:
            raise CorruptImage(f"{image.height}x{image.width} pixels in its header, more than max_pixels={max_pixels}")
        # a turned picture's header has its sides the other way round
        if size is not None and size not in (image.size, image.size[::-1]):
            raise _other_size(image.size, size)
        changes = []
        if getattr(image, "is_animated", False):
            changes.append(FRAME)
        if fit is not None:
            image.draft(MODES[channels], (2 * fit, 2 * fit))  # a JPEG may be unpacked at a half, a quarter, ...
        image.load()
        picture: Image.Image = image
        if (orientation := _orientation(image)) in _TURNS:
            changes.append(TURNED)
            picture = image.transpose(_TURNS[orientation])
        if size is not None and picture.size != size[::-1]:
            raise _other_size(picture.size, size)
        if picture.mode not in ("L", "RGB") or image.info.keys() & {"transparency", "icc_profile"}:
            picture = _opaque(picture, image.info, background, changes)
        if picture.mode != MODES[channels]:
            picture = picture.convert(MODES[channels])
    if fit is not None:
        if min(picture.size) < fit:
            changes.append(ENLARGED)
        picture = ImageOps.fit(picture, (fit, fit), Image.Resampling.LANCZOS)
    pixels = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, channels)
    return Picture(pixels.transpose(2, 0, 1), tuple(changes))


def _open_image(data: bytes) -> ImageFile:
    """The file with its header read. Its class is called directly: Image.open has a limit of its own on pixels, and
    takes the two pictures of a stereo JPEG for an animation."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(io.BytesIO(data))
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(io.BytesIO(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile(io.BytesIO(data))
    raise CorruptImage(f"no {', '.join(FORMATS)} file")


def _other_size(actual: tuple[int, int], wanted: tuple[int, int]) -> OtherSize:
    return OtherSize(f"{actual[1]}x{actual[0]} pixels where the set has {wanted[0]}x{wanted[1]}")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: ImageFile) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none, or none that can be read. A PNG must be loaded."""
    if not image.info.keys() & {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}:
        return 1
    try:
        orientation = image.getexif().get(0x0112)
    except PILLOW_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _opaque(picture: Image.Image, info: dict, background: tuple[int, int, int], changes: list[str]) -> Image.Image:
    """A loaded picture of any mode in mode L or RGB: 8 bits, in sRGB, transparent parts laid over the background."""
    alpha = None
    if picture.mode.startswith("I"):  # 16 bits a grey value; Pillow's own conversion clips at 255
        values, key = np.asarray(picture).astype(np.int64), info.get("transparency")
        alpha = None if key is None else Image.fromarray((255 * (values != key)).astype(np.uint8))
        picture = Image.fromarray((values >> 8).astype(np.uint8))
        changes.append(DEPTH)
    elif picture.has_transparency_data:
        grey = picture.mode in ("1", "L", "LA")
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB").convert("L" if grey else "RGB")
    elif picture.mode in ("1", "P"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    transform = _to_srgb(info.get("icc_profile") or b"", picture.mode)
    if transform is not None or picture.mode == "CMYK":
        changes.append(COLOURS)
        picture = picture.convert("RGB") if transform is None else ImageCms.applyTransform(picture, transform)
    if alpha is not None and alpha.getextrema()[0] < 255:
        changes.append(LAID)
        picture = Image.composite(picture.convert("RGB"), Image.new("RGB", picture.size, background), alpha)
    return picture


@lru_cache(64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a colour profile into sRGB; None where it alters nothing, and where the profile is unusable or
    of another mode, which viewers ignore too."""
    if not profile or mode not in ("RGB", "CMYK"):
        return None
    try:
        transform = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        steps = np.linspace(0, 255, 9).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(81, 9, 3)
        moved = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform)).astype(int) - cube
    except (ImageCms.PyCMSError, *PILLOW_ERRORS):
        return None
    return transform if np.abs(moved).max() > 2 else None  # one of the many spellings of sRGB


def _without_text(data: bytes) -> bytes:
    """A PNG file without its texts and its colour profile."""
    kept, at = [data[:8]], 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def decode(data: bytes, size: tuple[int, int, int]) -> np.ndarray:
    """The pixels of a PNG, JPEG or WebP file as `read_picture` has them: uint8 (C, H, W).

    size: (C, H, W) that it must have; colours are converted to C = 1 (grey) or 3 (RGB), the picture is never resized.
    Raises CorruptImage with the reason.
    """
    return read_picture(data, size[0], size=tuple(size[1:])).pixels


def size_of(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of an image as people see it. Raises CorruptImage."""
    return read_picture(data, 1, max_pixels=max_pixels).pixels.shape[1:]


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
