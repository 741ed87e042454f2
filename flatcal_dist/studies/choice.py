"""Choosing a setting without the test images: what a study's file says of it.

    choose:
      sam:                                      # a name for the page
        among: {method: [sam_rho0.02, sam, sam_rho0.1]}
        against: {method: sam}                  # what everyone would take: the paper's constant
        by: [nll, signed_gap]                   # of the images that data.holdout keeps apart

For each training seed, the run with the best figure on the images kept apart is the chosen one. Its
figures on the test images are then compared with those of the constant setting.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from flatcal_dist.calibration.report.parts import FEW_FIGURES
from flatcal_dist.config.kinds import Section
from flatcal_dist.errors import ConfigError

if TYPE_CHECKING:
    from flatcal_dist.studies.elements import Element


SEED = "run.seed"


class Choice(Section):
    """One setting that is chosen by images kept apart."""

    among: dict[str, Any] = Field(
        min_length=1,
        description="The settings to choose from: values by axis or key of the grid.",
    )
    against: dict[str, Any] = Field(
        min_length=1, description="The setting among them that the chosen ones are compared with."
    )
    by: list[str] = Field(
        ["nll", "signed_gap"],
        min_length=1,
        description="The figures of the images kept apart that choose: each makes a choice.",
    )

    def matches(self, point: dict[str, Any], constant: bool = False) -> bool:
        """Return whether a combination is one of `among`, or if `constant`, of both."""
        return matches(point, self.among) and (not constant or matches(point, self.against))


def matches(point: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Return whether a combination has the values of an entry. A list holds several values."""
    return all(
        point[key] in (wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in entry.items()
    )


def check_figures(choices: dict[str, Choice], path: object) -> None:
    """Raise ConfigError if a choice is made by what images kept apart do not have."""
    for name, choice in choices.items():
        for key in choice.by:
            if key not in FEW_FIGURES:
                raise ConfigError(
                    f"{path}: choose.{name}.by names {key!r}; images kept apart have the figures "
                    f"{', '.join(FEW_FIGURES)}"
                )


def check_settings(
    choices: dict[str, Choice], found: Sequence["Element"], panels: Sequence[str]
) -> None:
    """Raise ConfigError if a choice has no setting to compare with, or no images to choose by.

    Args:
        choices: The choices, by name.
        found: The runs of the study.
        panels: The axes and keys whose values are not compared with each other.
    """
    for name, choice in choices.items():
        among = [element for element in found if choice.matches(element.point)]
        constants: dict[str, set[str]] = {}
        for element in among:
            if choice.matches(element.point, constant=True):
                point = {key: v for key, v in element.point.items() if key != SEED}
                panel = {key: v for key, v in point.items() if key in panels}
                constants.setdefault(str(panel), set()).add(str(point))
        if not constants:
            raise ConfigError(
                f"choose.{name}: no run matches both among and against; `against` is one of the "
                "settings among which to choose"
            )
        if several := next((each for each in constants.values() if len(each) > 1), None):
            raise ConfigError(
                f"choose.{name}.against matches several settings of one table "
                f"({' and '.join(sorted(several))}): name one of them"
            )
        for element in among:
            if element.config.data.holdout is None:
                raise ConfigError(
                    f"choose.{name}: run {element.name} keeps no images apart to choose by; add "
                    "set: {data.holdout: 0.2} to the study"
                )
