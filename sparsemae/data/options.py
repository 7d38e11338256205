"""What is done to every volume on its way into a store; kept in the store's index."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from sparsemae.config import Strict, floats, is_number

MAX_VOXELS = 2**29  # 2 GiB of float32


def _spacing(value: Any) -> Any:
    """One number of mm stands for three."""
    return floats([value] * 3 if is_number(value) else value)


def _pair(value: Any) -> Any:
    value = floats(value)
    if isinstance(value, tuple) and (len(value) != 2 or not value[0] < value[1]):
        raise ValueError("give two numbers, the lower one first")
    return value


class FilterConfig(Strict):
    """Which volumes are left out although they can be read."""

    field_of_view: PositiveFloat = 100.0  # mm, least extent of every axis
    spacing: PositiveFloat = 3.0  # mm, largest voxel size of any axis
    slices: PositiveInt = 16  # least voxels along every axis
    contrast: PositiveFloat = 0.02  # least (p99 - p1) / (|p99| + |p1|) of the foreground


class PreprocessConfig(Strict):
    """How volumes are brought to one form. Equal configs on equal files give equal stores."""

    spacing: (
        Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_spacing)]
        | None
    ) = (1.0, 1.0, 1.0)  # mm left-right, posterior-anterior, inferior-superior; None: each its own
    normalization: Literal["zscore", "percentile", "ct"] = "zscore"
    window: Annotated[tuple[float, float], BeforeValidator(_pair)] = (-1000.0, 1000.0)  # HU, of ct
    dtype: Literal["float16", "float32"] = "float16"  # of the stored voxels
    frame: NonNegativeInt | None = None  # of a file with several; None refuses those
    max_voxels: int = Field(MAX_VOXELS, ge=1)  # of a volume, as read and as stored
    filter: FilterConfig | None = None
