"""flatcal validate: every kind of damage is found, with shard and key, and none is invented."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from flatcal_dist.cli import main
from flatcal_dist.data import Sample, expand, index_shard, load_index, write_shards
from flatcal_dist.data.making.findings import print_validation
from flatcal_dist.data.making.validation import validate_shards
from flatcal_dist.data.shards.sidecars import sidecar
from tests.support.photographs import awkward_image, encoded, photograph


def jpeg(number: int) -> bytes:
    return encoded(photograph(number % 3, number)[0].resize((40, 30)))


def sample(number: int, **change) -> Sample:
    fields = {"key": f"s{number:03d}", "image": jpeg(number), "extension": "jpg"}
    return Sample(**fields | {"label": number % 3} | change)


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    """20 small photographs of 3 classes in four shards, to be damaged."""
    samples = [sample(i) for i in range(20)]
    return write_shards(samples, tmp_path / "w", "x-train", split="train", samples_per_shard=5)


def found(shards: list[Path], **options) -> dict[str, int]:
    return {f.kind: f.count for f in validate_shards(shards, **options).findings.values()}


def test_whole_shards_have_no_findings(four):
    result = validate_shards(four, classes=3, decode_images=None)
    assert result.findings == {}
    assert (result.shards, result.images, result.decoded, result.checksums) == (4, 20, 20, 4)
    assert result.labels == {0: 7, 1: 7, 2: 6}
    assert result.bytes == sum(len(jpeg(i)) for i in range(20))
    assert 4 <= validate_shards(four, decode_images=3).decoded < 20
    assert validate_shards(four, decode_images=0).decoded == 0


def test_workers_do_not_change_the_result(photograph_shards):
    one, two = (
        validate_shards(photograph_shards, classes=10, workers=workers).to_json()
        for workers in (1, 2)
    )
    assert one == two
    assert one["findings"] == []
    assert one["images"] == 89


def flip(shard: Path, at: int, value: int | None = None) -> None:
    data = bytearray(shard.read_bytes())
    data[at] = data[at] ^ 0x55 if value is None else value
    shard.write_bytes(data)


def member(shard: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(shard) as tar:
        return tar.getmember(name)


def flip_an_image(shards: list[Path]) -> None:
    info = member(shards[1], "s006.jpg")
    flip(shards[1], info.offset_data + info.size // 2)


def flip_a_label(shards: list[Path]) -> None:
    flip(shards[1], member(shards[1], "s006.cls").offset_data, ord("2"))


def flip_a_header(shards: list[Path]) -> None:
    flip(shards[1], member(shards[1], "s006.jpg").offset_data - 512)


def swap(shards: list[Path]) -> None:
    shutil.copy(shards[2], shards[1])


def swap_with_index(shards: list[Path]) -> None:
    swap(shards)
    shutil.copy(sidecar(shards[2]), sidecar(shards[1]))


def rename_key(shards: list[Path]) -> None:
    """Another shard of the same size and layout."""
    shards[1].write_bytes(shards[1].read_bytes().replace(b"s006.", b"t006."))
    data = bytearray(shards[1].read_bytes())
    for suffix in ("cls", "json", "jpg"):
        start = data.index(f"t006.{suffix}".encode())
        header = data[start : start + 512]
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[start : start + 512] = header
    shards[1].write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[list[Path]], object], dict[str, int]]] = {
    "cut short": (
        lambda s: os.truncate(s[1], member(s[1], "s008.jpg").offset_data + 100),
        {"shard unreadable": 1, "shard not as written": 1, "index stale": 1,
         "count not as in _info.json": 1},
    ),
    "end mark cut": (
        lambda s: os.truncate(s[1], len(s[1].read_bytes().rstrip(b"\0")) // 512 * 512 + 512),
        {"shard damaged": 1, "shard not as written": 1, "index stale": 1},
    ),
    "image flipped": (flip_an_image, {"shard not as written": 1, "image not as indexed": 1}),
    "label flipped": (flip_a_label, {"shard not as written": 1, "index stale": 1}),
    "header flipped": (
        flip_a_header,
        {"shard damaged": 1, "shard not as written": 1, "index stale": 1,
         "count not as in _info.json": 1, "image missing": 1},
    ),
    "missing": (lambda s: s[1].unlink(), {"shard missing": 1}),
    "swapped": (
        swap,
        {"shard not as written": 1, "index stale": 1, "key twice": 5, "image twice": 5},
    ),
    "swapped with its index": (
        swap_with_index, {"shard not as written": 1, "key twice": 5, "image twice": 5}
    ),
    "same size, other key": (rename_key, {"shard not as written": 1, "index stale": 1}),
    "empty": (
        lambda s: s[1].write_bytes(bytes(10240)),
        {"shard empty": 1, "shard not as written": 1, "index stale": 1,
         "count not as in _info.json": 1},
    ),
    "0 bytes": (
        lambda s: s[1].write_bytes(b""),
        {"shard unreadable": 1, "shard not as written": 1, "index stale": 1,
         "count not as in _info.json": 1},
    ),
    "index missing": (lambda s: sidecar(s[1]).unlink(), {"index missing": 1}),
    "index of another": (
        lambda s: shutil.copy(sidecar(s[2]), sidecar(s[1])), {"index stale": 1}
    ),
    "index damaged": (lambda s: flip(sidecar(s[1]), 60), {"index stale": 1}),
    "_info.json damaged": (
        lambda s: (s[1].parent / "_info.json").write_text("[]"), {"_info.json unreadable": 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(four, damage):
    do, expected = DAMAGES[damage]
    do(four)
    result = validate_shards(four)
    kinds = {f.kind: f.count for f in result.findings.values()}
    undecodable = kinds.pop("image undecodable", 0)  # a flipped bit may be seen there, too
    assert kinds == expected
    assert undecodable <= 1
    assert (result.errors > 0) == (damage != "index missing")
    for finding in result.findings.values():
        for example in finding.examples:
            assert Path(example["shard"]).name in (four[1].name, four[2].name, "_info.json")


def test_strangers_shards(tar):
    """Members gone, twice, torn apart or with names that no honest tar has: all in one report."""
    image = jpeg(0)
    shard = tar(
        ("../evil.jpg", image),
        ("/etc/evil.cls", b"0"),
        ("a.jpg", image),
        ("b.cls", b"1"),
        ("c.jpg", jpeg(1)),
        ("c.cls", b"cat"),
        ("d.jpg", b""),
        ("d.cls", b"1"),
        ("e.jpg", jpeg(2)),
        ("e.png", jpeg(3)),
        ("e.cls", b"1"),
        ("f.jpg", jpeg(4)),
        ("f.cls", b"-1"),
        ("g.jpg", jpeg(5)),
        ("g.cls", b"1000"),
        ("a.cls", b"1"),
        ("h.jpg", jpeg(6)),
        ("h.cls", b"0"),
        ("f.jpg", jpeg(7)),
    )
    result = validate_shards([shard], classes=1000, decode_images=None)
    by_kind = {f.kind: [e["key"] for e in f.examples] for f in result.findings.values()}
    assert by_kind == {
        "unsafe name": ["../evil.jpg", "/etc/evil.cls"],
        "image missing": ["b"],
        "label not a number": ["c"],
        "image empty": ["d"],
        "several images": ["e"],
        "key twice in a shard": ["f"],
        "label out of range": ["g"],
        "members not adjacent": ["a"],
        "index missing": [""],
        "class without images": [""],
    }
    assert result.images == 2  # g and h are whole
    assert result.labels == {0: 1, 1000: 1}
    assert not (shard.parent.parent / "evil.jpg").exists()
    negative = tar(("f.jpg", jpeg(4)), ("f.cls", b"-1"), ("n.jpg", image), name="n.tar")
    assert found([negative]) == {
        "label out of range": 1, "label missing": 1, "index missing": 1
    }  # fmt: skip


def test_awkward_images_are_listed(tmp_path):
    kinds = ("cmyk", "png", "exif", "gray", "truncated", "damaged", "megapixels", "bomb")
    samples = [sample(i, key=kind, image=awkward_image(kind)) for i, kind in enumerate(kinds)]
    shards = write_shards(samples, tmp_path, "x", split="train", samples_per_shard=3)
    result = validate_shards(shards, decode_images=0)
    by_kind = {f.kind: {e["key"] for e in f.examples} for f in result.findings.values()}
    assert by_kind == {
        "image CMYK": {"cmyk"},
        "image not JPEG": {"png"},
        "image rotated by EXIF": {"exif"},
        "image gray": {"gray", "megapixels"},
        "image huge": {"megapixels"},
        "image undecodable": {"truncated", "damaged", "bomb"},
    }
    assert result.decoded == 1  # the truncated one, because its end mark is missing
    assert {f.kind for f in result.findings.values() if f.severity == "error"} == {
        "image undecodable"
    }


def test_orientations_that_turn_nothing_are_no_finding(tmp_path):
    """0 and 9 stand in files, though EXIF defines 1 to 8 alone; viewers take them for upright."""
    samples = [
        sample(i, key=f"o{i}", image=awkward_image("exif", orientation=i)) for i in range(10)
    ]
    shards = write_shards(samples, tmp_path, "x", split="train", samples_per_shard=10)
    findings = validate_shards(shards, decode_images=0).findings.values()
    turned = {e["key"] for f in findings if f.kind == "image rotated by EXIF" for e in f.examples}
    count = sum(f.count for f in findings if f.kind == "image rotated by EXIF")
    assert count == 7
    assert turned <= {f"o{i}" for i in range(2, 9)}


def test_duplicates_across_shards(tmp_path):
    """Of the same label and of another; the key twice is an error, the image a warning."""
    one = [sample(i) for i in range(4)]
    two = [
        sample(4),
        sample(5, image=jpeg(0), label=0),
        sample(6, image=jpeg(1), label=2),
        sample(7, key="s003"),
    ]
    shards = [
        *write_shards(one, tmp_path / "a", "x", split="train", samples_per_shard=4),
        *write_shards(two, tmp_path / "b", "y", split="train", samples_per_shard=4),
    ]
    result = validate_shards(shards)
    assert {f.kind: (f.count, f.severity) for f in result.findings.values()} == {
        "key twice": (1, "error"),
        "image twice": (1, "warning"),
        "image twice, other label": (1, "warning"),
    }
    (example,) = result.findings["image twice, other label"].examples
    assert example == {
        "shard": str(shards[1]),
        "key": "s006",
        "text": "the bytes of x-0000.tar s001, label 1 there, 2 here",
    }


def test_labels_and_counts(four, tmp_path):
    assert found(four, classes=2) == {"label out of range": 6}
    assert found(four, classes=5) == {"class without images": 2}
    info = tmp_path / "w" / "_info.json"
    info.write_text(info.read_text().replace("5,", "6,", 1))
    assert found(four) == {"count not as in _info.json": 1}


@pytest.mark.parametrize(
    ("name", "key", "of"),
    [
        ("train", "n01440764_{}", "ImageNet-1K has 1,281,167, 732 to 1300 a class"),
        pytest.param(
            "validation", "ILSVRC2012_val_{:08d}", "ImageNet-1K has 50,000, 50 to 50 a class",
            marks=pytest.mark.exhaustive,
        ),
        ("other", "other_{}", None),
    ],
)  # fmt: skip
def test_imagenet_is_known_by_its_keys(name, key, of, tmp_path):
    """A set with 1,000 classes and such keys is held against the published counts."""
    tiny = encoded(photograph(0)[0].resize((8, 8)))
    samples = [Sample(key.format(i), tiny + b"%d" % i, "jpg", i % 1000) for i in range(1001)]
    shards = write_shards(samples, tmp_path, "x", split=name, samples_per_shard=600)
    result = validate_shards(shards, decode_images=0)
    if of is None:
        assert result.findings == {}
        assert result.notes == []
    else:
        assert result.notes == [f"1,001 images, 1 to 2 a class; {of}"]
        assert list(result.findings) == ["not ImageNet's counts"]
        assert result.errors == 0


def test_command(four, tmp_path, capsys):
    report = tmp_path / "v.json"
    directory = str(four[0].parent)
    more = ["--split", "train", "--json", str(report), "--decode", "all", "--workers", "1"]
    main(["validate", directory, *more])
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert json.loads(report.read_text())["decoded"] == 20
    sidecar(four[0]).unlink()
    main(["validate", directory, *more])  # warnings alone leave the exit code 0
    assert "0 errors, 1 warnings" in capsys.readouterr().out
    four[2].unlink()
    flip_an_image(four)
    with pytest.raises(SystemExit) as exit:
        main(["validate", directory, *more])
    assert exit.value.code == 1
    told = json.loads(report.read_text())
    kinds = {f["kind"]: f for f in told["findings"]}
    assert {"shard missing", "image not as indexed", "index missing"} <= set(kinds)
    assert kinds["image not as indexed"]["examples"][0]["key"] == "s006"
    assert told["errors"] == sum(f["count"] for f in told["findings"] if f["severity"] == "error")
    for damaged in four:
        damaged.write_bytes(b"no tar")
    with pytest.raises(SystemExit, match="4 shards cannot be indexed"):
        main(["index", directory, "--workers", "2"])


@pytest.mark.parametrize("words", ["--decode -5", "--decode some", "--classes 0", "--workers 0"])
def test_numbers_that_mean_nothing_are_refused(four, capsys, words):
    """-5 images to decode would be none, and look like a check that passed."""
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(four[0].parent), *words.split()])
    assert ended.value.code == 2
    assert "is not a number of" in capsys.readouterr().err


def test_table_can_be_read(four):
    flip_an_image(four)
    result = validate_shards(four)
    output = io.StringIO()
    print_validation(result, Console(file=output, width=120))
    lines = output.getvalue().splitlines()
    (line,) = [line for line in lines if "image not as indexed" in line]
    assert "error" in line
    assert "x-train-0001.tar s006" in line
    assert lines[-1].endswith("0 warnings.")


def test_nothing_found_in_markup(tar):
    """Names from strangers are shown as they are, never taken as rich's markup."""
    result = validate_shards([tar(("[red]a.jpg", jpeg(0)))])
    output = io.StringIO()
    print_validation(result, Console(file=output, width=200))
    assert "[red]a" in output.getvalue()


def test_any_flipped_byte_ends_in_a_finding(four):
    """Random single bytes of a shard: found by the checksum, never a hang or another exception."""
    whole = four[1].read_bytes()
    random = np.random.default_rng(0)
    for at in random.integers(0, len(whole), 25).tolist():
        flip(four[1], at)
        kinds = found([four[1]], decode_images=0)
        assert "shard not as written" in kinds
        four[1].write_bytes(whole)


def test_without_checksums_flipped_headers_and_labels_are_still_found(four):
    """Foreign shards have only their index; it covers all that says where and what a sample is."""
    (four[0].parent / "x-train.sha256").unlink()
    whole = four[1].read_bytes()
    with tarfile.open(four[1]) as tar:
        members = [m for m in tar if m.name.endswith(("jpg", "cls"))]
    places = [m.offset_data + i for m in members if m.name.endswith("cls") for i in range(1)]
    places += [m.offset_data - 512 + i for m in members for i in (0, 3, 124, 130, 148, 156)]
    places += [m.offset_data + m.size // 2 for m in members if m.name.endswith("jpg")]
    for at in places:
        flip(four[1], at)
        assert found([four[1]], decode_images=0), at
        four[1].write_bytes(whole)
    index_shard(four[1])
    assert load_index(expand(four)).key(5) == "s005"
