"""RewardView: which columns of a store are the explicit reward, and how they are transformed.

Shapes: K responses of a group, M chosen columns.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RewardView:
    columns: tuple[str, ...]
    """Names of the chosen columns, in the order of the config."""
    standardise: Literal["none", "dataset", "group"]
    mean_M: tuple[float, ...]
    """Mean of each column over the training store, used by `dataset`."""
    std_M: tuple[float, ...]
    clip: float | None
    source_column: str | None

    def apply(self, raw_KM: np.ndarray) -> np.ndarray:
        """One group's columns, standardised, then cut off at -clip and +clip: float32 [K, M]. What does not vary is
        only centred: a standard deviation of 0 counts as 1."""
        values_KM = raw_KM.astype(np.float64)
        if self.standardise != "none":
            of_data_set = self.standardise == "dataset"
            mean_M = np.array(self.mean_M) if of_data_set else values_KM.mean(axis=0)
            std_M = np.array(self.std_M) if of_data_set else _std(values_KM)
            values_KM = (values_KM - mean_M) / np.where(std_M > 0, std_M, 1.0)
        if self.clip is not None:
            values_KM = values_KM.clip(-self.clip, self.clip)
        return values_KM.astype(np.float32)


def _std(values_KM: np.ndarray) -> np.ndarray:
    """Per column; exactly 0 where all values are equal, which a rounded mean would not give."""
    constant_M = (values_KM == values_KM[0]).all(axis=0)
    return np.where(constant_M, 0.0, values_KM.std(axis=0))
