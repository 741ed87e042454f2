"""Networks whose output is no tensor: refused before anything moves, with the way to the logits."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from torch import Tensor, nn

from flatcal_dist.sharpness import CSAM, SAM, SharpnessAwareStep, StepError
from tests.support.engines import UNLIKE, everywhere, make_engine
from tests.support.reference import bits, make_batch, make_network


@dataclass
class Output:
    hidden: Tensor
    scores: Tensor


class Named(NamedTuple):
    logits: Tensor
    aux_logits: Tensor


GIVES = {
    "dict": (lambda z: {"wide": z[:, :, None], "logits": z}, "output['logits'] of", "['logits']`"),
    "tuple": (lambda z: (z, None, z), "output[0] of shape [", "inputs)[0]`"),
    "list": (lambda z: [z.sum(), z], "output[1] of shape [", "inputs)[1]`"),
    "dataclass": (lambda z: Output(z.sum(), z), "output.scores of shape [", "inputs).scores`"),
    "named": (lambda z: Named(z, z), "without auxiliary heads", "inputs).logits`"),
    "object": (lambda z: SimpleNamespace(logits=z), "output.logits of shape [", "inputs).logits`"),
    "nothing": (lambda z: None, "gave a NoneType", "holds no tensor at all"),
}  # fmt: skip


class Gives(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.network, self.what = make_network(), what

    def forward(self, x):
        return GIVES[self.what][0](self.network(x))


def refused(rank, world_size, kind):
    said, still = {}, []
    for what in GIVES:
        engine = make_engine(kind, Gives(what))
        before = bits(engine.full_weights())
        alone = kind in ("one", "ddp")
        for options in ({}, {"per_micro_batch": True}) if alone else ({},):
            step = SharpnessAwareStep(engine, CSAM(0.1) if options else SAM(0.1), **options)
            try:
                step([make_batch(0)])
            except StepError as error:
                said.setdefault(what, set()).add(str(error))
        still.append(bits(engine.full_weights()) == before)
    return said, still


@pytest.mark.parametrize("kind", UNLIKE)
def test_an_output_that_is_no_tensor_is_refused_with_the_way_to_the_logits(kind):
    for said, still in everywhere(kind, refused):
        assert all(still)
        assert said.keys() == GIVES.keys()
        for what, (_, *words) in GIVES.items():
            assert len(said[what]) == 1, "said in the same words in either kind of pass"
            for word in ("one tensor of logits [N, K]", *words):
                assert word in said[what].copy().pop(), what
