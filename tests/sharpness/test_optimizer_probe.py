"""Optimizers that may be given parts of tensors, and those that become another algorithm then."""

import copy
from functools import partial

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from flatcal_dist.sharpness import StepError
from flatcal_dist.sharpness.engines.optimizer_probe import refuse_flat_parts


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Flatten())
    return nn.Sequential(convolution, nn.Linear(300, 200), nn.GELU(), nn.Linear(200, 10))


def of_timm(model: nn.Module, name: str, **options) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05, **options)


class NormalizedSGD(torch.optim.Optimizer):
    """A user's own: the gradient of all weights together has length 1."""

    def __init__(self, weights, lr: float, power: float = 1.0) -> None:
        super().__init__(weights, {"lr": lr})
        self.power = power  # an attribute that no group has

    @torch.no_grad()
    def step(self, closure=None) -> None:
        held = [w for group in self.param_groups for w in group["params"] if w.grad is not None]
        norm = torch.stack([w.grad.square().sum() for w in held]).sum().sqrt() ** self.power
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(group["lr"] * weight.grad / norm)


def shapes_of(optimizer) -> list:
    return [[tuple(w.shape) for w in group["params"]] for group in optimizer.param_groups]


def refused(make, stage: int = 1) -> str | None:
    optimizer = make(network())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", pytest.fail)
        try:
            refuse_flat_parts(optimizer, shapes_of(optimizer), stage)
        except StepError as error:
            return str(error)
    return None


WHOLE = ["lamb", "lars", "muon", "adafactor", "adafactorbv", "adamp", "novograd", "cadamw", "kron"]
ELEMENTS = ["sgd", "adamw", "lion", "adan", "nadamw", "madgrad", "rmsproptf", "lookahead_adamw"]


@pytest.mark.parametrize("name", WHOLE)
def test_an_optimizer_that_looks_at_whole_tensors_is_refused(name):
    said = refused(partial(of_timm, name=name))
    assert "looks at whole tensors" in said
    assert "ZeRO-1 gives each rank's optimizer flat pieces" in said
    assert "Use it with DDP, or with FSDP2" in said


@pytest.mark.parametrize("name", ELEMENTS)
def test_one_that_works_element_by_element_is_not(name):
    assert refused(partial(of_timm, name=name)) is None


def test_it_is_a_property_of_the_optimizer_with_its_options_and_not_of_its_name():
    """Without trust ratio and clipping LAMB is Adam; a user's own class is tried like any other."""
    plain = partial(create_optimizer_v2, opt="lamb", lr=0.01, weight_decay=0.0, max_grad_norm=None)
    assert refused(plain) is None
    assert refused(partial(of_timm, name="lamb", max_grad_norm=None)) is not None
    assert refused(lambda n: torch.optim.Adafactor(n.parameters())) is not None
    assert refused(lambda n: torch.optim.Muon([n[1].weight])) is not None
    assert refused(lambda n: NormalizedSGD(n.parameters(), 0.1)) is not None
    assert refused(lambda n: NormalizedSGD(n.parameters(), 0.1, power=0.0)) is None
    assert refused(lambda n: torch.optim.AdamW(n.parameters(), lr=torch.tensor(0.0))) is None
    assert refused(lambda n: torch.optim.Adafactor(n.parameters(), lr=0.0)) is not None


def test_one_that_counts_steps_by_group_is_refused_where_groups_are_stepped_in_pieces():
    """ZeRO-3 calls the optimizer for each piece of a group."""
    make = partial(of_timm, name="adan")
    assert refused(make, stage=2) is None
    assert "counts its steps, or the like, once for a group" in refused(make, stage=3)
    assert "Use it with ZeRO-1 or 2" in refused(make, stage=3)
    for other in ("sgd", "adamw", "lion", "madgrad"):
        assert refused(partial(of_timm, name=other), stage=3) is None


def test_trying_leaves_optimizer_weights_and_random_numbers_alone():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = LinearLR(optimizer)  # has put its own function around `step`
    before, groups = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook of the real one"))
    refuse_flat_parts(optimizer, shapes_of(optimizer), 1)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert optimizer.state_dict() == groups
    assert torch.equal(torch.get_rng_state(), random)
    assert schedule._step_count == 1


def test_one_that_cannot_be_tried_is_warned_of():
    class Stubborn(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("only with a model")

    optimizer = Stubborn(network().parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"Stubborn .* could not be tried .*only with a model"):
        refuse_flat_parts(optimizer, shapes_of(optimizer), 1)
