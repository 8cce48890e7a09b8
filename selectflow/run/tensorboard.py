"""TensorBoard: the metrics of a run under the names of metrics.jsonl, and its samples.

The only file that imports tensorboard, and only if it is switched on (extra `tensorboard`). The
files are in `tensorboard/` of the run directory: `tensorboard --logdir runs` shows all runs there.
TensorBoard draws over steps and time; over samples, `selectflow watch` does.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from selectflow.fields import ConfigError
from selectflow.run.metrics import STEP

NAME = "TensorBoard"
_FOLDER = "tensorboard"
_COLUMNS = 8  # of pictures beside each other
_SIDE = 64  # pixels of a picture, at most


def check_installed() -> None:
    """Refuse a run that asks for TensorBoard where it is not installed.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "track.tensorboard must be false where the package tensorboard is not installed, got "
            "true; pip install 'selectflow[tensorboard]'"
        )


class Writer:
    """Writes events of a run.

    What an earlier process of it wrote from the first step on that is logged here did not happen.

    Args:
        run_dir: directory of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / _FOLDER
        self._events: Any = None
        self.step = 0  # of the last metrics

    def open(self, step: int | None = None) -> Any:
        """The writer of torch, at a step, or at the last one."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self.step = self.step if step is None else step
        if self._events is None:
            self._events = SummaryWriter(str(self._folder), purge_step=self.step)
        return self._events


def log(run: Writer, metrics: Mapping[str, float | int]) -> None:
    """Write the metrics of one step, as float32: TensorBoard does not show float64."""
    step = int(metrics[STEP])
    events = run.open(step)
    for name, value in metrics.items():
        if name != STEP:
            events.add_scalar(name, value, step, new_style=True)
    events.flush()


def show(run: Writer, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Write samples as a table, and their pictures by "end" (highest, lowest) as one sheet."""
    if not rows:
        return
    events, pictures = run.open(), dict[str, list[bytes]]()
    for row in rows:
        if row.get("png") is not None:
            pictures.setdefault(str(row.get("end", "all")), []).append(row["png"])
    for end, pngs in pictures.items():
        events.add_image(f"{name}/{end}", _sheet(pngs), run.step, dataformats="HWC")
    events.add_text(f"{name}/table", _table(rows), run.step)
    events.flush()


def finish(run: Writer, summary: Mapping[str, Any], run_dir: Path) -> None:
    """Close the files."""
    del summary, run_dir  # TensorBoard has no place for them
    run.open().close()


def _sheet(pngs: Sequence[bytes]) -> Any:
    """Pictures in rows, of shape (H, W, 3)."""
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    cell = _SIDE + 2
    sheet = Image.new("RGB", (cell * min(_COLUMNS, len(pngs)), cell * -(-len(pngs) // _COLUMNS)))
    for place, png in enumerate(pngs):
        with Image.open(io.BytesIO(png)) as image:
            shown = image.convert("RGB")
        shown.thumbnail((_SIDE, _SIDE))
        sheet.paste(shown, (cell * (place % _COLUMNS), cell * (place // _COLUMNS)))
    return np.asarray(sheet)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table of Markdown, in which nothing of the data is markup."""
    columns = [column for column in rows[0] if column != "png"]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    """A value as one line, each character of punctuation as its number in HTML."""
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    one_line = " ".join(text.split())
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in one_line)
