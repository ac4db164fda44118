"""Running statistics of unit responses: what one pass over the images keeps, per unit and never per image.

Images are dealt to folds; each fold keeps count, mean and M2 (Chan's merge), the mean within-image variance over views,
and the few largest responses with their image ids. The whole is the merge of its folds, so folds merge to it bit for
bit. Per class the same moments and the largest response are kept as *rows*: in memory, in one file per class, or (for
huge models) only as a summary from which the class-level scores can still be told.
"""

from fastmem.stats.builder import StatsBuilder
from fastmem.stats.statistics import UnitStats

__all__ = ["StatsBuilder", "UnitStats"]
