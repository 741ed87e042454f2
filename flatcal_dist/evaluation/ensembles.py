"""The networks of several runs as one."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatcal_dist.config import Config, ConfigError
from flatcal_dist.evaluation.provenance import EVALUATED_DATA, Provenance
from flatcal_dist.evaluation.wanted import Network


def ensemble_of(members: Sequence[Network], output: Path | None, own_data: bool) -> Network:
    """Return the networks of several runs as one, which is evaluated as the first of them.

    Args:
        members: The networks.
        output: The directory of the report.
        own_data: Whether the validation data of the runs are used, which then have to be the same.

    Raises:
        ConfigError: There are less than two networks, one comes twice, they see images in different
            ways, have different numbers of classes or validation data, or there is no `output`.
    """
    if len(members) < 2:
        raise ConfigError("--ensemble needs two runs or more")
    if output is None:
        raise ConfigError("--ensemble also needs --output: its report belongs to no single run")
    titles = [member.title for member in members]
    if twice := [m.title for m in members if [n.weights for n in members].count(m.weights) > 1]:
        raise ConfigError(f"--ensemble has {twice[0]} twice")
    first = _how_evaluated(members[0].config, own_data)
    for member in members[1:]:
        for key, value in _how_evaluated(member.config, own_data).items():
            if value != first[key]:
                raise ConfigError(
                    f"these runs cannot be one ensemble: {key} is {first[key]} in {titles[0]} and "
                    f"{value} in {member.title}"
                )
    methods = [member.trained.method for member in members]
    listed = methods[0] if len(set(methods)) == 1 else ", ".join(map(str, methods))
    trained = Provenance(method=f"ensemble of {len(members)} ({listed})")
    title = f"Ensemble of {', '.join(titles)}"
    config = members[0].config
    if config.evaluate.confidence:  # scores of one network; an ensemble gets its scores anyway
        cut = config.evaluate.model_copy(update={"confidence": []})
        config = config.model_copy(update={"evaluate": cut})
    return Network(title, config, None, output, trained, members=tuple(members))


def refuse_twins(titles: Sequence[str], networks: Sequence[nn.Module]) -> None:
    """Raise ConfigError for two networks with equal weights: one network would count twice.

    Args:
        titles: What to call the networks.
        networks: The networks, with their weights.
    """
    states = [network.state_dict() for network in networks]
    for (one, mine), (other, theirs) in combinations(zip(titles, states, strict=True), 2):
        if mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine):
            raise ConfigError(f"--ensemble has one network twice: {one} and {other} are equal")


def _how_evaluated(config: Config, own_data: bool) -> dict[str, Any]:
    """Return the settings that decide what a network sees and what its logits mean, by key."""
    data = {"validation"} if own_data else set()
    # A temperature may not be fitted on images that any of the networks was trained on.
    data |= {"train", "holdout_seed"} if config.data.holdout is not None else set()
    seen = sorted(EVALUATED_DATA - {"decoder"} | data | {"holdout"})
    return {
        "model.num_classes": config.model.num_classes,
        "train.precision": config.train.precision,
        **{f"data.{key}": getattr(config.data, key) for key in seen},
    }
