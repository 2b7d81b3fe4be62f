"""Pictures from files and addresses, as processors want them: 8-bit RGB."""

from __future__ import annotations

import http.client
import io
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST = 4  # pixels on the shorter side
LONGEST_ASPECT = 100
TIMEOUT_SECONDS = 20
_WEB = ("http://", "https://")


def open_image(source: str | Path) -> tuple[Image, str]:
    """A picture as 8-bit RGB.

    Args:
        source: a file, or an http(s) address.

    Returns:
        The picture, and a note on what was converted (empty if nothing was).

    Raises:
        ValueError: it is missing, unreachable, no picture, damaged, or too small or narrow to be looked at;
            the message names it and says what would work.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise RuntimeError("pictures need pillow: pip install 'popmm[vision]'") from error
    name = str(source)
    data = _download(name) if name.lower().startswith(_WEB) else _read(name)
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no picture of a known format: give a JPEG, PNG, WebP, GIF or TIFF file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error}") from None
    except Exception as error:  # decoders raise whatever their format's library does
        raise ValueError(f"{name} is damaged ({error}): save or download it again") from None
    width, height = image.size
    if min(width, height) < SMALLEST:
        raise ValueError(f"{name} has {width} x {height} pixels: give a picture of at least {SMALLEST} x {SMALLEST}")
    if max(width, height) > LONGEST_ASPECT * min(width, height):
        raise ValueError(
            f"{name} has {width} x {height} pixels: crop it so that no side is over {LONGEST_ASPECT} times the other"
        )
    return _to_rgb(image, name)


def _read(name: str) -> bytes:
    try:
        path = Path(name).expanduser()
        if not path.exists():
            raise ValueError(f"there is no file {name}: give the path of a picture, or an http(s) address")
        if not path.is_file():
            raise ValueError(f"{name} is no file: give the path of a picture")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # a name too long, an unknown ~user
        raise ValueError(f"{name[:80]} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _download(address: str) -> bytes:
    try:
        request = urllib.request.Request(address, headers={"User-Agent": "popmm"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        raise ValueError(f"{address} answered {error.code} {error.reason}: check the address") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{address} cannot be reached ({reason}): check the network, or give a file") from None


def _to_rgb(image: Image, name: str) -> tuple[Image, str]:
    """8-bit RGB: transparent parts on white, 16 bits scaled rather than cut off, turned as the camera was held."""
    from PIL import Image, ImageOps

    mode = image.mode
    image = ImageOps.exif_transpose(image)
    if mode == "RGB":
        return image, ""
    note = f"{name}: {mode} picture converted to RGB"
    if mode in ("I", "F") or mode.startswith("I;16"):
        import numpy as np

        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name} has mode {mode} with values outside 0 to 65535: save it as 8-bit RGB")
        if values.max() > 255 or mode.startswith("I;16"):
            values = values / 257
        elif values.max() <= 1 and mode == "F":
            values = values * 255
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB"), note
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB"), note
    try:
        return image.convert("RGB"), note
    except ValueError:
        raise ValueError(f"{name} has mode {mode}, which cannot be shown as RGB: save it as 8-bit RGB") from None
