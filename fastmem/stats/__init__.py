"""Running statistics of unit responses: what one pass over the images keeps of every unit, and never of every image.

The images are dealt to folds. Each fold keeps the number of its images, the mean and the sum of squared deviations of
their responses (joined by Chan's formula), the mean variance over the views of an image, and the few largest responses
with the ids of their images. The statistics of all images are those of the folds merged, so that merging the folds
gives them again bit for bit. For every class the same moments and the largest response are kept as a row: in memory, in
one file for each class, or, for huge models, only as a summary from which the class-level scores can still be told.
"""

from fastmem.stats.builder import StatsBuilder
from fastmem.stats.statistics import UnitStats

__all__ = ["StatsBuilder", "UnitStats"]
