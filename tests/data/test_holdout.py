import pickle

import numpy as np
import pytest
import torch

from flatcal_dist import inputs
from flatcal_dist.config import ConfigError, load
from flatcal_dist.data import (
    Augmentation,
    DataError,
    load_index,
    training_transform,
    write_shards,
)
from flatcal_dist.data.holdout import held_out
from tests.support.samples import make_samples, train_on

KEYS = [f"image{i}" for i in range(1000)]
LABELS = np.random.default_rng(0).integers(0, 7, 1000)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.333, 0.999])
def test_each_class_gives_its_share_and_the_total_is_exact(fraction):
    chosen = held_out(KEYS, LABELS, fraction, 0)
    assert chosen.sum() == round(1000 * fraction)
    for label in range(7):
        images = label == LABELS
        assert abs(chosen[images].sum() - fraction * images.sum()) < 1


def test_the_choice_follows_from_keys_and_seed_alone():
    chosen = {key for key, one in zip(KEYS, held_out(KEYS, LABELS, 0.1, 3), strict=True) if one}
    order = np.random.default_rng(1).permutation(1000)
    keys = [KEYS[i] for i in order]
    again = held_out(keys, LABELS[order], 0.1, 3)
    assert {key for key, one in zip(keys, again, strict=True) if one} == chosen
    other = held_out(KEYS, LABELS, 0.1, 4)
    assert 0 < sum(key in chosen for key, one in zip(KEYS, other, strict=True) if one) < 30
    more = held_out(KEYS, LABELS, 0.2, 3)  # a larger share holds the smaller one
    assert chosen < {key for key, one in zip(KEYS, more, strict=True) if one}


@pytest.mark.parametrize("fraction", [0.0004, 0.9996])
def test_a_share_of_nothing_or_of_all_is_refused(fraction):
    with pytest.raises(DataError, match=r"data.holdout=.* of 1000 training images"):
        held_out(KEYS, LABELS, fraction, 0)


@pytest.fixture
def configuration(tmp_path):
    write_shards(make_samples(50), tmp_path, "x-train", split="train", samples_per_shard=12)

    def made(*overrides):
        here = [f"data.train={tmp_path}", f"data.validation={tmp_path}", "model.num_classes=7"]
        return load(None, [*here, "data.global_batch_size=10", *overrides])

    return made


def test_what_is_kept_apart_is_never_trained_on(configuration):
    data = configuration("data.holdout=0.2", "data.holdout_seed=5").data
    whole = inputs.open_index(configuration().data, "train", 7)
    train, apart = inputs.open_index(data, "train", 7), inputs.open_holdout(data, 7)
    assert (len(whole), len(train), len(apart)) == (50, 40, 10)
    assert sorted(train.keys() + apart.keys()) == sorted(whole.keys())
    assert len({whole.identity, train.identity, apart.identity}) == 3
    content = {whole.key(i): (bytes(whole.read(i)), int(whole.label[i])) for i in range(50)}
    for part in (train, apart, pickle.loads(pickle.dumps(train))):
        assert part.keys() == [part.key(i) for i in range(len(part))]
        assert part.lengths.sum() == len(part)
        for i in range(len(part)):
            assert (bytes(part.read(i)), int(part.label[i])) == content[part.key(i)]
    plan = {"seed": 1, "global_batch_size": 10, "micro_batch_size": 5, "epochs": 3, "window": 20}
    seen = {}
    for workers in (0, 1):
        transform = training_transform(Augmentation("none"), 8)
        for batch in train_on(train, transform, workers=workers, **plan):
            for sample in batch.samples.tolist():
                seen.setdefault((workers, batch.epoch), []).append(train.key(sample))
    assert all(sorted(keys) == sorted(train.keys()) for keys in seen.values())
    assert len(seen) == 6


def test_a_part_has_no_parts(index):
    part = index.part(np.arange(50) % 2 == 0)
    with pytest.raises(ValueError, match="no parts"):
        part.part(np.ones(25, bool))
    assert torch.equal(torch.from_numpy(part.label), torch.arange(0, 50, 2, dtype=torch.int32) % 7)


def test_streams_and_lone_seeds_are_refused(configuration):
    with pytest.raises(ConfigError, match=r"streamed shards do not have: set data.reader=indexed"):
        configuration("data.holdout=0.1", "data.reader=streaming")
    with pytest.raises(ConfigError, match=r"data.holdout_seed = 3 .* belongs to a data.holdout"):
        configuration("data.holdout_seed=3")
    data = configuration("data.holdout=0.1").data
    data = data.model_copy(update={"train": "http://127.0.0.1:9/x-{0..1}.tar"})
    with pytest.raises(DataError, match=r"with data.cache for URLs"):
        inputs.open_training(data, 7)


def test_the_shards_of_another_number_give_the_same_choice(configuration, tmp_path):
    data = configuration("data.holdout=0.2").data
    other = tmp_path / "other"
    shards = write_shards(make_samples(50), other, "x-train", split="train", samples_per_shard=7)
    assert len(load_index(shards)) == 50
    elsewhere = data.model_copy(update={"train": str(other)})
    one, two = (set(inputs.open_holdout(d, 7).keys()) for d in (data, elsewhere))
    assert one == two
