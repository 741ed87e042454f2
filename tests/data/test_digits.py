import io
import json
import multiprocessing
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flatcal_dist import inputs
from flatcal_dist.config import DataConfig
from flatcal_dist.data import DataError, Index, expand, load_index, prepare_digits


@pytest.fixture(scope="module")
def digits(digits_shards: Path) -> Path:
    return digits_shards


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without noise, in a directory that was there and empty."""
    return prepare_digits(tmp_path_factory.mktemp("clean"), label_noise=0)


def indexes(directory: Path) -> tuple[Index, Index]:
    return tuple(load_index(expand(directory, split), 10) for split in ("train", "validation"))


def numbers(index: Index) -> np.ndarray:
    return np.array([int(key.removeprefix("digits_")) for key in index.keys()])  # noqa: SIM118


def test_a_configuration_prepares_them_with_wrong_labels_or_without(tmp_path, digits, clean):
    for name, same in (("digits", digits), ("digits_clean", clean)):
        where = tmp_path / name
        inputs.prepare(DataConfig(prepare=name, train=f"{where}/digits-train-{{0000..0003}}.tar"))
        for mine, theirs in zip(indexes(where), indexes(same), strict=True):
            assert np.array_equal(mine.label, theirs.label)
    assert not np.array_equal(indexes(digits)[0].label, indexes(clean)[0].label)


def test_counts_and_splits(digits):
    train, validation = indexes(digits)
    assert train.lengths.tolist() == [200] * 4
    assert validation.lengths.tolist() == [499, 498]
    together = np.concatenate([numbers(train), numbers(validation)])
    assert sorted(together.tolist()) == list(range(1797))
    assert (np.diff(numbers(validation)) > 0).all()
    assert np.bincount(train.label).min() > 60  # a random choice, not a sorted one


def test_noise_is_exact_and_in_training_labels_only(digits):
    truth = load_digits().target
    train, validation = indexes(digits)
    assert np.array_equal(validation.label, truth[numbers(validation)])
    wrong = np.flatnonzero(train.label != truth[numbers(train)])
    assert len(wrong) == 160
    shifts = (train.label[wrong] - truth[numbers(train)][wrong]) % 10
    assert np.bincount(shifts, minlength=10)[1:].min() >= 6  # all other classes, about 18 each
    assert 20 < (wrong < 400).sum() < 140  # spread over the shards


def test_json_keeps_the_clean_label(digits):
    truth = load_digits().target
    for path in expand(digits):
        with tarfile.open(path) as file:
            for name in file.getnames():
                if name.endswith(".json"):
                    about = json.load(file.extractfile(name))
                    assert about["clean_label"] == truth[int(name[7:11])]
                    cls = file.extractfile(name.replace(".json", ".cls")).read()
                    assert about["label"] == int(cls)


def test_values_are_recovered_exactly(digits):
    images = load_digits().images
    for index in indexes(digits):
        for i, number in enumerate(numbers(index)):
            image = Image.open(io.BytesIO(index.read(i)))
            assert image.mode == "L"
            assert np.array_equal(np.round(np.asarray(image, float) * 16 / 255), images[number])


def test_the_choice_never_changes_silently(digits):
    train, _ = indexes(digits)
    assert numbers(train)[:6].tolist() == [1261, 404, 476, 1172, 1212, 90]
    assert train.label[:12].tolist() == [6, 8, 1, 2, 0, 2, 3, 5, 8, 9, 6, 5]


def test_noise_and_seed_are_parameters(digits, clean, tmp_path):
    truth = load_digits().target
    plain, _ = indexes(clean)
    noisy, _ = indexes(digits)
    assert np.array_equal(plain.label, truth[numbers(plain)])
    assert np.array_equal(numbers(plain), numbers(noisy))
    other, _ = indexes(prepare_digits(tmp_path / "other", seed=2, label_noise=0.5))
    assert (other.label != truth[numbers(other)]).sum() == 400
    assert not np.array_equal(numbers(other), numbers(noisy))
    with pytest.raises(DataError, match="fraction"):
        prepare_digits(tmp_path / "wrong", label_noise=20)


def test_returns_at_once_when_it_is_there(digits):
    before = {path: path.stat().st_mtime_ns for path in digits.iterdir()}
    assert prepare_digits(digits) == digits
    assert {path: path.stat().st_mtime_ns for path in digits.iterdir()} == before
    assert [path.name for path in digits.parent.iterdir()] == ["digits"]


def test_an_empty_directory_is_filled(clean):
    assert len(expand(clean)) == 6


def test_what_does_not_fit_is_refused(digits, tmp_path):
    directory = shutil.copytree(digits, tmp_path / "digits")
    with pytest.raises(DataError, match=r"other parameters: .*Delete the directory"):
        prepare_digits(directory, label_noise=0.4)
    shard = directory / "digits-train-0002.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(DataError, match=r"damaged digits: .*digits-train-0002.*Delete"):
        prepare_digits(directory)
    shard.unlink()
    with pytest.raises(DataError, match=r"digits-train-0002\.tar not found.*Delete"):
        prepare_digits(directory)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(DataError, match="does not hold the digits"):
        prepare_digits(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def _prepare(directory: Path, barrier, results) -> None:
    barrier.wait()
    results.put(str(prepare_digits(directory)))


def test_two_processes_at_once(tmp_path, digits):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path / "digits", barrier, results)
    processes = [context.Process(target=_prepare, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [str(tmp_path / "digits")] * 2
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]  # the loser cleaned up
    for path in digits.iterdir():
        assert path.read_bytes() == (tmp_path / "digits" / path.name).read_bytes()


def test_losing_the_race_between_check_and_rename(digits, tmp_path, monkeypatch):
    """The other process finishes while this one writes: its directory is taken as it is."""
    from flatcal_dist.data.making import digits as module

    write = module.write_shards

    def write_while_another_finishes(*arguments, **options):
        monkeypatch.setattr(module, "write_shards", write)
        shutil.copytree(digits, tmp_path / "digits")
        return write(*arguments, **options)

    monkeypatch.setattr(module, "write_shards", write_while_another_finishes)
    assert prepare_digits(tmp_path / "digits") == tmp_path / "digits"
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
