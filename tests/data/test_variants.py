"""Which class of the network each image of a variant belongs to, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from timm.data import RealLabelsImagenet

from flatcal_dist.data import DataError, image_folder, load_index, prepare_shards, write_shards
from flatcal_dist.data.sets.imagenet import class_names, real_labels, subset
from flatcal_dist.data.sets.variants import find, local_shards, of_index, open_variant
from flatcal_dist.data.shards.writing import Sample
from tests.support.variant_trees import WNIDS, small_image, write_tree

K = 1000


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("variants")
    write_tree(root / "val", WNIDS, "ILSVRC2012_val_{number:08d}.JPEG")
    write_tree(root / "v2", [str(i) for i in range(K)])
    write_tree(root / "sketch", WNIDS, "sketch_{number}.JPEG")
    for kind in ("imagenet_a", "imagenet_r"):
        write_tree(root / kind, [WNIDS[i] for i in subset(kind)], "art.{number}.jpg")
    return root


def classes_by_hand(data, wnid_of) -> list[int]:
    """The network's class of each image, looked up by the folder that its name holds."""
    return [wnid_of(bytes(name).decode().split("/")[0]) for name in data.index.names]


def test_v2_folders_are_numbers_not_text(trees):
    (variant,) = find(str(trees / "v2"), K)
    assert variant.kind == "imagenet_v2"
    assert variant.shifted
    data = open_variant(variant, K)
    assert len(data.label) == K
    assert data.label.tolist() == classes_by_hand(data, int)
    # Sorted as text, 10 comes before 2: the mistake that the kind is there to avoid.
    assert sorted(data.label.tolist()) == list(range(K))
    assert data.classes is None


def test_shards_made_of_v2_keep_the_numbers(trees, tmp_path):
    written = prepare_shards(image_folder(trees / "v2"), tmp_path / "s", "validation", shards=2)
    index = load_index(written.shards, K)
    keys = dict(zip(index.keys(), index.label.tolist(), strict=True))
    assert keys == {file.stem: int(file.parent.name) for file in (trees / "v2").glob("*/*")}


def test_shards_whose_labels_count_other_classes_are_refused(trees, tmp_path):
    """A class less, and all labels after it are those of other classes."""
    tree = shutil.copytree(trees / "val", tmp_path / "tree")
    whole = prepare_shards(image_folder(tree), tmp_path / "whole", "validation", shards=1).shards
    assert find(str(tmp_path / "whole"), K)[0].kind == "imagenet"
    shutil.rmtree(tree / WNIDS[500])
    prepare_shards(image_folder(tree), tmp_path / "less", "validation", shards=1)
    with pytest.raises(DataError, match=r"lists 999 classes \(n01440764, .* has 1000 classes"):
        find(f"imagenet={tmp_path / 'less'}", K)
    assert len(load_index(whole, K)) >= K
    for kind in ("imagenet_a", "imagenet_r"):
        prepare_shards(image_folder(trees / kind), tmp_path / kind, "validation", shards=1)
        assert find(f"{kind}={tmp_path / kind}", K)[0].kind == kind


@pytest.mark.parametrize("kind", ["imagenet_a", "imagenet_r"])
def test_a_and_r_have_200_classes_of_the_network(trees, kind):
    (variant,) = find(str(trees / kind), K)
    assert (variant.kind, variant.name) == (kind, kind)
    data = open_variant(variant, K)
    chosen = [data.classes[i] for i in data.label]
    assert chosen == classes_by_hand(data, WNIDS.index)
    assert sorted(set(data.label.tolist())) == list(range(200))
    assert data.class_names == list(class_names()), "by the network's numbers, not by places"


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ([WNIDS[i] for i in (3, 500, 999)], [3, 500, 999]),
        (["7", "12", "900"], [7, 12, 900]),
        ([WNIDS[i] for i in subset("imagenet_r")], list(subset("imagenet_r"))),
    ],
)
def test_a_part_of_the_classes_is_evaluated_where_it_is_asked_for(tmp_path, folders, expected):
    tree = write_tree(tmp_path / "t", folders)
    (variant,) = find(f"imagenet_subset={tree}", K)
    assert (variant.kind, variant.shifted) == ("imagenet_subset", False)
    data = open_variant(variant, K)
    assert data.label.tolist() == expected
    assert data.classes is None, "all of the network's classes compete"
    assert data.class_names == list(class_names())
    prepare_shards(image_folder(tree), tmp_path / "s", "validation", shards=1)
    shards = open_variant(find(f"imagenet_subset={tmp_path / 's'}", K)[0], K)
    of_tree = dict(zip(data.index.keys(), data.label.tolist(), strict=True))
    of_shards = dict(zip(shards.index.keys(), shards.label.tolist(), strict=True))
    if folders[0].startswith("n"):  # shards record what labels count; numbers are labels already
        assert of_shards == of_tree


def test_a_part_of_the_classes_is_refused_elsewhere(tmp_path):
    tree = write_tree(tmp_path / "t", WNIDS[:10])
    with pytest.raises(DataError, match=f"or write imagenet_subset={tree} to evaluate on"):
        find(str(tree), K)
    with pytest.raises(DataError, match="needs a network of ImageNet's 1,000 classes"):
        find(f"imagenet_subset={tree}", 10)
    for folders, message in ((["3", "1000"], "class numbers"), (["3", "03"], "class numbers"),
                             ([WNIDS[0], "cats"], "1 folders are no classes")):  # fmt: skip
        shutil.rmtree(tree)
        write_tree(tree, folders)
        with pytest.raises(DataError, match=message):
            find(f"imagenet_subset={tree}", K)


def test_validation_and_sketch_are_told_apart_by_file_names(trees):
    found = {name: find(str(trees / name), K)[0].kind for name in ("val", "sketch")}
    assert found == {"val": "imagenet", "sketch": "imagenet_sketch"}
    data = open_variant(find(str(trees / "sketch"), K)[0], K)
    assert data.label.tolist() == classes_by_hand(data, WNIDS.index)
    assert data.real is None
    assert find(f"imagenet_sketch={trees / 'val'}", K)[0].kind == "imagenet_sketch"


def test_real_labels_are_timms_by_original_name(trees):
    data = open_variant(find(f"mine={trees / 'val'}", K)[0], K)
    names = [bytes(name).decode().split("/")[1] for name in data.index.names]
    table = RealLabelsImagenet([""] * 50_000).real_labels  # timm's own reader
    assert data.real == [table[name] for name in names]


def test_real_labels_from_a_file(tmp_path):
    keys = ["ILSVRC2012_val_00000002", "n01440764_ILSVRC2012_val_00000001"]
    (tmp_path / "list.json").write_text(json.dumps([[3], [1, 2], []]))
    assert real_labels(keys, tmp_path / "list.json") == [[1, 2], [3]]
    by_name = {"ILSVRC2012_val_00000001.JPEG": [3], "ILSVRC2012_val_00000002.JPEG": [1, 2]}
    (tmp_path / "names.json").write_text(json.dumps(by_name))
    assert real_labels(keys, tmp_path / "names.json") == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("[[1]]", "no entry for ILSVRC2012_val_00000002"),
        ('[["cat"], []]', "published form"),
        ("[[1000], []]", "published form"),
        ('{"a.JPEG": [1]}', "published form"),
        ("[", "cannot be read"),
    ],
)
def test_real_files_of_another_form_are_refused(tmp_path, stored, message):
    (tmp_path / "real.json").write_text(stored)
    with pytest.raises(DataError, match=message):
        real_labels(["ILSVRC2012_val_00000002"], tmp_path / "real.json")
    with pytest.raises(DataError, match="original names"):
        real_labels(["sample_3"])


def shards_of(directory, labels) -> str:
    samples = [Sample(f"s{i:04d}", small_image(i), "jpg", int(c)) for i, c in enumerate(labels)]
    write_shards(samples, directory, "x-validation", split="validation", samples_per_shard=500)
    return str(directory)


@pytest.mark.parametrize("numbering", ["its own", "ImageNet's"])
def test_shards_of_200_classes_in_either_numbering(tmp_path, numbering):
    own = numbering == "its own"
    path = shards_of(tmp_path / "r", range(200) if own else subset("imagenet_r"))
    if own:
        with pytest.raises(DataError, match=r"labels end at 199.*imagenet_a=.* or imagenet_r="):
            find(path, K)
        path = f"imagenet_r={path}"
    data = open_variant(find(path, K)[0], K)
    assert data.label.tolist() == list(range(200))
    assert data.classes == subset("imagenet_r")


def test_other_networks_take_trees_of_their_own_number_of_classes(tmp_path):
    tree = write_tree(tmp_path / "t", ["cat", "dog", "ox"])
    (variant,) = find(f"farm={tree}", 3)
    assert (variant.name, variant.kind, variant.shifted) == ("farm", "plain", False)
    assert open_variant(variant, 3).label.tolist() == [0, 1, 2]
    numbered = write_tree(tmp_path / "n", [str(i) for i in range(12)])
    data = open_variant(find(str(numbered), 12)[0], 12)
    assert data.label.tolist() == [int(name) for name in data.index.folders]


@pytest.mark.parametrize(
    ("folders", "named", "classes", "message"),
    [
        (WNIDS[:999], "", K, "999 of ImageNet's 1,000 classes"),
        ([*WNIDS[:999], "n99999999"], "", K, r"1 folders are no classes.*n99999999"),
        (WNIDS[:10], "imagenet_r=", K, "10 of ImageNet's 1,000 classes"),
        (["a", "b"], "", 3, "2 class folders.*has 3 classes"),
        (["0", "2", "1", "4"], "", 4, "expected 0 to 3, found 0 to 4"),
        (
            ["a", "b", "c"],
            "imagenet_a=",
            3,
            "imagenet_a needs a network of ImageNet's 1,000 classes, not of 3",
        ),
        ([], "", 3, "holds neither shards"),
    ],
)
def test_trees_that_do_not_fit_are_refused(tmp_path, folders, named, classes, message):
    (tmp_path / "t").mkdir()
    write_tree(tmp_path / "t", folders)
    with pytest.raises(DataError, match=message):
        open_variant(find(f"{named}{tmp_path / 't'}", classes)[0], classes)


def test_names_that_demand_another_kind_are_refused(trees):
    with pytest.raises(DataError, match="was named imagenet_a, but holds imagenet_r"):
        find(f"imagenet_a={trees / 'imagenet_r'}", K)
    with pytest.raises(DataError, match="is no data set"):
        find(f"a b={trees / 'v2'}", K)
    with pytest.raises(DataError, match="no such shard or directory"):
        find(f"x={trees / 'absent'}", K)


def test_shards_of_a_run_have_real_labels_only_under_original_names(trees, tmp_path):
    names = sorted((trees / "val").glob("*/*"))[:7]
    samples = [Sample(n.stem, n.read_bytes(), "jpg", i) for i, n in enumerate(names)]
    shards = write_shards(
        samples, tmp_path / "s", "x-validation", split="validation", samples_per_shard=9
    )
    data = of_index(load_index(shards, K), "s", K)
    assert data.variant.kind == "imagenet"
    assert len(data.real) == 7
    assert of_index(load_index(shards, 10), "s", 10).real is None
    with pytest.raises(DataError, match="belong to ImageNet's validation images"):
        of_index(load_index(shards, 10), "s", 10, tmp_path / "real.json")


def test_a_tree_reads_what_lies_there_and_notices_a_change(trees, tmp_path):
    tree = shutil.copytree(trees / "imagenet_r", tmp_path / "r")
    index = open_variant(find(str(tree), K)[0], K).index
    files = sorted(tree.glob("*/*"))
    assert [bytes(index.read(i)) for i in range(200)] == [file.read_bytes() for file in files]
    assert index.key(0) == index.keys()[0]
    files[3].write_bytes(b"short")
    with pytest.raises(DataError, match=r"has 5 bytes, but had"):
        index.read(3)
    files[4].unlink()
    with pytest.raises(DataError, match="cannot be read"):
        index.read(4)
    again = open_variant(find(str(trees / "imagenet_r"), K)[0], K).index
    assert again.identity == index.identity, "the place does not matter"
    files[4].write_bytes(b"other")
    changed = open_variant(find(str(tree), K)[0], K).index
    assert changed.identity != index.identity


def corrupted_tree(root, corruptions, severities=(1, 2, 3, 4, 5)):
    for corruption in corruptions:
        for severity in severities:
            write_tree(root / corruption / str(severity), ["a", "b", "c"])
    return root


@pytest.mark.parametrize("group", ["", "weather"])
def test_published_corruptions_are_found(tmp_path, group):
    corrupted_tree(tmp_path / "c" / group, ["fog", "brightness"])
    found = find(f"imagenet_c={tmp_path / 'c'}", 3)
    assert [(v.corruption, v.severity) for v in found[:6]] == [
        *[("fog", s) for s in (1, 2, 3, 4, 5)],
        ("brightness", 1),
    ]
    assert len(found) == 10
    assert not found[0].generated
    data = open_variant(found[0], 3)
    assert data.cropped
    assert data.label.tolist() == [0, 1, 2]
    chosen = find(str(tmp_path / "c"), 3, ["fog"], [5, 1])
    assert [str(v) for v in chosen] == ["imagenet_c/fog/1", "imagenet_c/fog/5"]


def test_incomplete_corruptions_are_refused(tmp_path):
    corrupted_tree(tmp_path / "c", ["fog"], (1, 2, 3))
    with pytest.raises(DataError, match="fog/4 is missing"):
        find(str(tmp_path / "c"), 3)
    with pytest.raises(DataError, match="no folder snow, only fog"):
        find(str(tmp_path / "c"), 3, ["snow"])
    with pytest.raises(DataError, match="'mist' does not exist"):
        find(str(tmp_path / "c"), 3, ["mist"])
    with pytest.raises(DataError, match="severity 6 does not exist"):
        find(str(tmp_path / "c"), 3, None, [6])


def test_a_class_called_fog_is_no_corruption(tmp_path):
    tree = write_tree(tmp_path / "weather", ["fog", "frost", "snow"])
    assert find(str(tree), 3)[0].kind == "plain"


def test_generated_corruptions_are_labelled(tmp_path):
    tree = write_tree(tmp_path / "t", ["a", "b", "c"])
    found = find(f"imagenet_c_generated={tree}", 3, ["fog"], [2])
    assert [str(v) for v in found] == ["imagenet_c_generated/fog/2"]
    assert found[0].generated
    assert found[0].shifted
    data = open_variant(found[0], 3)
    assert data.cropped
    assert np.array_equal(data.label, [0, 1, 2])
    corrupted_tree(tmp_path / "c", ["fog"])
    with pytest.raises(DataError, match="corrupted already"):
        find(f"imagenet_c_generated={tmp_path / 'c'}", 3)


def test_names_of_classes_are_those_of_folders_and_of_the_list_beside_shards(tmp_path):
    tree = write_tree(tmp_path / "t", ["cat", "dog", "owl"])
    prepare_shards(image_folder(tree), tmp_path / "s", "validation", shards=1)
    for path in (tree, tmp_path / "s"):
        data = open_variant(find(str(path), 3)[0], 3)
        assert data.class_names == ["cat", "dog", "owl"]
    index = local_shards(str(tmp_path / "s"), 3)
    assert of_index(index, "s", 3).class_names == ["cat", "dog", "owl"]
    next((tmp_path / "s").glob("*.plan.json")).unlink()
    assert of_index(index, "s", 3).class_names is None
    numbers = write_tree(tmp_path / "n", ["0", "1", "2"])
    assert open_variant(find(str(numbers), 3)[0], 3).class_names is None
