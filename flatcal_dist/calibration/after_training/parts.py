"""The parts of `metrics.json` about what is done after training: calibrators and conformal sets."""

from pydantic import Field

from flatcal_dist.calibration.report.parts import Count, Part, Positive, Rate


class CalibratorRow(Part):
    """A calibrator and a few figures of the images, each scored by a fit that has not seen it.

    `left_out` says why a calibrator was not fitted, and is null if it was. `parameters` is null for
    a calibrator that has a curve for each class instead.
    """

    name: str
    keeps_answers: bool = Field(description="whether the predicted class stays, whatever is fitted")
    parameters: Count | None
    left_out: str | None
    figures: dict[str, float | None] | None


class ByClass(Part):
    """The coverage of the classes that have at least `least_images` images.

    `gap` is the mean distance of a class's coverage from the wanted one, in absolute value.
    `gap_by_chance` is what it would be if every class had exactly the wanted coverage.
    """

    classes: Count
    least_images: Count
    low: Rate
    high: Rate
    gap: Rate
    gap_by_chance: Rate


class SetRow(Part):
    """Prediction sets of one kind: how many hold the label (with Wilson's interval), their size."""

    name: str
    coverage: Rate
    low: Rate
    high: Rate
    mean_size: Positive
    empty: Rate = Field(description="the share of images whose set holds no class")
    single: Rate = Field(description="the share of images whose set holds one class")
    by_class: ByClass | None


class ConformalSets(Part):
    """Prediction sets, see `conformal.conformal_sets`."""

    wanted: Rate
    images: Count
    folds: Count
    rows: list[SetRow]


class PostHoc(Part):
    """What calibrators and conformal sets make of the evaluated images.

    Calibrators are fitted on `fitted_apart` images that were kept apart (`data.holdout`). If there
    are none, they are cross-fitted with `folds` folds.
    """

    folds: Count
    fitted_apart: Count = 0
    calibrators: list[CalibratorRow]
    conformal: ConformalSets | None = None
