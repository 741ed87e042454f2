"""All metrics, one entry each, in the order of every table.

To add a metric, write its entry in the file of its group. Report, bootstrap, page, CSV, schema,
comparison and dashboard follow from the entry.
"""

from flatcal_dist.calibration.metrics.entries_calibration import CALIBRATION_ERRORS
from flatcal_dist.calibration.metrics.entries_proper import ENTROPIES, PROPER_SCORES
from flatcal_dist.calibration.metrics.entries_ranking import FAILURE_PREDICTION
from flatcal_dist.calibration.metrics.entry import Group

GROUPS = (
    Group("Accuracy and proper scores", PROPER_SCORES),
    Group("Calibration", CALIBRATION_ERRORS),
    Group("Failure prediction", FAILURE_PREDICTION),
    Group("Entropy", ENTROPIES),
)
METRICS = {metric.key: metric for group in GROUPS for metric in group.metrics}
COMPARED = tuple(key for key, metric in METRICS.items() if metric.compared)
STATISTICS = {key: m.statistic for key, m in METRICS.items() if m.statistic is not None}
RANKS = {key: statistic for key, statistic in STATISTICS.items() if statistic.of_order}
