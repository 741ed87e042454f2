"""Features, passes with dropout and ensembles, against the networks asked by hand."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from accelerate import Accelerator
from safetensors.torch import save_file
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn

from flatcal_dist import cli, config
from flatcal_dist.calibration.confidence import of_head
from flatcal_dist.calibration.confidence.of_features import trust_score
from flatcal_dist.calibration.confidence.of_head import confidnet
from flatcal_dist.calibration.confidence.score import Reference
from flatcal_dist.calibration.confidence.sources import requested
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.config import Config, ConfigError
from flatcal_dist.data import load_index, prepare_digits
from flatcal_dist.data.sets.variants import of_index
from flatcal_dist.evaluation import predicting
from flatcal_dist.evaluation import reporting as evaluation
from flatcal_dist.evaluation.passes import PASSES, Ensemble, passes_with_dropout
from flatcal_dist.networks.evaluation_mode import in_evaluation_mode
from flatcal_dist.networks.features import watching_features
from flatcal_dist.networks.mlp import MLP
from flatcal_dist.networks.registry import build
from flatcal_dist.ranks import distributed
from flatcal_dist.ranks.distributed import FailedTogether
from flatcal_dist.training.build import build_step
from tests.calibration.test_records import assert_same
from tests.evaluation.small_networks import join
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:no finite temperature")
SCORES = ["trust_score", "mahalanobis", "confidnet", "mc_dropout"]


@pytest.fixture(scope="module", autouse=True)
def short_training_of_heads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(of_head, "EPOCHS", 5)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


def settings(digits: Path, *overrides: str) -> Config:
    own = [f"data.train={digits}/digits-train-{{0000..0003}}.tar", "data.workers=0"]
    own += [f"data.validation={digits}/digits-validation-{{0000..0001}}.tar"]
    own += ["model.name=mlp", "model.options={width: 24, depth: 1, drop_rate: 0.4}"]
    own += ["model.num_classes=10", "data.image_size=8", "data.channels=1", "data.crop_pct=1.0"]
    own += ["data.mean=[0.0]", "data.std=[1.0]", "evaluate.batch_size=128"]
    return config.load(None, [*own, *overrides])


def network(setting: Config, seed: int = 0) -> nn.Module:
    """Its first layer is random, its head the nearest class mean of what that sees: 80 % right."""
    torch.manual_seed(seed)
    module = build("mlp", 10, 1, 8, dict(setting.model.options))
    images, labels = pixels(setting, "train")
    with torch.no_grad():
        seen = torch.nn.functional.gelu(module.hidden[0](images))
        means = torch.stack([seen[labels == k].mean(0) for k in range(10)])
        module.head.weight.copy_(20 * means)
        module.head.bias.copy_(-10 * means.square().sum(1))
    return module.eval()


def pixels(setting: Config, split: str) -> tuple[torch.Tensor, np.ndarray]:
    """All images [N, 64] as the network sees them, and their labels."""
    index = predicting.inputs.open_index(setting.data, split, 10)
    batches = predicting.inputs.evaluation_batches(setting, index, 0, 1, False)
    whole = torch.cat([batch.images[batch.valid] for batch in batches])
    return whole.flatten(1).float() / 255, index.label


def evaluated(rank: int, world_size: int, digits: Path) -> Records | None:
    of_head.EPOCHS = 5
    accelerator = join(rank, world_size)
    setting = settings(digits)
    index = load_index(sorted(digits.glob("digits-validation-*.tar")), 10)
    data = of_index(index, str(digits), 10)
    found = evaluation.evaluate(
        setting, network(setting), data, accelerator, scores=requested(SCORES)
    )
    return found[0] if found else None


@pytest.fixture(scope="module")
def alone(digits) -> Records:
    return evaluated(0, 1, digits)


def test_scores_are_those_of_the_network_asked_by_hand(alone, digits) -> None:
    setting = settings(digits)
    module = network(setting)
    index = load_index(sorted(digits.glob("digits-validation-*.tar")), 10)
    order = np.argsort(index.keys())
    (known, labels), (images, _) = pixels(setting, "train"), pixels(setting, "validation")
    with torch.inference_mode():
        before, seen = (
            torch.nn.functional.gelu(module.hidden[0](x)).numpy() for x in (known, images)
        )
        answers = []  # the masks are drawn by batch
        for start in range(0, len(images), 128):
            batch = images[start : start + 128]
            padded = torch.cat([batch, batch[-1:].expand(128 - len(batch), -1)])
            torch.manual_seed(predicting.sample_seed(0, 0, start))
            hidden = torch.nn.functional.gelu(module.hidden[0](padded))
            passes = [module.head(nn.functional.dropout(hidden, 0.4)) for _ in range(PASSES)]
            answers.append(torch.stack(passes)[:, : len(batch)].numpy())
    p = softmax(np.concatenate(answers, axis=1).astype(float), axis=2).mean(0)
    assert alone.ranking["mc_dropout"] == pytest.approx(-entropy(p, axis=1)[order], rel=1e-5)
    trust = trust_score(seen[order], alone.prediction, Reference(before, labels))
    assert alone.ranking["trust_score"] == pytest.approx(trust, rel=1e-5)
    with torch.inference_mode():
        fitted_on = Reference(before, labels, module(known).numpy())
    head = confidnet(seen[order], fitted_on)
    assert alone.ranking["confidnet"] == pytest.approx(head, abs=1e-5)
    assert list(alone.ranking)[-4:] == SCORES


def test_two_ranks_compute_the_same_scores(alone, digits) -> None:
    two, other = on_ranks(2, evaluated, digits)
    assert other is None
    assert_same(two, alone)


def test_features_are_timms_pre_logits() -> None:
    for name in ("resnet10t", "convnext_atto", "mobilenetv3_small_050", "repvgg_a0"):
        module = timm.create_model(name, num_classes=7, drop_rate=0.3).eval()
        images = torch.randn(3, 3, 64, 64)
        with torch.inference_mode(), watching_features(module, name, 7) as features:
            found = features(module(images))
            expected = module.forward_head(module.forward_features(images), pre_logits=True)
            assert torch.equal(found, expected.flatten(1)), name


def test_features_of_torchvision_under_autocast_and_of_a_wrapper() -> None:
    module = torchvision.models.resnet18(num_classes=7).eval()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.aside = module, nn.Linear(3, 7)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = self.inner(images)
            self.aside(images[:, :, 0, 0])  # as many outputs, but not the logits
            return logits.clone()

    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with watching_features(wrapped := Wrapped(), "own", 7) as features:
            found = features(wrapped(images))
        assert not wrapped.aside._forward_hooks
        module.fc = nn.Identity()
        assert torch.equal(found, module(images).float())
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", ["squeezenet1_1", "cosine", "map"])
def test_networks_without_features_are_refused_by_name(name: str) -> None:
    class Cosine(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(images.flatten(1)) @ torch.ones(images[0].numel(), 7)

    networks = {
        "squeezenet1_1": lambda: torchvision.models.squeezenet1_1(num_classes=7),
        "cosine": Cosine,
        "map": lambda: nn.Sequential(nn.Conv2d(3, 7, 64), nn.Flatten()),
    }
    module = networks[name]().eval()
    said = {"map": r"its last layer 0 sees \[3, 64, 64\]"}.get(name, "not the output of a linear")
    with torch.inference_mode(), watching_features(module, name, 7) as features:
        logits = module(torch.rand(2, 3, 64, 64))
        with pytest.raises(ConfigError, match=f"{name} has no features .*{said}"):
            features(logits)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "mlp"])
def test_passes_drop_and_leave_all_else_alone(name: str) -> None:
    torch.manual_seed(0)
    drop = {"drop_rate": 0.5}
    module = MLP(3, 32, 7, **drop) if name == "mlp" else timm.create_model(name, **drop)
    module.eval()
    frozen = {key: value.clone() for key, value in module.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode(), in_evaluation_mode(module):
        clean = module(images)
        first, again, other = (passes_with_dropout(module, name, images, s) for s in (1, 1, 2))
        assert torch.equal(module(images), clean)
    assert first.shape == (PASSES, 2, clean.shape[1])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not any(torch.equal(one, clean) for one in first)
    assert not any(layer.training for layer in module.modules())
    assert all(torch.equal(frozen[key], value) for key, value in module.state_dict().items())


def test_dropout_of_the_mean_is_nearly_the_clean_answer() -> None:
    """Of a linear layer the mean over masks is the clean answer, to sampling error."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.2), nn.Linear(2000, 3)).eval()
    images = torch.randn(4, 2000)
    with torch.inference_mode():
        passes, clean = passes_with_dropout(module, "own", images, 0), module(images)
    error = (passes.mean(0) - clean) / (passes.std(0) / PASSES**0.5)
    assert error.abs().max() < 5


@pytest.mark.parametrize(
    ("key", "overrides", "message"),
    [
        ("mc_dropout", ["model.options={}"], "network with dropout, and mlp has none: train it"),
        ("trust_score", ["data.train=null"], "trust_score .* training images: say where"),
        ("mahalanobis", ["data.train=https://h/a.tar"], "mahalanobis .* by URL: set data.cache"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_a_training(digits, key, overrides, message):
    asked = settings(digits, *overrides, f"evaluate.confidence=[{key}]")
    accelerator = Accelerator(cpu=True)
    with pytest.raises((ConfigError, FailedTogether), match=message):
        build_step(asked, accelerator)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[trust]", "no confidence score is called 'trust'"),
        ("[msp]", "every report holds msp"),
        ("mc_dropout", "evaluate.confidence"),
        ("[1]", "evaluate.confidence"),
    ],
)
def test_configurations_that_name_no_score(digits, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(digits, f"evaluate.confidence={value}")


def test_only_a_part_of_many_training_images_is_looked_at(digits, monkeypatch) -> None:
    monkeypatch.setattr(predicting, "REFERENCE_IMAGES", 300)
    setting = settings(digits)
    accelerator = distributed.start("ddp", "fp32")
    module = network(setting)
    first, again = (
        predicting.known_images(setting, module, accelerator, requested(["trust_score"])).compared
        for _ in range(2)
    )
    whole, labels = pixels(setting, "train")
    with torch.inference_mode():
        seen = nn.functional.gelu(module.hidden[0](whole)).numpy()
    assert first.features.shape == (300, 24)
    assert (first.features == again.features).all()
    places = [int(np.abs(seen - row).sum(1).argmin()) for row in first.features]
    assert seen[places] == pytest.approx(first.features, abs=1e-5)
    assert (labels[places] == first.labels).all()
    assert len(set(places)) > 290, "images differ, but for a few"


def test_where_a_part_of_the_classes_competes(digits) -> None:
    setting, classes = settings(digits), [1, 4, 7]
    module, accelerator = network(setting), distributed.start("ddp", "fp32")
    index = load_index(sorted(digits.glob("digits-validation-*.tar")), 10)
    scores = requested(SCORES)
    known = predicting.known_images(setting, module, accelerator, scores)
    reference = known.compared
    found = predicting.predict(setting, module, index, accelerator, scores, classes=classes)
    whole = predicting.predict(setting, module, index, accelerator, scores)
    assert found.scores["mc_dropout"].min() >= -np.log(3) - 1e-9
    assert whole.scores["mc_dropout"].min() < -np.log(3)
    trust = predicting.of_features(found, known, scores, classes)["trust_score"]
    three = np.isin(reference.labels, classes)
    some = Reference(reference.features[three], reference.labels[three])
    prediction = np.array(classes)[found.logits[:, classes].argmax(1)]
    assert trust == pytest.approx(trust_score(found.features, prediction, some), rel=1e-12)
    with pytest.raises(ConfigError, match=r"trust_score: .* at least two classes"):
        predicting.of_features(found, known, scores, [3])


def test_a_head_is_fitted_on_images_apart_where_there_are_some(digits) -> None:
    setting = settings(digits, "data.holdout=0.2")
    module, accelerator = network(setting), distributed.start("ddp", "fp32")
    scores = requested(["confidnet", "trust_score"])
    apart = predicting.inputs.images_apart(setting, accelerator)
    known = predicting.known_images(setting, module, accelerator, scores, apart)
    assert 0 < len(apart) < 0.3 * len(known.compared.labels)
    assert (known.fitted_on.labels == apart.label).all()
    assert known.fitted_on.logits.shape == (len(apart), 10)
    whole = settings(digits)
    without = predicting.known_images(whole, module, accelerator, scores)
    images, labels = pixels(whole, "train")
    with torch.inference_mode():
        logits = module(images).numpy()
    assert without.fitted_on is without.compared
    assert without.fitted_on.logits == pytest.approx(logits, abs=1e-4)
    assert (without.fitted_on.labels == labels).all()
    classes = [1, 4, 7]
    three = without.fitted_on.among(classes)
    chosen = np.isin(labels, classes)
    assert (np.array(classes)[three.labels] == labels[chosen]).all()
    assert three.logits == pytest.approx(logits[chosen][:, classes], abs=1e-4)


def test_a_nan_is_refused_with_the_name_of_the_image(digits) -> None:
    setting = settings(digits)
    module, accelerator = network(setting), distributed.start("ddp", "fp32")
    with torch.no_grad():
        module.head.bias[3] = float("nan")
    index = load_index(sorted(digits.glob("digits-validation-*.tar")), 10)
    data = of_index(index, str(digits), 10)
    with pytest.raises(FailedTogether, match="logits of 997 images are NaN"):
        evaluation.evaluate(setting, module, data, accelerator, scores=requested(SCORES))


def write_run(path: Path, setting: Config, seed: int) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config.to_yaml(setting))
    save_file(network(setting, seed).state_dict(), path / "model.safetensors")
    return path


def test_an_ensemble_of_runs(digits, tmp_path) -> None:
    setting = settings(digits, "evaluate.confidence=[trust_score]")
    runs = [write_run(tmp_path / f"run{seed}", setting, seed) for seed in range(3)]
    words = ["evaluate", *map(str, runs), "--ensemble", "--output", str(tmp_path / "out")]
    cli.main([*words, "--save-logits"])
    images, labels = pixels(setting, "validation")
    answers = []
    for seed in range(3):
        with torch.inference_mode():
            answers.append(softmax(network(setting, seed)(images).double().numpy(), axis=1))
    mean = np.mean(answers, axis=0)
    records = Records.load(tmp_path / "out/records.parquet")
    order = np.argsort(np.load(tmp_path / "out/logits.npz")["ids"])
    assert records.confidence == pytest.approx(mean.max(1)[order], rel=1e-5)
    assert (records.correct == (mean.argmax(1) == labels)[order]).all()
    apart = np.mean([entropy(p, mean, axis=1) for p in answers], axis=0)
    assert records.ranking["ensemble_agreement"] == pytest.approx(-apart[order], rel=1e-4, abs=1e-7)
    m = json.loads((tmp_path / "out/metrics.json").read_text())
    assert m["about"]["title"] == "Ensemble of run0, run1, run2"
    assert m["about"]["method"] == "ensemble of 3 (sgd)"
    assert m["about"]["parameters"] == 3 * sum(w.numel() for w in network(setting).parameters())
    names = [row["name"] for row in m["scores"]["rows"]]
    assert names[-1] == "ensemble_agreement"
    assert not {"energy", "max_logit", "trust_score"} & set(names), "of one network's logits"
    assert "Ensemble agreement" in (tmp_path / "out/index.html").read_text()


def test_the_option_of_evaluate_chooses_scores(digits, tmp_path) -> None:
    run = write_run(tmp_path / "run", settings(digits, "evaluate.confidence=[mahalanobis]"), 0)
    for option, keys in (
        ([], ["mahalanobis"]),
        (["--confidence", "mc_dropout, trust_score"], ["trust_score", "mc_dropout"]),
        (["--confidence", "none"], []),
    ):
        cli.main(["evaluate", str(run), *option])
        m = json.loads((run / "report/metrics.json").read_text())
        names = [row["name"] for row in m["scores"]["rows"]]
        assert [name for name in names if name in SCORES] == keys
        assert m["scores"]["missing"] == []
        for row in m["scores"]["rows"]:
            assert set(row["values"]) == set(m["scores"]["rows"][0]["values"])
            assert row["values"]["auroc"]["low"] <= row["values"]["auroc"]["value"]
    with pytest.raises(SystemExit, match="no confidence score is called 'mc-dropout'"):
        cli.main(["evaluate", str(run), "--confidence", "mc-dropout"])


def test_ensembles_that_cannot_be(digits, tmp_path) -> None:
    runs = {
        "a": settings(digits),
        "b": settings(digits, "data.mean=[0.5]"),
        "c": settings(digits),
    }
    a, b, c = (str(write_run(tmp_path / name, setting, 0)) for name, setting in runs.items())
    output = ["--ensemble", "--output", str(tmp_path / "out")]
    for words, message in (
        ([a, *output], "needs two runs or more"),
        ([a, a, *output], "--ensemble has a twice"),
        ([a, b, "--ensemble"], "also needs --output"),
        ([a, b, *output], r"data.mean is \[0.0\] in a and \[0.5\] in b"),
        (["--model", "mlp", "--ensemble"], "--ensemble goes with the runs"),
        ([a, c, *output, "--confidence", "mc_dropout"], "mc_dropout is a score of one network"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(["evaluate", *words])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="two networks or more, not 1"):
        Ensemble([nn.Linear(2, 2)])
