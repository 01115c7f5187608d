"""The spacecraft: eleven points, the faces between eight of them, and a rod to each of the other three.

Points 1-4 and 5-8 are two parallel rectangles of unequal size, 9-11 the tips of antennas, in metres. The real ones are
those of Tango, the target of SPEED (Stanford's SLAB, MIT licence; ``tangoPoints.mat`` with ``tango3Dpoints [3, 11]``).
Where that file is absent, :func:`own_spacecraft` makes a body of similar size from a seed.

Tango's body is its own mirror image in x, and a picture of it would have two poses. So every face has a paint of its
own, and three have a mark off their middle (our choice).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from postlude.errors import DataError, MissingDependencyError

__all__ = ["FACES", "Spacecraft", "find_tango", "own_spacecraft", "read_keypoints"]

Array = NDArray[np.float64]

# Corners of the six faces, by index of the point.
FACES = ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7))


@dataclasses.dataclass(frozen=True)
class Spacecraft:
    """A body.

    Attributes:
        keypoints: ``[11, 3]`` in metres.
        name: where they come from.
    """

    keypoints: Array
    name: str

    def __post_init__(self) -> None:
        points = np.asarray(self.keypoints, dtype=np.float64)
        if points.shape != (11, 3) or not np.isfinite(points).all():
            raise DataError(
                f"the key points of {self.name} have shape {list(points.shape)}; expected 11 finite points of 3 "
                "coordinates: two rectangles of four, then three tips of antennas"
            )
        object.__setattr__(self, "keypoints", points)

    def rods(self) -> list[tuple[Array, Array]]:
        """Foot and tip of every antenna; the foot is the nearest point well inside the body's bounds."""
        low, high = self.keypoints[:8].min(0), self.keypoints[:8].max(0)
        centre, half = (low + high) / 2, 0.9 * (high - low) / 2
        return [(np.clip(tip, centre - half, centre + half), tip) for tip in self.keypoints[8:]]


def own_spacecraft(seed: int = 0) -> Spacecraft:
    """An asymmetric body of about 0.75 m from a seed."""
    random = np.random.default_rng([seed, 11])
    half_x, half_y = 0.36 + 0.04 * random.random(2)
    near, far = 0.25 + 0.05 * random.random(2)
    top = 0.28 + 0.06 * random.random()
    back = [(-half_x, -half_y), (-half_x, half_y), (half_x, half_y), (half_x, -half_y)]
    front = [(-half_x, -near), (-half_x, far), (half_x, far), (half_x, -near)]
    points = [(x, y, top) for x, y in back] + [(x, y, 0.0) for x, y in front]
    points += [
        (-half_x - 0.17, half_y + 0.10, top - 0.07),
        (half_x + 0.17, half_y + 0.10, top - 0.06),
        (half_x - 0.07, -half_y - 0.20, top - 0.07),
    ]
    return Spacecraft(np.array(points), f"own body of seed {seed}")


def read_keypoints(path: str | os.PathLike[str]) -> Spacecraft:
    """Tango's points from ``tangoPoints.mat``.

    Raises:
        DataError: the file is not there or holds no such points.
        MissingDependencyError: scipy, which reads the format, is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingDependencyError(
            "reading a .mat file needs scipy: pip install scipy, or use own key points"
        ) from error
    file = Path(path)
    if not file.is_file():
        raise DataError(f"there is no file {file}; expected the key points as tangoPoints.mat")
    try:
        points = loadmat(file)["tango3Dpoints"]
    except (KeyError, ValueError, OSError, NotImplementedError) as error:
        raise DataError(
            f"{file} cannot be read as a .mat file with tango3Dpoints [3, 11]: {error}"
        ) from error
    return Spacecraft(np.asarray(points, dtype=np.float64).T, "Tango")


def find_tango() -> Path | None:
    """``space/tangoPoints.mat`` in ``POSTLUDE_DATA`` (by default ``../shared/data``), where it is there."""
    file = Path(os.environ.get("POSTLUDE_DATA", "../shared/data")) / "space" / "tangoPoints.mat"
    return file if file.is_file() else None
