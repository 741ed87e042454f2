"""Sections in which one key chooses what the other keys are: `sharpness: {rule: csam, gamma: 2}`.

The other keys are the fields of the chosen class (`flatcal_dist.choices`), so that a new
class adds its keys. Keys that all choices of a section share stand here.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, create_model, model_validator

from flatcal_dist.averaging import AverageRule
from flatcal_dist.choices import found_in, keys_of
from flatcal_dist.config.kinds import Section
from flatcal_dist.data.images.mixing import Mixing, MixingRule
from flatcal_dist.objectives import Objective
from flatcal_dist.schedules import Schedule
from flatcal_dist.sharpness.rules import Rule

# mypy expects a concrete class, which could be instantiated. Here its subclasses are searched.
RULES = found_in("flatcal_dist.sharpness.rules", Rule)  # type: ignore[type-abstract]
OBJECTIVES = found_in("flatcal_dist.objectives", Objective)  # type: ignore[type-abstract]
AVERAGES = found_in("flatcal_dist.averaging", AverageRule)  # type: ignore[type-abstract]
MIXING = found_in("flatcal_dist.data.images.mixing", MixingRule)  # type: ignore[type-abstract]
SCHEDULES = found_in("flatcal_dist.schedules", Schedule)  # type: ignore[type-abstract]

Scope = Literal["global", "rank", "node"] | Annotated[int, Field(ge=1, le=2**20)]


class Named(Protocol):
    """A class that a configuration can choose by its name."""

    name: ClassVar[str]


class ChoiceSection(Section):
    """A section that holds one choice, and the keys of this choice alone."""

    choice: ClassVar[type]

    def build(self) -> Any:
        """Return the chosen object. Raises ValueError for values that do not fit together."""
        names = [field.name for field in fields(self.choice) if field.init]
        return self.choice(**{name: getattr(self, name) for name in names})


class NoRule(Section):
    """Plain training, without a perturbation."""

    rule: Literal["none"] = "none"
    rho: ClassVar[float] = 0.0
    scope: ClassVar[str] = "global"
    per_micro_batch: ClassVar[bool] = False
    allow_other_samples: ClassVar[bool] = False
    phase: ClassVar[tuple[float, None]] = (0.0, None)

    def build(self) -> None:
        return None

    def rho_at(self, relative_rate: float) -> float:
        return 0.0

    def perturbs_in(self, epoch: float) -> bool:
        return False


class Perturbation(ChoiceSection):
    """A rule, how its perturbation follows from the batch, and how it changes in training."""

    rule: str
    rho: float
    rho_schedule: Literal["constant", "learning_rate"] = Field(
        "constant",
        description="How rho changes in training. learning_rate: rho falls to rho_min as the "
        "learning rate falls.",
    )
    rho_min: float = Field(
        0.0, ge=0, le=1000, description="The rho that belongs to a learning rate of 0."
    )
    start_epoch: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="The epoch, counted from 0, in which the rule begins to perturb. Before it "
        "training is plain (late-phase SAM, Zhou et al., ICLR 2025).",
    )
    stop_epoch: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="The epoch before which the rule ends. From it on training is plain. "
        "Default: the rule goes on to the end.",
    )
    scope: Scope = Field(
        "global",
        description="Which ranks share one perturbation: all of them (global), each alone (rank), "
        "each node (node), or groups of N consecutive ranks (N).",
    )
    per_micro_batch: bool = Field(
        False, description="Whether each micro-batch has another perturbation."
    )
    allow_other_samples: bool = Field(
        False,
        description="Whether a run may go on although the number of samples per perturbation "
        "differs from that of its beginning. This changes the algorithm.",
    )

    @model_validator(mode="after")
    def _rho_falls(self) -> "Perturbation":
        if self.rho_schedule == "learning_rate" and self.rho_min > self.rho:
            raise ValueError(
                f"sharpness.rho_min={self.rho_min} is above sharpness.rho={self.rho}: rho falls "
                "from the second to the first"
            )
        return self

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> "Perturbation":
        if self.stop_epoch is not None and self.stop_epoch <= self.start_epoch:
            raise ValueError(
                f"sharpness.stop_epoch={self.stop_epoch:g} is not after "
                f"sharpness.start_epoch={self.start_epoch:g}: the rule would never perturb"
            )
        return self

    @property
    def phase(self) -> tuple[float, float | None]:
        """The epochs in which the rule begins and ends. None: it goes on to the end."""
        return self.start_epoch, self.stop_epoch

    def perturbs_in(self, epoch: float) -> bool:
        """Return whether the rule is used in a step that begins after so many epochs."""
        return self.start_epoch <= epoch and (self.stop_epoch is None or epoch < self.stop_epoch)

    def rho_at(self, relative_rate: float) -> float:
        """Return the length of the perturbation at a learning rate relative to its peak.

        rho_schedule=learning_rate: rho_min + (rho - rho_min) * rate / peak (Zhuang et al., ICLR
        2022, section 3).
        """
        if self.rho_schedule == "constant":
            return self.rho
        return self.rho_min + (self.rho - self.rho_min) * relative_rate


class Nothing(Section):
    """The section chooses nothing."""

    name: Literal["none"] = "none"

    def build(self) -> None:
        return None


class NoAverage(Nothing):
    """The weights are not averaged."""


class NoMixing(Nothing):
    """Images are not mixed."""

    def mixing(self, classes: int) -> None:
        return None


class MixingSection(ChoiceSection):
    """A way to mix images."""

    name: str

    def mixing(self, classes: int) -> Mixing:
        """Return what mixes images, for targets of this many classes."""
        return self.build().mixing(classes)


class NamedChoice(ChoiceSection):
    """A choice by `name`: an objective, an average or a schedule."""

    name: str


def _section(choice: type[Named], by: str, base: type[ChoiceSection]) -> type[ChoiceSection]:
    """Return the section in which `by` names this choice, with its fields as keys."""
    keys: dict[str, Any] = {by: (Literal[choice.name], choice.name), **keys_of(choice)}
    section = create_model(choice.__name__, __base__=base, __doc__=choice.__doc__, **keys)
    section.choice = choice
    return section


def _one_of(
    by: str, found: Mapping[str, type[Named]], base: type[ChoiceSection], *others: type[Section]
) -> Any:
    sections = [*others, *(_section(choice, by, base) for choice in found.values())]
    return Annotated[reduce(or_, sections), Field(discriminator=by)]


if TYPE_CHECKING:  # what all of them have
    SharpnessConfig = NoRule | Perturbation
    ObjectiveConfig = NamedChoice
    ScheduleConfig = NamedChoice
    AverageConfig = NoAverage | NamedChoice
    MixingConfig = NoMixing | MixingSection
else:
    SharpnessConfig = _one_of("rule", RULES, Perturbation, NoRule)
    ObjectiveConfig = _one_of("name", OBJECTIVES, NamedChoice)
    AverageConfig = _one_of("name", AVERAGES, NamedChoice, NoAverage)
    MixingConfig = _one_of("name", MIXING, MixingSection, NoMixing)
    ScheduleConfig = _one_of("name", SCHEDULES, NamedChoice)
