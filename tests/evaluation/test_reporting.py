"""Evaluation on ImageNet's variants: against plain numpy; the same bits on any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm.data

from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report import writing
from flatcal_dist.calibration.report.summary import summarize
from flatcal_dist.data import DataError
from flatcal_dist.data.sets.imagenet import class_names, subset
from flatcal_dist.data.sets.variants import find, open_variant
from flatcal_dist.evaluation import reporting as evaluation
from flatcal_dist.ranks import distributed
from tests.calibration.test_records import assert_same
from tests.evaluation.small_networks import (
    CORRUPTIONS,
    REAL,
    assert_scores,
    join,
    logits_by_hand,
    network,
    settings,
)
from tests.support.ranks import on_ranks
from tests.support.variant_trees import WNIDS, write_tree

# Networks that were never trained have no skill for a temperature to be fitted to.
pytestmark = pytest.mark.filterwarnings("ignore:no finite temperature")


def on_variants(rank: int, world_size: int, trees: Path) -> dict[str, Records | None]:
    """Records of all variants by name, shifted ones with the temperature of the clean one."""
    accelerator = join(rank, world_size)
    found = {}
    for classes, texts in (
        (1000, ["val", "v2", "r"]),
        (10, ["photographs", "imagenet_c=c", "imagenet_c_generated=photographs"]),
    ):
        setting, module, clean = settings(classes), network(classes), None
        for text in texts:
            name, equals, path = text.rpartition("=")
            where = f"{name}{equals}{trees / path}"
            for variant in find(where, classes, *(CORRUPTIONS if classes == 10 else ())):
                data = open_variant(variant, classes)
                records = evaluation.evaluate(setting, module, data, accelerator, clean=clean)
                first = records[0] if records else None
                clean = clean if variant.shifted else first
                found[str(variant)] = first
    return found


@pytest.fixture(scope="module")
def alone(trees) -> dict[str, Records]:
    return on_variants(0, 1, trees)


def test_r_is_masked_before_the_softmax(alone, trees):
    files = sorted((trees / "r").glob("*/*"))
    classes = list(subset("imagenet_r"))
    logits = logits_by_hand(files, 1000)[:, classes]
    labels = [classes.index(WNIDS.index(file.parent.name)) for file in files]
    records = alone["imagenet_r"]
    assert_scores(records, files, logits, labels)
    assert records.classes == 200
    assert records.source.classes == tuple(classes)
    unmasked = logits_by_hand(files[:1], 1000)
    assert np.exp(unmasked).sum() > 2 * np.exp(unmasked[:, classes]).sum(), "the mask matters"


def test_r_is_also_judged_among_all_classes(alone, trees, tmp_path, monkeypatch):
    data = open_variant(find(str(trees / "r"), 1000)[0], 1000)
    accelerator = distributed.start("ddp", "fp32")
    setting, module, clean = settings(1000), network(1000), alone["imagenet"]
    # Beside the clean images they are a row of their own.
    clean.save(tmp_path / "records.parquet")
    monkeypatch.setattr(writing, "render_report", lambda output: None)
    evaluation.report_shift(
        setting, module, [data.variant], accelerator, tmp_path, clean, "identity of the clean"
    )
    rows = json.loads((tmp_path / "shift.json").read_text())["sets"]
    assert [(r["name"], r["classes"]) for r in rows] == [
        ("imagenet_r", 200), ("imagenet_r_all_classes", 1000),
    ]  # fmt: skip
    masked, every = evaluation.evaluate(setting, module, data, accelerator, clean=clean)
    assert_same(masked, alone["imagenet_r"])
    files = sorted((trees / "r").glob("*/*"))
    labels = [WNIDS.index(file.parent.name) for file in files]
    assert_scores(every, files, logits_by_hand(files, 1000), labels)
    assert (every.source.name, every.source.classes) == ("imagenet_r_all_classes", None)
    assert every.temperature == clean.temperature
    assert rows[1]["before"]["accuracy"] == every.correct.mean()
    assert_same(Records.load(tmp_path / rows[1]["records"]), every)
    # In a report on these images alone they are a part of it.
    monkeypatch.setattr(
        writing, "write_report",
        lambda records, output, about, all_classes, **_: summarize(
            records, about, all_classes=all_classes, resamples=2
        ),
    )  # fmt: skip
    _, m = evaluation.report(setting, module, data, accelerator, tmp_path / "own", title="x")
    assert (m.classes, m.all_classes.classes) == (200, 1000)
    assert m.all_classes.before["nll"] == pytest.approx(every.before.nll.mean(), abs=1e-6)
    names = dict(zip(m.per_class.number, m.per_class.name, strict=True))
    assert names == {c: class_names()[c] for c in subset("imagenet_r")}


def test_a_is_judged_among_its_own_200_classes_and_among_all(tmp_path):
    """Its classes by the WordNet ids that timm lists in another file than the numbers."""
    listed = Path(timm.data.__file__).parent / "_info/imagenet_a_synsets.txt"
    wnids = listed.read_text().split()
    tree = write_tree(tmp_path / "a", wnids)
    data = open_variant(find(f"imagenet_a={tree}", 1000)[0], 1000)
    accelerator = distributed.start("ddp", "fp32")
    masked, every = evaluation.evaluate(settings(1000), network(1000), data, accelerator)
    files = sorted(tree.glob("*/*"))
    logits = logits_by_hand(files, 1000)
    labels = [WNIDS.index(file.parent.name) for file in files]
    classes = sorted(map(WNIDS.index, wnids))
    assert classes[:8] == [6, 11, 13, 15, 17, 22, 23, 27], "as its authors number them"
    assert set(classes) != set(subset("imagenet_r"))
    assert_scores(masked, files, logits[:, classes], [classes.index(label) for label in labels])
    assert_scores(every, files, logits, labels)
    assert [(r.source.name, r.source.classes, r.classes) for r in (masked, every)] == [
        ("imagenet_a", tuple(classes), 200), ("imagenet_a_all_classes", None, 1000),
    ]  # fmt: skip


def test_v2_is_labelled_by_number(alone, trees):
    files = sorted((trees / "v2").glob("*/*"))
    labels = [int(file.parent.name) for file in files]
    assert_scores(alone["imagenet_v2"], files, logits_by_hand(files, 1000), labels)


def test_real_accuracy_by_hand(alone):
    records = alone["imagenet"]
    table = json.loads((Path(timm.data.__file__).parent / "_info" / REAL).read_text())
    expected = []
    for name, guess in zip(records.id, records.prediction, strict=True):
        labels = table[int(name[-8:]) - 1]
        expected.append(-1 if not labels else int(guess in labels))
    assert records.real.tolist() == expected
    assert expected.count(-1) > 10
    real = summarize(records, resamples=2).real
    counted = [e for e in expected if e >= 0]
    assert real["accuracy"] == sum(counted) / len(counted)
    assert alone["imagenet_v2"].real is None


def test_generated_corruptions_are_the_folder_of_the_same_function(alone, trees):
    published = [name for name in alone if name.startswith("imagenet_c/")]
    assert len(published) == 4
    for name in published:
        folder, generated = alone[name], alone[name.replace("imagenet_c/", "imagenet_c_generated/")]
        for part in ("before", "after"):
            a, b = getattr(folder, part), getattr(generated, part)
            assert np.array_equal(a.nll, b.nll)
            assert np.array_equal(a.log_confidence, b.log_confidence)
        assert (folder.source.generated, generated.source.generated) == (False, True)
        assert generated.source.corruption == folder.source.corruption
        assert generated.source.temperature_from == "photographs"
    files = sorted((trees / "c/pixelate/4").glob("*/*"))
    names = sorted({file.parent.name for file in files})
    labels = [names.index(file.parent.name) for file in files]
    logits = logits_by_hand(files, 10, crop_pct=1.0)  # the images are crops: not cropped again
    assert_scores(alone["imagenet_c/pixelate/4"], files, logits, labels)


def on_several_ranks(rank: int, world_size: int, trees: Path) -> tuple[dict, str]:
    """The records; and what is said where rank 0 sees other files than the others."""
    found, accelerator = on_variants(rank, world_size, trees), join(rank, world_size)
    path = trees / ("photographs" if rank == 0 else "c/pixelate/4")
    data = open_variant(find(f"x={path}", 10)[0], 10)
    with pytest.raises(DataError) as refused:
        evaluation.evaluate(settings(10), network(10), data, accelerator)
    return found, str(refused.value)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_records_are_the_same_bits_on_any_number_of_ranks(alone, trees, world_size):
    found = on_ranks(world_size, on_several_ranks, trees)
    for said in (said for _, said in found):
        assert "x holds other images on one rank than on another" in said
    first, *others = (records for records, _ in found)
    assert first.keys() == alone.keys()
    assert len(first) == 12
    for name, records in first.items():
        assert_same(records, alone[name])
    assert all(records is None for found in others for records in found.values())
