"""What a report says about the training of a network."""

import pytest

from flatcal_dist.config import Config, method_of
from flatcal_dist.evaluation.provenance import Provenance


@pytest.mark.parametrize(
    ("sections", "method", "settings"),
    [
        ({}, "sgd", {}),
        ({"sharpness": {"rule": "csam"}}, "csam", {"rho": 0.05, "gamma": 1.0}),
        (
            {
                "sharpness": {"rule": "sam", "rho": 0.1},
                "objective": {"name": "focal"},
                "average": {"name": "swa"},
            },
            "sam+focal+swa",
            {"rho": 0.1, "focal.gamma": 3.0, "swa.start": 0.75},
        ),
        ({"average": {"name": "swa", "start_epoch": 9}}, "sgd+swa", {"swa.start_epoch": 9}),
        ({"sharpness": {"rule": "looksam"}}, "looksam", {"rho": 0.05, "every": 5, "alpha": 0.7}),
        ({"mixing": {"name": "mixup"}}, "sgd+mixup", {"mixup.alpha": 0.2}),
        (
            {"mixing": {"name": "cutmix", "probability": 0.5}},
            "sgd+cutmix",
            {"cutmix.probability": 0.5, "cutmix.alpha": 1.0},
        ),
        (
            {"sharpness": {"rule": "sam", "rho_schedule": "learning_rate", "scope": 2}},
            "sam[rho_schedule=learning_rate,scope=2]",
            {"rho": 0.05, "rho_min": 0.0, "scope": 2},
        ),
        (
            {"sharpness": {"rule": "sam", "scope": "rank"}},
            "sam[scope=rank]",
            {"rho": 0.05, "scope": "rank"},
        ),
    ],
)
def test_settings_are_the_numbers_of_the_method(
    sections: dict, method: str, settings: dict
) -> None:
    config = Config.model_validate(sections)
    trained = Provenance.of_run(config, seconds=1.0)
    assert trained.method == method == method_of(config)
    assert trained.settings == settings
