"""The job that evaluates runs and weight files, and the reports that it writes."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms._presets import ImageClassification

from flatcal_dist import cli
from flatcal_dist.calibration.records.imported import read_file
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.summary import summarize
from flatcal_dist.calibration.report.training_curves import training_curves
from flatcal_dist.config import Config, ConfigError, to_yaml
from flatcal_dist.data import image_folder, prepare_shards
from flatcal_dist.data.sets.variants import find, open_variant
from flatcal_dist.evaluation import job as evaluation_job
from flatcal_dist.evaluation import reporting as evaluation
from flatcal_dist.evaluation.job import (
    _into,
    _of_own_images,
    _on_device,
    _sets,
    evaluate_model,
)
from flatcal_dist.evaluation.wanted import Network, Wanted
from flatcal_dist.files import WriteError
from flatcal_dist.ranks import distributed
from flatcal_dist.ranks.distributed import FailedTogether
from tests.evaluation.small_networks import (
    NAMES,
    join,
    network,
    settings,
)
from tests.support.ranks import on_ranks
from tests.support.report_inputs import TRAINING

# Networks that were never trained have no skill for a temperature to be fitted to.
pytestmark = pytest.mark.filterwarnings("ignore:no finite temperature")


def on_the_command(rank: int, world_size: int, words: list[str]) -> None:
    join(rank, world_size)
    cli.main(words)


@pytest.fixture(scope="module")
def job(trees, tmp_path_factory) -> Path:
    """`flatcal evaluate` on two ranks, on weights of a torchvision network from a file."""
    output = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    module = torchvision.models.squeezenet1_1(num_classes=10)
    save_file(module.state_dict(), output / "weights.safetensors")
    words = ["evaluate", "--model", "torchvision:squeezenet1_1"]
    words += ["--weights", output / "weights.safetensors", "--data", trees / "photographs"]
    words += ["--data", f"imagenet_c={trees / 'c'}", "--corruptions", "pixelate"]
    words += ["--severities", "1,4", "--save-logits", "--output", output / "report"]
    (output / "names").write_text("\n".join(NAMES))
    words += ["--classes", output / "names", "--method", "sam", "--seed", "4"]
    words += ["--set", "model.num_classes=10", "data.workers=0", "data.image_size=64"]
    on_ranks(2, on_the_command, [str(word) for word in words])
    return output / "report"


def test_the_job_writes_report_shift_and_logits(job, trees):
    metrics = json.loads((job / "metrics.json").read_text())
    assert metrics["about"]["model"] == "torchvision:squeezenet1_1"
    assert (metrics["about"]["method"], metrics["about"]["seed"]) == ("sam", 4), "as it was told"
    assert metrics["per_class"]["name"] == NAMES
    configuration = metrics["about"]["configuration"]["data"]
    assert configuration["interpolation"] == "bilinear", "as torchvision evaluates it"
    assert math.floor(224 / configuration["crop_pct"]) == 256
    assert metrics["images"] == 39
    assert (job / "index.html").stat().st_size > 0
    shift = json.loads((job / "shift.json").read_text())
    assert [(r["corruption"], r["severity"]) for r in shift["sets"]] == [
        ("pixelate", 1),
        ("pixelate", 4),
    ]
    for r in shift["sets"]:
        records = Records.load(job / r["records"])
        assert len(records) == 39
        assert r["temperature"] == metrics["temperature"]
        assert r["temperature_from"] == "photographs"
    assert shift["clean"]["before"]["accuracy"] == metrics["accuracy"]
    assert shift["clean"]["before"]["ece"] == metrics["ece"]
    assert shift["clean"]["after"]["nll"] == metrics["after_temperature"]["nll"]


def test_torchvisions_weights_give_torchvisions_logits(job, trees):
    """Against torchvision's own preprocessing of PIL images, resized without our transforms."""
    stored = np.load(job / "logits.npz")
    torch.manual_seed(0)
    module = torchvision.models.squeezenet1_1(num_classes=10).eval()
    how = ImageClassification(crop_size=64, resize_size=73)  # floor(64 / 0.875)
    files = sorted((trees / "photographs").glob("*/*"))
    with torch.inference_mode():
        images = torch.stack([how(Image.open(file).convert("RGB")) for file in files])
        expected = module(images).numpy()
    assert stored["ids"].tolist() == [file.stem for file in files]
    # Pillow's and torch's bilinear filters differ by a grey level here and there.
    scale = float(np.abs(expected).max())
    assert stored["logits"] == pytest.approx(expected, abs=0.02 * scale)


def test_a_file_of_the_logits_gives_the_same_records(job, tmp_path):
    stored = dict(np.load(job / "logits.npz"))
    columns = {"id": stored["ids"], "label": stored["labels"]}
    numbered = {f"logit_{k}": stored["logits"][:, k] for k in range(10)}
    order = np.random.default_rng(0).permutation(39)
    table = pa.table({**columns, **numbered}).take(order)
    pq.write_table(table, tmp_path / "a.parquet")
    wide = [pa.field(n, pa.float64()) if n in numbered else f for n, f in zip(
        table.column_names, table.schema, strict=True)]  # fmt: skip
    pyarrow.csv.write_csv(table.cast(pa.schema(wide)), tmp_path / "a.csv")
    lists = pa.array(stored["logits"].tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({**columns, "logits": lists}), tmp_path / "list.parquet")
    own = summarize(Records.load(job / "records.parquet"), resamples=20).as_json()
    for file in (job / "logits.npz", *sorted(tmp_path.iterdir())):
        again = summarize(read_file(file), resamples=20).as_json()
        kind = "float64" if file.suffix == ".csv" else "float32"  # of what text is read as
        assert again["conventions"].pop("logits").startswith(kind)
        # Records hold no logits, which other calibrators than a temperature are fitted on.
        assert own["post_hoc"] is None
        assert again["post_hoc"]["calibrators"]
        for key in own.keys() - {"source", "about", "conventions", "post_hoc"}:
            assert again[key] == own[key], (file, key)
        assert again["conventions"].items() <= own["conventions"].items()


def test_a_nan_is_refused_with_the_name_of_the_image(trees):
    setting, module = settings(10), network(10)
    with torch.no_grad():
        module.head.bias[3] = float("nan")
    data = open_variant(find(str(trees / "photographs"), 10)[0], 10)
    accelerator = distributed.start("ddp", "fp32")
    with pytest.raises(FailedTogether, match=r"photographs: logits of 39 images are NaN .* n0"):
        evaluation.evaluate(setting, module, data, accelerator)


def test_a_network_of_other_classes_is_refused(trees):
    data = open_variant(find(str(trees / "photographs"), 10)[0], 10)
    accelerator = distributed.start("ddp", "fp32")
    with pytest.raises(ConfigError, match=r"gives 12 logits, but model.num_classes=10"):
        evaluation.evaluate(settings(10), network(12), data, accelerator)


def test_corruptions_of_other_images_are_refused(trees, tmp_path):
    tree = shutil.copytree(trees / "c", tmp_path / "c")
    next((tree / "pixelate/4").glob("*/*")).unlink()
    variants = find(str(tree), 10, ["pixelate"], [1, 4])
    accelerator = distributed.start("ddp", "fp32")
    setting, module = settings(10), network(10)
    clean = open_variant(find(str(trees / "photographs"), 10)[0], 10)
    records, _ = evaluation.evaluate(setting, module, clean, accelerator)
    with pytest.raises(FailedTogether, match=r"pixelate/4 holds 38 images, .*pixelate/1 39"):
        evaluation.report_shift(
            setting, module, variants, accelerator, tmp_path / "out", records, "hash"
        )
    shift = json.loads((tmp_path / "out/shift.json").read_text())
    assert len(shift["sets"]) == 1, "what was evaluated before is kept"


def test_another_output_keeps_the_training(tmp_path):
    run = Network("a run", settings(10), None, tmp_path, log=tmp_path / "log")
    for several, output in ((False, tmp_path / "o"), (True, tmp_path / "o/a_run")):
        assert _into(tmp_path / "o", run, several) == replace(run, output=output)


def test_evaluate_into_another_directory_draws_the_training(trees, tmp_path):
    run, output = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(settings(10)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in TRAINING))
    save_file(network(10).state_dict(), run / "model.safetensors")
    words = ["evaluate", run, "--data", trees / "photographs", "--output", output]
    cli.main([str(word) for word in words])
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["training"] == training_curves(TRAINING)
    assert metrics["training"]["epoch"] == [1, 2, 3, 4, 5]
    assert not (run / "report").exists()


def test_weights_are_chosen_by_name(tmp_path, capsys):
    accelerator = distributed.start("ddp", "fp32")
    state = network(10).state_dict()
    average = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, tmp_path / "w.pth")
    for key, expected in ((None, state), ("state_dict_ema", average)):
        wanted = Network("x", settings(10), tmp_path / "w.pth", tmp_path, key=key)
        module = _on_device(wanted, accelerator)
        assert torch.equal(module.head.bias, expected["head.bias"])
        assert f"weights taken: {key or 'state_dict'}; also there" in capsys.readouterr().out


def test_names_of_another_number_of_classes_are_refused(trees, tmp_path):
    wanted = Wanted([str(trees / "photographs")], class_names=["a", "b"])
    with pytest.raises(ConfigError, match="--classes has 2 names, and the network 10 classes"):
        evaluate_model("mlp", [tmp_path / "w.pth"], wanted, tmp_path, ["model.num_classes=10"])


def test_which_data_set_is_the_clean_one(trees):
    c, clean = f"imagenet_c={trees / 'c'}", str(trees / "photographs")
    chosen = {"corruptions": ["pixelate"], "severities": [1, 4]}
    own, alone = settings(10), settings(10)
    own = own.model_copy(update={"data": own.data.model_copy(update={"validation": "shards"})})
    first, shifted = _sets(own, Wanted([c], **chosen))
    assert first is None, "the run's own"
    assert len(shifted) == 2
    first, shifted = _sets(alone, Wanted([c, clean, f"again={clean}"], **chosen))
    assert first.name == "photographs"
    assert [v.name for v in shifted] == ["imagenet_c", "imagenet_c", "again"]
    with pytest.raises(ConfigError, match="name clean data as well"):
        _sets(alone, Wanted([c], **chosen))
    for narrowed in ({"corruptions": ["fog"]}, {"severities": [1]}):
        with pytest.raises(
            ConfigError, match="choose from ImageNet-C or CIFAR-C, and none is given"
        ):
            _sets(own, Wanted([clean], **narrowed))
    with pytest.raises(ConfigError, match="two data sets are called photographs"):
        _sets(alone, Wanted([clean, clean]))
    thousand = settings(1000)
    first, shifted = _sets(thousand, Wanted([str(trees / "v2")]))
    assert (first.kind, shifted) == ("imagenet_v2", [])


def test_generated_corruptions_alone_are_of_the_run_s_own_images(digits_shards):
    """Gray ones as well; the corruptions of ImageNet-C need colours."""
    run = settings(10)

    def on(validation: object) -> Config:
        changed = {"validation": validation, "channels": 1}
        return run.model_copy(update={"data": run.data.model_copy(update=changed)})

    own = on(str(digits_shards))
    wanted = _of_own_images(own, Wanted(["cifar_c_generated"], ["contrast"], [2, 5]))
    assert wanted.data == [f"cifar_c_generated={digits_shards}"]
    first, shifted = _sets(own, wanted)
    assert first is None, "the run's own"
    assert [str(v) for v in shifted] == [f"cifar_c_generated/contrast/{n}" for n in (2, 5)]
    other = Wanted([str(digits_shards)])
    assert _of_own_images(own, other) is other
    with pytest.raises(ConfigError, match=r"not 1\. For gray images there is --data"):
        _sets(own, Wanted([f"imagenet_c_generated={digits_shards}"], ["fog"], [1]))
    for missing in (None, ["a.tar", "b.tar"]):
        with pytest.raises(ConfigError, match="write --data cifar_c_generated=PATH"):
            _of_own_images(on(missing), Wanted(["cifar_c_generated"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet18", [], Wanted(["x"]), Path("o")), r"--weights \(--model timm:resnet18 has"),
        (("timm:resnet18", [], Wanted(), None), "--data, --output$"),
        ((None, [], Wanted(), None), "--model, --weights, --data, --output$"),
    ],
)
def test_what_is_missing_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_model(*arguments)


def test_a_tree_and_its_shards_are_the_same_data(trees, tmp_path):
    """By name, label and size; other images under the same names, and corruptions, are not."""
    tree = trees / "photographs"
    for number in (1, 3):
        prepare_shards(image_folder(tree), tmp_path / str(number), "validation", shards=number)
    opened = [
        open_variant(find(str(path), 10)[0], 10) for path in (tree, tmp_path / "1", tmp_path / "3")
    ]
    assert len({data.identity for data in opened}) == 1
    assert len({data.index.identity for data in opened}) == 3, "these are files, not images"
    copy = shutil.copytree(tree, tmp_path / "copy")
    file = next(copy.glob("*/*"))
    file.write_bytes(file.read_bytes() + b"\0")
    assert open_variant(find(str(copy), 10)[0], 10).identity != opened[0].identity
    moved = shutil.copytree(tree, tmp_path / "moved")
    first, second = sorted(moved.iterdir())[:2]
    file = next(first.iterdir())
    file.rename(second / file.name)
    assert open_variant(find(str(moved), 10)[0], 10).identity != opened[0].identity
    changed = [
        open_variant(v, 10).identity
        for v in find(f"imagenet_c_generated={tree}", 10, ["fog", "snow"], [1, 2])
    ]
    assert len({opened[0].identity, *changed}) == 5


def test_nothing_is_made_up_of_how_weights_from_elsewhere_were_trained(job):
    """Method and seed are those that were given, all else is unknown."""
    about = json.loads((job / "metrics.json").read_text())["about"]
    assert (about["method"], about["seed"]) == ("sam", 4)
    assert about["settings"] == {}
    assert about["engine"] is None
    assert set(about["configuration"]) == {"model", "data", "evaluate"}
    assert "optimizer" not in json.dumps(about["configuration"])
    (row,) = csv.DictReader((job / "metrics.csv").read_text().splitlines())
    assert (row["method"], row["seed"]) == ("sam", "4")
    assert "SGD" not in (job / "index.html").read_text()


def test_a_report_that_could_not_be_written_is_not_begun(tmp_path):
    """Else it would be noticed after all images were evaluated."""
    (tmp_path / "letter").write_text("dear all")
    network = Network("n", Config(), None, tmp_path / "letter/report")
    with pytest.raises(WriteError, match="letter is there, and no directory"):
        evaluation_job._evaluate([network], Wanted())
