"""Results of runs that take long: kept in a file as they are made, and not made again."""

from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from typing import Any


class Finished(UserDict[str, Any]):
    """Results by place, such as "noised/plain/0", each a line of a file.

    Args:
        path: the file; made with its folder where it is not there yet.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self.data.update(map(json.loads, path.read_text().splitlines()))
        self._path = path

    def __setitem__(self, place: str, result: Any) -> None:
        super().__setitem__(place, result)
        with self._path.open("a") as file:
            file.write(json.dumps([place, result]) + "\n")
