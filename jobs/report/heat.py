"""Heat maps of a load over its mean, each a small PNG within the page.

Blue is less than the mean, red more, and the mean itself is transparent: so one image is right on light and on dark.
"""

import struct
import zlib
from base64 import b64encode

import numpy as np
from markupsafe import Markup

from moray.jobs.report.chart import human

LEVELS = 16
"""So many steps lead to the strongest colour, either way."""
EXPERTS, DEVICES = 2, 1
"""The strongest colours are so many halvings and doublings of the mean: devices hold many experts, and differ less."""
LEAST, MOST = (36, 112, 235), (222, 52, 28)
COLUMNS = 240


def shades(ratios: np.ndarray, doublings: int) -> np.ndarray:
    """A load over its mean as an index of the palette: LEVELS is the mean, 0 so many halvings, 2 LEVELS doublings.

    What is not finite is shown as the mean.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.clip(np.log2(ratios), -doublings, doublings) * (LEVELS / doublings)
    return (np.nan_to_num(np.rint(level)) + LEVELS).astype(np.uint8)


def png(shades_RC: np.ndarray) -> bytes:
    """The image of these indices, a pixel each."""
    strengths = range(-LEVELS, LEVELS + 1)
    palette = b"".join(bytes(LEAST if strength < 0 else MOST) for strength in strengths)
    alpha = bytes(round(255 * abs(strength) / LEVELS) for strength in strengths)
    rows, columns = shades_RC.shape
    lines = np.pad(shades_RC, ((0, 0), (1, 0)))  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"tRNS", alpha), (b"IDAT", zlib.compress(lines.tobytes(), 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in (*chunks, (b"IEND", b"")))


def over_mean(values: np.ndarray) -> np.ndarray:
    """Over the mean of the last dimension; 1 where that is zero."""
    mean = values.mean(-1, keepdims=True)
    return np.divide(values, mean, out=np.ones_like(values), where=mean > 0)


def over_time(steps: np.ndarray, ratios_SR: np.ndarray) -> np.ndarray:
    """[R, C] of [S, R]: columns of as many steps each, with what the nearest of `steps` had."""
    at = np.linspace(steps[0], steps[-1], min(len(steps), COLUMNS))
    nearest = np.abs(np.subtract.outer(steps, at)).argmin(0)
    return ratios_SR[nearest].T


def heat_map(ratios_RC: np.ndarray, doublings: int, row: str, columns: tuple[str, int, int], height: int) -> Markup:
    """An image with what its rows and columns are, a pixel a row at least.

    row: the name of a row, of which the number follows. columns: that of a column, the first number and the last.
    """
    rows, (column, first, last) = len(ratios_RC), columns
    alt = (
        f"load over the mean of {row} 0 to {rows - 1}, {column} {first} to {last}: between "
        f"{human(float(ratios_RC.min()))} and {human(float(ratios_RC.max()))}"
    )
    return Markup(
        '<div class="heat" data-row="{}" data-column="{}" data-first="{}" data-last="{}" data-doublings="{}">'
        '<span class="rows"><span>{} 0</span><span>{}</span></span>'
        '<img alt="{}" style="height:{}px" src="data:image/png;base64,{}">'
        '<span class="ends"><span>{} {:,}</span><span>{:,}</span></span></div>'
    ).format(
        row, column, first, last, doublings, row, rows - 1 or "", alt, max(rows, height),
        b64encode(png(shades(ratios_RC, doublings))).decode(), column, first, last,
    )  # fmt: skip


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
