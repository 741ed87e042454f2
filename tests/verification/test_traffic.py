"""What a step sends, against arithmetic."""

from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.verification.traffic import counted
from tests.support.ranks import on_ranks
from tests.support.reference import make_batch, make_network, make_optimizer

FLAGS = 12 * 8  # float64: losses and their number, norms, lengths, whether to skip, to stop


def test_collectives_and_bytes_of_a_step():
    gradient = 4 * sum(w.numel() for w in make_network().parameters())
    expected = {
        "plain": (2, gradient + FLAGS),
        "rank": (2, gradient + FLAGS),
        "global": (3, 2 * gradient + FLAGS),
    }
    assert on_ranks(2, _count) == [expected, expected]


def _count(rank, world_size):
    measured = {}
    for name, rule in (("plain", None), ("rank", SAM(0.1)), ("global", SAM(0.1))):
        network = make_network()
        model = DistributedDataParallel(network, broadcast_buffers=False)
        engine = ReplicatedEngine(model, make_optimizer(network))
        step = SharpnessAwareStep(engine, rule, scope="rank" if name == "rank" else "global")
        batch = [tuple(t.tensor_split(2)[rank] for t in make_batch(0))]
        for _ in range(2):  # DDP arranges its buckets anew once
            step(batch, samples=24)
        _, *measured[name] = counted(lambda step=step, batch=batch: step(batch, samples=24))
        measured[name] = tuple(measured[name])
    return measured
