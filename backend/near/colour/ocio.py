"""AgX through OpenColorIO with a Blender configuration at hand: the reference for the shipped table."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from near.errors import NearError


@lru_cache(maxsize=4)
def _processor(config_dir: str):
    try:
        import PyOpenColorIO as ocio
    except ImportError as error:
        raise NearError("ocio-missing", "OpenColorIO is not installed.", "pip install opencolorio, or use agx_srgb.") from error
    path = Path(config_dir)
    path = path / "config.ocio" if path.is_dir() else path
    try:
        view = ocio.DisplayViewTransform(src="Linear Rec.709", display="sRGB", view="AgX", looksBypass=True)
        return ocio.Config.CreateFromFile(str(path)).getProcessor(view).getDefaultCPUProcessor()
    except (ocio.Exception, ocio.ExceptionMissingFile) as error:
        raise NearError("ocio-config", f"The colour configuration {path} cannot be used ({error}).",
                        "Name the colormanagement folder of Blender 4.2 or later.") from error


def agx_srgb_ocio(rgb: np.ndarray, config_dir: str | Path) -> np.ndarray:
    """Linear Rec.709 [..., 3] to sRGB display values in [0, 1] with the configuration in ``config_dir``.

    Raises:
        NearError: ``ocio-missing``, ``ocio-config``.
    """
    flat = np.ascontiguousarray(rgb, np.float32).reshape(-1, 3).copy()
    if len(flat):
        _processor(str(config_dir)).applyRGB(flat)
    return np.clip(flat, 0, 1).reshape(np.shape(rgb))
