"""The whole configuration: its sections, and which of their values do not go together."""

from pydantic import Field, model_validator

from flatcal_dist.config.choice_sections import (
    OBJECTIVES,
    RULES,
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
    def _combines(self) -> "Config":
        rule, objective = RULES.get(self.sharpness.rule), OBJECTIVES[self.objective.name]
        if rule is not None and rule.own_loss and self.objective.name != "cross_entropy":
            raise ValueError(
                f"sharpness.rule={rule.name} defines the loss itself, from hard labels: set "
                f"objective.name=cross_entropy, or another rule than {rule.name}, such as sam"
            )
        if self.mixing.name != "none":
            key = None
            if rule is not None and rule.own_loss:
                key = f"sharpness.rule={rule.name}"
            elif objective.hard_labels:
                key = f"objective.name={objective.name}"
            if key:
                raise ValueError(
                    f"{key} is defined for hard labels only, and mixing makes soft ones: set "
                    f"mixing.name=none, or choose another {key.partition('=')[0]}"
                )
        if self.train.keep_best and self.train.validate_every_epochs is None:
            raise ValueError("train.keep_best needs validation: set train.validate_every_epochs")
        return self
