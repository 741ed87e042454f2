"""Weight files as other programs write them: what is taken of them, and what is refused."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flatcal_dist.networks.weights import WeightsError, load_weights


def network(seed: int = 1, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    )


STATE = network().state_dict()
EMA = {name: tensor + 1 for name, tensor in STATE.items()}
AVERAGED = torch.optim.swa_utils.AveragedModel(network()).state_dict()


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def equal(module: nn.Module, state: dict[str, Tensor]) -> bool:
    own = module.state_dict()
    return all(torch.equal(own[n], t) for n, t in state.items() if "num_batches" not in n)


COMPILED_INSIDE = {name.replace("2.1.", "2._orig_mod.1."): t for name, t in STATE.items()}
SHARDED = {name.replace("2.1.", "2._fsdp_wrapped_module.1."): t for name, t in STATE.items()}
FILES = {
    "plain": STATE,
    "DDP": prefixed("module."),
    "compiled DDP": prefixed("_orig_mod.module."),
    "DDP of compiled": prefixed("module._orig_mod."),
    "EMA of DDP": prefixed("module.module."),
    "Lightning": {"state_dict": prefixed("model."), "epoch": 3, "loops": {"fit": {}}},
    "Lightning with a loss": {"state_dict": prefixed("net.") | {"loss.weight": torch.ones(5)}},
    "AveragedModel": AVERAGED,
    "compiled part": COMPILED_INSIDE,
    "FSDP's part": prefixed("_fsdp_wrapped_module.", SHARDED),
    "state_dict": {"state_dict": STATE},
    "model in state_dict": {"state_dict": {"model": STATE}},
    "state_dict in model": {"model": {"state_dict": prefixed("module.")}},
    "deep": {"checkpoint": {"ema_of": {"nothing": 1}, "weights": {"net": prefixed("module.")}}},
    "Namespace": {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, model="x"), "epoch": 1},
    "no counts": {n: t for n, t in STATE.items() if "num_batches" not in n},
    "counts in float": {n: t.float() for n, t in STATE.items()},
    "DeepSpeed": {"module": STATE, "optimizer": {"exp_avg": EMA}, "ds_version": "0.1"},
    "twice the same": {"state_dict": STATE, "model": STATE},
    "timm's EMA beside": {"state_dict": STATE, "state_dict_ema": EMA, "version": 2, "metric": 0.5},
    "EMA beside": {"model": STATE, "model_ema": EMA},
    "EMA in one dictionary": prefixed("model.") | prefixed("ema_model.module.", EMA),
    "average alone": {"state_dict_ema": STATE, "optimizer": {"state": {0: {"step": 1}}}},
}


@pytest.mark.parametrize("kind", FILES)
def test_wrappers_come_off_until_the_network_is_left(tmp_path, kind):
    torch.save(FILES[kind], tmp_path / "w.pth")
    module = network(2)
    load_weights(module, tmp_path / "w.pth")
    assert equal(module, STATE)


def test_which_of_several_was_taken_is_said_and_can_be_chosen(tmp_path):
    torch.save({"state_dict": STATE, "state_dict_ema": EMA}, tmp_path / "w.pth")
    module = network(2)
    taken = load_weights(module, tmp_path / "w.pth")
    assert (taken.name, taken.others, taken.left_out) == ("state_dict", ("state_dict_ema",), 0)
    taken = load_weights(module, tmp_path / "w.pth", "state_dict_ema")
    assert equal(module, EMA)
    assert str(taken).startswith("weights taken: state_dict_ema; also there: state_dict (choose")
    torch.save({"state_dict": prefixed("model.") | prefixed("ema.", EMA)}, tmp_path / "w.pth")
    assert load_weights(module, tmp_path / "w.pth").name == "state_dict.model"
    assert load_weights(module, tmp_path / "w.pth", "ema").name == "state_dict.ema"
    assert equal(module, EMA)
    with pytest.raises(WeightsError, match=r"no weights 'swa' .*: state_dict\.model, state_dict\."):
        load_weights(module, tmp_path / "w.pth", "swa")
    torch.save({"student": STATE, "teacher": EMA}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="student, teacher: choose one with --weights-key"):
        load_weights(module, tmp_path / "w.pth")


def test_counts_of_batches_stay_where_the_file_has_none(tmp_path):
    torch.save({n: t for n, t in STATE.items() if "num_batches" not in n}, tmp_path / "w.pth")
    module = network(2)
    module[1].num_batches_tracked.fill_(7)
    load_weights(module, tmp_path / "w.pth")
    assert module[1].num_batches_tracked == 7


def test_safetensors_under_another_name(tmp_path):
    save_file(prefixed("module."), tmp_path / "pytorch_model.bin")
    module = network(2)
    load_weights(module, tmp_path / "pytorch_model.bin")
    assert equal(module, STATE)


def test_other_networks_and_classes_are_named(tmp_path):
    torch.save({"state_dict": prefixed("module.", network(1, 3).state_dict())}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=re.escape(
        "with 2.1.weight [3, 4] instead of [5, 4], 2.1.bias [3] instead of [5]. If these are its "
        "classes, the file has 3 and the network 5: say --set model.num_classes=3"
    )):  # fmt: skip
        load_weights(network(), tmp_path / "w.pth")
    torch.save(nn.Sequential(nn.Linear(3, 4)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"without 1\.weight, 1\.bias, 1\.running_mean and"):
        load_weights(network(), tmp_path / "w.pth")
    torch.save({"conv1.weight": STATE["0.weight"], "fc.bias": torch.ones(3)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"without 0\.weight, .*; with names conv1\.weight, fc"):
        load_weights(network(), tmp_path / "w.pth")
    # A part of a larger network is no smaller network.
    larger = prefixed("0.") | {f"{i}.{n}": t for i in (1, 2) for n, t in EMA.items() if "0." in n}
    torch.save(larger | {f"head.{i}": torch.ones(1) for i in range(20)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not hold the weights of this network"):
        load_weights(network(), tmp_path / "w.pth")


class Attack:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.mkdir, (self.witness,)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save({"state_dict": STATE, "args": Attack(tmp_path / "witness")}, tmp_path / "a.pth")
    torch.save(network(), tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"more than tensors .*unpickling it would run its code"):
        load_weights(network(), tmp_path / "a.pth")
    assert not (tmp_path / "witness").exists()
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules") as caught:
        load_weights(network(), tmp_path / "b.pth")
    torch.jit.script(network()).save(tmp_path / "c.pt")
    with pytest.raises(WeightsError, match="TorchScript archive: save its state_dict") as script:
        load_weights(network(), tmp_path / "c.pt")
    assert "weights_only" not in f"{caught.value}{script.value}"


def test_files_without_weights(tmp_path):
    for name, stored in (("list", [1, 2]), ("empty", {}), ("numbers", {"epoch": 3})):
        torch.save(stored, tmp_path / name)
        with pytest.raises(WeightsError, match="holds no state_dict"):
            load_weights(network(), tmp_path / name)
    with pytest.raises(WeightsError, match="cannot read the weights"):
        load_weights(network(), tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (100 * t).to(torch.int8), "2.1.weight as int8, where the network has real"),
        (lambda t: t + 0j, "2.1.weight as complex64, where the network has real numbers"),
        (lambda t: t.to_sparse(), "2.1.weight as float32, sparse_coo"),
        (lambda t: t.to("meta"), "2.1.weight as float32, without values"),
    ],
)
def test_tensors_without_plain_real_values_are_refused(tmp_path, change, message):
    torch.save(STATE | {"2.1.weight": change(STATE["2.1.weight"])}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_weights(network(), tmp_path / "w.pth")


def test_weights_in_several_files(tmp_path):
    names = {n: f"model-0000{1 + (n > '1')}-of-00002.safetensors" for n in STATE}
    for file in set(names.values()):
        save_file({n: t for n, t in STATE.items() if names[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    module = network(2)
    load_weights(module, index)
    assert equal(module, STATE)
    with pytest.raises(WeightsError, match=r"name their index, such as model\.safetensors\.index"):
        load_weights(network(), tmp_path / min(names.values()))
    for weight_map, message in (
        (None, "expected a weight_map"),
        (names | {"x": "../w.safetensors"}, "no file of safetensors beside it"),
        (names | {"x": min(names.values())}, "do not hold x"),
        (names | {"x": "absent.safetensors"}, "cannot read the weights"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(WeightsError, match=message):
            load_weights(network(), index)


def test_a_file_of_another_kind_is_said_to_be_one(tmp_path):
    (tmp_path / "w.pth").write_text("<html>not found</html>")
    with pytest.raises(WeightsError, match="begins with b'<h' and is neither") as caught:
        load_weights(network(), tmp_path / "w.pth")
    assert "unpickling" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_damaged_files_are_refused(tmp_path):
    """Either way what is loaded is of this network's names and shapes."""
    rng = np.random.default_rng(0)
    torch.save(FILES["timm's EMA beside"], tmp_path / "w.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "w.safetensors")
    refused = 0
    for name in ("w.pth", "old.pth", "w.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for i in range(60):
            data, place = bytearray(whole), int(rng.integers(len(whole)))
            if i % 3 == 0:
                data = data[:place]
            elif i % 3 == 1:
                data[place : place + 8] = rng.bytes(8)
            else:
                del data[place : place + int(rng.integers(1, 30))]
            (tmp_path / name).write_bytes(data)
            reason = None
            try:
                load_weights(network(2), tmp_path / name)
            except WeightsError as error:
                reason = str(error)
            if reason is not None:
                assert str(tmp_path / name) in reason
                assert "weights_only" not in reason
                refused += 1
    assert refused > 80
