"""SAM by the gradient of the last step, beside the matrix: one pass, and a plain first step."""

from flatcal_dist.sharpness import SharpnessAwareStep, StaleSAM
from tests.support.engines import make_engine
from tests.support.reference import bits, make_network, train


def test_the_first_step_is_plain_and_every_step_has_one_pass():
    network, passes = make_network(), []
    network.register_forward_hook(lambda *_: passes.append(1))
    engine = make_engine("one", network)
    step = SharpnessAwareStep(engine, StaleSAM(0.1))
    counts, results = [], []
    for number in range(3):
        before = len(passes)
        results += train(step, 0, 1, numbers=[number], measure=True)
        counts.append(len(passes) - before)
        if number == 0:
            first = bits(engine.full_weights())
    plain = make_engine("one")
    train(SharpnessAwareStep(plain, None), 0, 1, numbers=[0])
    assert first == bits(plain.full_weights())
    assert counts == [1, 1, 1]
    lengths = [round(result.perturbation_norm, 5) for result in results]
    assert lengths == [0, 0.1, 0.1]
    assert all(result.perturbed_loss is None for result in results), "there is no loss at w"


def test_what_it_remembers_is_the_gradient_before_clipping():
    free, clipped = (
        SharpnessAwareStep(make_engine("one"), StaleSAM(0.1), clip_norm=clip)
        for clip in (None, 1e-3)
    )
    for step in (free, clipped):
        train(step, 0, 1, numbers=[0])
    assert bits(free.memory) == bits(clipped.memory)
