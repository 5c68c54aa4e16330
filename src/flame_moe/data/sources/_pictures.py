"""Picture files that a table names: found below a folder, read, and counted where they are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from flame_moe.batch import Observation
from flame_moe.data.imaging import read_picture
from flame_moe.errors import DataError


@dataclass(frozen=True)
class Pictures:
    """Image files below a folder.

    Attributes:
        root: where they lie. The paths of the table are of the machine that wrote it: the longest end of a path that
            exists below the folder is taken.
        shape: (height, width, 1) of the result.
        mirror: whether right breasts are mirrored, so that all chest walls are on the left.
        skip: whether a file that cannot be read counts as missing; otherwise it stops the reading.
        alone: whether the only DICOM file anywhere below the first folder of a path will do, where the path itself is
            not there: download tools name the folders and files in between anew.

    Raises:
        DataError: if there is no such folder.
    """

    root: Path
    shape: tuple[int, int, int]
    mirror: bool
    skip: bool
    alone: bool = False

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise DataError("there is no folder of pictures", where=str(self.root), mend="Check the option 'pictures'.")

    def first(self, names: Iterable[str], side: str, tally: Counter[str]) -> Observation | None:
        """The first of these pictures that is there, or None; `tally` counts those that are not.

        Raises:
            DataError: if a file cannot be read and `skip` is off.
        """
        for name in names:
            path = self._find(name)
            if path is None:
                tally["picture file is not there, view left out"] += 1
                continue
            try:
                pixels = read_picture(path, self.shape, flip=self.mirror and side == "R")
            except DataError:
                if not self.skip:
                    raise
                tally["picture file cannot be read, view left out"] += 1
                continue
            return Observation(pixels[None], np.zeros(1, dtype=np.float32))
        return None

    def _find(self, name: str) -> Path | None:
        parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", "..")]
        places = (self.root.joinpath(*parts[i:]) for i in range(len(parts)))
        found = next((place for place in places if place.is_file()), None)
        if found is None and self.alone and parts:
            files = list((self.root / parts[0]).rglob("*.dcm"))
            found = files[0] if len(files) == 1 else None
        return found
