"""The whole configuration, section by section."""

from pydantic import Field, model_validator

from flatcal_dist.config.checking.combinations import what_does_not_go_together
from flatcal_dist.config.choice_sections import (
    AverageConfig,
    MixingConfig,
    NoAverage,
    NoMixing,
    NoRule,
    ObjectiveConfig,
    ScheduleConfig,
    SharpnessConfig,
)
from flatcal_dist.config.data_section import DataConfig
from flatcal_dist.config.kinds import Section
from flatcal_dist.config.sections import (
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    WandbConfig,
)


class Config(Section):
    """A whole configuration, section by section."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    mixing: MixingConfig = NoMixing()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = Field({"name": "cross_entropy"}, validate_default=True)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = Field({"name": "cosine"}, validate_default=True)
    sharpness: SharpnessConfig = NoRule()
    average: AverageConfig = NoAverage()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _goes_together(self) -> "Config":
        if problem := next(what_does_not_go_together(self), None):
            raise ValueError(problem)
        return self
