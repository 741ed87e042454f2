"""Under ZeRO and FSDP2 an optimizer is the one that its name says, or it is refused."""

from functools import partial

import pytest
import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, muon
from torch import nn

from flatcal_dist.sharpness import SAM, SharpnessAwareStep, StepError
from tests.support.engines import ZERO, make_engine
from tests.support.ranks import on_ranks
from tests.support.reference import far, reference, train

# Elements of AdamW and the like are divided by small numbers: rounding grows by some 10.
CLOSE = 1e-5


def of_timm(model: nn.Module, name: str) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05)


def on_zero(rank, world_size, names):
    outcome = {}
    for kind in ZERO:
        for name in names:
            try:
                engine = make_engine(kind, optimizer=partial(of_timm, name=name))
            except StepError as error:
                outcome[kind, name] = str(error)
                continue
            train(SharpnessAwareStep(engine, SAM(0.1)), rank, world_size)
            outcome[kind, name] = engine.full_weights()
    return outcome


def check_on_zero(names: list[str]) -> set[tuple[str, str]]:
    """Every one is right or refused; which were."""
    expected = {n: reference(SAM(0.1), optimizer=partial(of_timm, name=n))[0] for n in names}
    refused = set()
    for (kind, name), found in on_ranks(2, on_zero, names)[0].items():
        if not isinstance(found, str):
            assert far(found, expected[name]) < CLOSE, (kind, name)
            continue
        refused.add((kind, name))
        pieces = f"ZeRO-{kind[-1]} gives each rank's optimizer flat pieces" in found
        pieces |= name == "adagrad" and "ZeRO cannot do Adagrad" in found
        assert pieces or (kind == "zero3" and "would count too many steps" in found), name
    return refused


def test_under_zero_an_optimizer_is_right_or_refused():
    """ZeRO-3 makes several calls of a group's steps, which Adan counts; Adagrad is built again."""
    whole = ["lamb", "lars", "muon", "adafactor"]
    refused = check_on_zero([*whole, "sgd", "lion", "adan", "adagrad"])
    whole.append("adagrad")
    assert refused == {(kind, name) for kind in ZERO for name in whole} | {("zero3", "adan")}


@pytest.mark.exhaustive
def test_under_zero_every_optimizer_of_timm_is_right_or_refused():
    skipped = ("bnb", "fused", "lookahead")  # those need a GPU or more packages
    names = [n for n in list_optimizers() if not n.startswith(skipped)]
    check_on_zero([n for n in names if not get_optimizer_info(n).second_order])


class Convolutional(nn.Module):
    """With matrices large enough that Adafactor factors them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(6, 40), nn.Linear(40, 5)
        self.convolution = nn.Conv2d(40, 40, 1)

    def forward(self, x):
        x = self.hidden(x).relu()[:, :, None, None]
        return self.head(self.convolution(x).relu().flatten(1))


def on_fsdp2(rank, world_size, names):
    outcome = {}
    for name in names:
        optimizer = partial(of_timm, name=name)
        try:
            engine = make_engine("fsdp2", Convolutional(), optimizer=optimizer)
        except StepError as error:
            outcome[name] = str(error)
            continue
        train(SharpnessAwareStep(engine, SAM(0.1)), rank, world_size)
        outcome[name] = engine.full_weights()
    return outcome


def test_under_fsdp2_an_optimizer_is_right_or_refused_before_the_first_step():
    """Muon iterates in bf16, whose rounding depends on the order of sums: in fp32 it is exact."""
    names = ["adamw", "lamb", "lars", "muon", "cadamw", "adamp", "adafactor"]
    found = on_ranks(2, on_fsdp2, names)[0]
    for name in ("adamw", "lamb", "lars", "muon"):
        optimizer = partial(of_timm, name=name)
        expected = reference(SAM(0.1), network=Convolutional, optimizer=optimizer)[0]
        assert not isinstance(found[name], str), found[name]
        assert far(found[name], expected) < (5e-2 if name == "muon" else CLOSE), name
    for name in ("cadamw", "adamp", "adafactor"):
        assert "cannot be used with FSDP2, whose weights are rows" in found[name]
        assert "use it with DDP" in found[name]


def test_muon_differs_under_fsdp2_by_the_rounding_of_its_iteration_alone(monkeypatch):
    found = on_ranks(2, muon_in_fp32)[0]
    in_fp32(monkeypatch)
    expected = reference(SAM(0.1), network=Convolutional, optimizer=partial(of_timm, name="muon"))
    assert far(found, expected[0]) < CLOSE


def muon_in_fp32(rank, world_size):
    with pytest.MonkeyPatch.context() as patch:
        in_fp32(patch)
        return on_fsdp2(rank, world_size, ["muon"])["muon"]


def in_fp32(patch) -> None:
    original = muon.zeropower_via_newtonschulz
    defaults = tuple(torch.float32 if d is torch.bfloat16 else d for d in original.__defaults__)
    assert defaults != original.__defaults__
    patch.setattr(original, "__defaults__", defaults)
