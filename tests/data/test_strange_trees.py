"""Folders of strangers: what is no image is refused or named, and nothing makes a reader wait."""

import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flatcal_dist.cli import main
from flatcal_dist.data import DataError, expand, image_folder, load_index, prepare_digits
from flatcal_dist.data import prepare_shards as prepare
from flatcal_dist.data.images.decode import decode
from flatcal_dist.data.making import sharding
from flatcal_dist.data.making.sources import Files
from flatcal_dist.data.making.validation import validate_shards
from flatcal_dist.data.sets.imagenet import wnids
from flatcal_dist.data.sets.tree import open_tree
from tests.support.photographs import encoded, photograph
from tests.support.samples import png


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six images in two classes."""
    for number in range(6):
        path = tmp_path / "tree" / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return tmp_path / "tree"


def test_litter_is_left_out_counted_and_named(tree, tmp_path, capsys):
    for name in (".DS_Store", "Thumbs.db", "readme.txt", "images.zip", "ant/.DS_Store",
                 "ant/._0.png", "bee/Thumbs.db", "bee/desktop.ini", "bee/.hidden.png"):  # fmt: skip
        (tree / name).write_bytes(b"x")
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
        (tree / name).mkdir()
        (tree / name / "._0.png").write_bytes(b"x")
    source = image_folder(tree)
    assert source.classes == ("ant", "bee")
    assert len(source) == 6
    assert len(source.left_out) == 12
    assert str(tree / "images.zip") in source.left_out
    main(["shard", str(tree), str(tmp_path / "out"), "--workers", "1"])
    told = capsys.readouterr().err
    assert (
        f"warning: 12 files or folders are no images of a class and were left out: {tree}" in told
    )
    assert "(8 of them were added by macOS or Windows)" in told
    assert len(load_index(expand(tmp_path / "out", "train"), classes=2)) == 6
    assert len(open_tree(tree)) == 6
    assert "warning: 12 files or folders" in capsys.readouterr().err


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


STRANGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a FIFO": ("ant/x.png", fifo, r"x\.png is a FIFO, expected an image"),
    "a socket": ("ant/x.png", bound_socket, r"x\.png is a socket"),
    "a device": ("ant/x.png", lambda p: p.symlink_to("/dev/zero"), r"is a character device"),
    "a link loop": ("ant/x.png", lambda p: p.symlink_to(p), r"x\.png cannot be read .Too many"),
    "a loop as a class": ("cow", lambda p: p.symlink_to(p), r"cow cannot be read .Too many"),
    "a broken link": ("ant/x.png", lambda p: p.symlink_to("/none"), r"cannot be read .No such"),
    "a link up": ("ant/x", lambda p: p.symlink_to(p.parent.parent), "folder inside a class"),
    "a nested class": ("ant/red", lambda p: p.mkdir(), "a folder inside a class folder"),
    "an empty class": ("cow", lambda p: p.mkdir(), "cow holds no images. Fill it, or remove"),
    "a class of litter": (
        "cow/Thumbs.db", lambda p: (p.parent.mkdir(), p.touch()), "cow holds no images"
    ),
    "a text": ("ant/x.txt", lambda p: p.write_text("x"), r"x\.txt is not an image that can be"),
    "no suffix": ("ant/x", lambda p: p.write_text("x"), r"ant/x is not an image that can be"),
    "a name that is no text": (
        os.fsdecode(b"ant/\xff.png"), lambda p: p.write_bytes(b"x"), r"cannot be a key.*UTF-8"
    ),
    "a class that is no text": (os.fsdecode(b"\xffcow"), lambda p: p.mkdir(), "is not UTF-8"),
    "a line end": ("ant/a\nb.png", lambda p: p.write_bytes(b"x"), "control characters"),
    "a long name": (f"ant/{'x' * 200}.png", lambda p: p.write_bytes(b"x"), "90 bytes or fewer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_no_image_is_refused_by_name(tree, tmp_path, kind, monkeypatch):
    name, make, message = STRANGE[kind]
    monkeypatch.chdir(tmp_path)
    make(tree / name)
    with pytest.raises(DataError, match=message) as error:
        image_folder(tree)
    assert "tree" in str(error.value)
    str(error.value).encode()  # can be printed


def test_a_file_that_becomes_a_fifo(tree, tmp_path):
    source, index = image_folder(tree), open_tree(tree)
    (tree / "ant/0.png").unlink()
    os.mkfifo(tree / "ant/0.png")
    with pytest.raises(DataError, match=r"0\.png is a FIFO"):
        prepare(source, tmp_path / "out", "train")
    with pytest.raises(DataError, match=r"0\.png is a FIFO"):
        index.read(0)


def test_unreadable_files_and_folders(tree):
    """As a user for whom they are closed: root reads everything."""
    (tree / "ant").chmod(0)
    tree.parent.chmod(0o755)
    script = (
        "import os\n"
        "from pathlib import Path\n"
        "from flatcal_dist.data import image_folder\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"
        "image_folder(Path('tree'))\n"
    )
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tree.parent, env=os.environ | path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (tree / "ant").chmod(0o755)
    assert "DataError: tree/ant cannot be read (Permission denied)" in run.stderr


def test_a_directory_above_the_classes_is_known(tree, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    (tree / "../whole/train").symlink_to(tree)
    (whole / "val").symlink_to(tree)
    (whole / "whole.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"holds folders \(train, val\).*above the classes.*/train"):
        image_folder(whole)
    assert len(image_folder(whole / "train")) == 6


def test_names_and_contents_of_many_kinds_arrive(tmp_path):
    """Upper case, spaces, letters of all languages, formats under other names, linked classes."""
    image, _ = photograph(0, 0)
    image = image.resize((40, 30))
    sixteen = Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16))
    frames = {"save_all": True, "append_images": [image.rotate(90)]}
    files = {
        "Größe & co/IMG 0001.JPG": encoded(image),
        "Größe & co/IMG 0002.JPEG": encoded(image, "png"),
        "Größe & co/Screenshot 2024-01-01 at 10.00.00\u202fAM.png": encoded(image, "png"),
        "日本語/👨‍👩‍👧.png": encoded(image.convert("P"), "png"),
        "日本語/cmyk.jpeg": encoded(image.convert("CMYK")),
        "日本語/sixteen.PNG": encoded(sixteen, "png"),
        "日本語/a.b.c.jpg": encoded(image.convert("L")),
        "日本語/moving.webp": encoded(image, "webp", **frames),
        "日本語/moving.jpg": encoded(image, "gif", **frames),
        "日本語/progressive.jpg": encoded(image, progressive=True),
        "日本語/alpha.png": encoded(image.convert("RGBA"), "png"),
    }
    del files["日本語/moving.jpg"]  # its key would be that of moving.webp
    files["日本語/moving gif.jpg"] = encoded(image, "gif", **frames)
    root = tmp_path / "elsewhere"
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    tree = tmp_path / "tree"
    tree.mkdir()
    for folder in root.iterdir():
        (tree / folder.name).symlink_to(folder)
    index = load_index(prepare(image_folder(tree), tmp_path / "out", "train").shards, classes=2)
    assert sorted(bytes(index.read(i)) for i in range(len(index))) == sorted(files.values())
    for sample in range(len(index)):
        assert decode(index.read(sample), 3, "x").shape == (3, 30, 40)
    found = validate_shards(index.shards, classes=2, decode_images=None)
    assert (found.images, found.errors) == (len(files), 0)
    Image.open(io.BytesIO(files["日本語/sixteen.PNG"])).verify()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index", "~nosuchuser/x.tar"], "~nosuchuser is no user's home directory here"),
        (["shard", "~nosuchuser/x", "out"], "~nosuchuser is no user's home directory here"),
        (["shard", "", "out"], "an argument is empty; is a variable of the shell unset?"),
        (["shard", "TREE", "FILE/out"], "FILE/out cannot be written (Not a directory)"),
        (["index", "TAKEN/x.tar"], "x.tar.index cannot be written (it is there, and no reg"),
    ],
)
def test_paths_that_cannot_be_are_said(words, message, tree, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").touch()
    (tmp_path / "TREE").symlink_to(tree)
    monkeypatch.chdir(tmp_path)
    if "TAKEN" in words[-1]:
        shard = prepare(image_folder(tree), tmp_path / "TAKEN", "train").shards[0]
        shard.rename(shard.with_name("x.tar"))
        (tmp_path / "TAKEN/x.tar.index").mkdir()
    with pytest.raises(SystemExit) as end:
        main([*words, "--split=train"] if words[0] == "shard" else [*words, "--workers=1"])
    assert message in str(end.value) + capsys.readouterr().err


def test_class_folders_may_have_dots(tmp_path):
    for folder in ("St. Bernard", "v1.0"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(png(0))
    found = image_folder(tmp_path)
    assert found.classes == ("St. Bernard", "v1.0")
    assert found.key.tolist() == [b"St_ Bernard_1", b"v1_0_1"]


def test_class_numbers_with_zeros_in_front(tmp_path):
    for folder in ("00", "01", "02", "10"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.png").write_bytes(png(int(folder)))
    assert image_folder(tmp_path).classes == ("00", "01", "02", "10")


# How many shards


def usual_count(source: Files, split: str) -> int:
    return sharding.usual_count(source, split)


def source_of(images: int, each: int, classes: tuple[str, ...] = ("a",), shards=None) -> Files:
    numbers = np.arange(images)
    return Files(
        kind="image folder", prefix="x", shards=shards, classes=classes, root=Path(),
        label=(numbers % len(classes)).astype(np.int32), key=numbers.astype("S"),
        name=numbers.astype("S"), size=np.full(images, each), time=numbers,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("images", "each", "count"),
    [
        (2_004, 100_000, 31),  # 0.2 GB: 64 images a shard
        (2_004, 3_000_000, 31),  # 6 GB: 40 shards of 150 MB would hold fewer than 64 images
        (63, 100_000, 1),
        (1, 100, 1),
        (50_000, 3_000, 32),  # small images: two shards for each of 16 workers
        (130_000, 110_000, 95),  # 14.3 GB
        (700_000, 2_000_000, 9_333),  # 1.4 TB
    ],
)
def test_the_number_of_shards_follows_from_the_bytes(images, each, count):
    assert usual_count(source_of(images, each), "train") == count


def test_published_numbers_of_shards_stay(tmp_path, monkeypatch):
    """Of ImageNet-1K, whose 1,000 wnids and number of images are known; not of parts of it."""
    whole = source_of(10, 1, shards={"train": 1024, "validation": 64})
    assert [usual_count(whole, split) for split in ("train", "validation")] == [1024, 64]
    for wnid in wnids():
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / f"{wnid}_1.JPEG").write_bytes(b"x")
    assert image_folder(tmp_path).shards is None
    module = sys.modules["flatcal_dist.data.making.image_folder"]
    monkeypatch.setattr(module, "IMAGENET_IMAGES", (1000, 50))
    assert image_folder(tmp_path).shards == {"train": 1024, "validation": 64}
    (tmp_path / wnids()[0]).rename(tmp_path / "n00000000")
    assert image_folder(tmp_path).shards is None


def test_a_folder_of_150_images_becomes_two_shards(tmp_path):
    (tmp_path / "t/a").mkdir(parents=True)
    for number in range(150):
        (tmp_path / f"t/a/{number}.png").write_bytes(b"x")
    main(["shard", str(tmp_path / "t"), str(tmp_path / "out"), "--workers", "1"])
    shards = expand(tmp_path / "out", "train")
    assert load_index(shards).lengths.tolist() == [75, 75]


# Data of one's own where the digits are asked for


def test_shards_of_other_classes_are_not_called_imagenet1k(tree, tmp_path):
    main(["shard", str(tree), str(tmp_path / "out"), "--workers", "1"])
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["images-train-0000.tar"]
    assert len(load_index(expand(tmp_path / "out", "train"), classes=2)) == 6
    for before, after in (("ant", "n01440764"), ("bee", "n01443537")):
        (tree / before).rename(tree / after)
    assert image_folder(tree).prefix == "imagenet1k"


def test_data_of_ones_own_are_left_alone(tree, digits_shards, tmp_path):
    mine = prepare(image_folder(tree), tmp_path / "mine", "train", shards=2).shards[0].parent
    partly = shutil.copytree(digits_shards, tmp_path / "digits")
    (partly / "notes.txt").write_text("mine")
    (partly / "digits.json").write_text("not JSON")
    for directory in (tree, mine, partly):
        with pytest.raises(DataError, match=r"data\.prepare=null") as error:
            prepare_digits(directory)
        assert "elete" not in str(error.value)
    (partly / "notes.txt").unlink()
    with pytest.raises(DataError, match=r"digits\.json cannot be read.*Delete the directory"):
        prepare_digits(partly)
