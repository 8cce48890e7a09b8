"""Images to pixels and back: one rule for what is read from shards and what is made into them."""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

_GREY = ("L", "1")
_ALPHA = ("LA", "PA", "La", "RGBA", "RGBa")


def read_image(source: bytes | Path, formats: tuple[str, ...] | None = None) -> Image.Image:
    """An image in grey (mode L) or RGB, upright.

    - Orientation: turned and mirrored as its EXIF data say.
    - 16 bits of grey become 8: divided by 257 and rounded, so that black and white stay.
    - Transparent pixels are laid on white.
    - Palettes, CMYK and other colours become RGB; without regard to colour profiles.

    Args:
        source: Contents of an image file, or where one is.
        formats: PIL's names of those that are taken; None: all.

    Raises:
        ValueError: Pixels whose range is not known (floats, 32-bit integers), or several frames.
        OSError: It is no whole image.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file, formats=formats) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            # the further frames of an MPO, a camera's JPEG, are previews and depths of the first
            raise ValueError("an animation or a file of several images")
        image.load()  # before EXIF data, which some files have behind the pixels
        if image.info:  # most PNG files have none, and asking costs
            _turn(image)
        return _plain(image)


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels of an image, by the rule of `read_image`, shape (1 or 3, height, width)."""
    pixels = np.asarray(_plain(image))
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def image_of(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """The image with these pixels, shape (1 or 3, height, width)."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _plain(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        if transparent is not None:
            raise ValueError("transparency in 16 bits of grey; convert it to 8 bits")
        levels = (np.asarray(image, dtype=np.uint32) + 128) // 257
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, of unknown range; convert to 8 bits")
    if image.mode in _ALPHA or transparent is not None:
        if isinstance(transparent, tuple) and max(transparent) > 255:
            raise ValueError("a transparent colour of 16 bits; convert it to 8 bits")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode in _GREY:
        return image if image.mode == "L" else image.convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _turn(image: Image.Image) -> None:
    with suppress(Exception):  # damaged EXIF data: PIL documents no closed list of errors
        ImageOps.exif_transpose(image, in_place=True)
