"""Small data sets in exactly the form in which the real ones are published."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}


def pickled_by_python2(value) -> bytes:
    """A pickle of protocol 2 as Python 2 and numpy 1 wrote it, in which text is bytes."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value) -> bytes:
    if isinstance(value, dict):
        items = b"".join(_opcodes(key) + _opcodes(one) for key, one in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, int):
        return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, np.ndarray):
        kind = b"cnumpy\ndtype\n" + _opcodes(value.dtype.str[1:]) + b"K\x00K\x01\x87R"
        order = b"|" if value.dtype.itemsize == 1 else b"<"
        kind += b"(K\x03" + _opcodes(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = b"(" + b"".join(map(_opcodes, value.shape)) + b"t"
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        return empty + b"(K\x01" + shape + kind + b"\x89" + _opcodes(value.tobytes()) + b"tb"
    data = value.encode() if isinstance(value, str) else value
    short = len(data) < 256
    return (b"U" + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data))) + data


def cifar_files(classes: int, per_batch: int = 12) -> dict[str, bytes]:
    """The files of an archive of CIFAR, and nothing but fewer images."""
    random = np.random.default_rng(classes)
    batches = ["train", "test"] if classes == 100 else [f"data_batch_{i}" for i in range(1, 6)]
    files = {}
    for name in batches if classes == 100 else [*batches, "test_batch"]:
        pixels = random.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = random.integers(0, classes, per_batch).tolist()
        names = [f"image_{i}.png" for i in range(per_batch)]
        batch = {"filenames": names, "batch_label": f"{name} of 1", "data": pixels}
        key = "labels" if classes == 10 else "fine_labels"
        files[name] = pickled_by_python2(batch | {key: labels})
    if classes == 10:
        labels = {"label_names": [f"class{i}" for i in range(10)], "num_vis": 3072}
        files["batches.meta"] = pickled_by_python2(labels)
    else:
        names = [f"fine{i}" for i in range(100)]
        files["meta"] = pickled_by_python2({"fine_label_names": names, "coarse_label_names": []})
    files["readme.html"] = b"<html></html>"
    return files


def cifar_archive(path: Path, files: dict[str, bytes], classes: int) -> Path:
    """cifar-10-python.tar.gz or cifar-100-python.tar.gz."""
    with tarfile.open(path, "w:gz", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo(FOLDERS[classes])
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(f"{FOLDERS[classes]}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(data, "jpeg")
    return data.getvalue()


WNIDS = ["n02124075", "n04067472", "n01443537"]  # not sorted, as in the archive


def tiny_imagenet_files(per_class: int = 12) -> dict[str, bytes]:
    """The files of tiny-imagenet-200.zip below its folder, with fewer classes and images."""
    files = {"wnids.txt": "\n".join(WNIDS).encode() + b"\n", "words.txt": b"n00001740\tentity\n"}
    for k, wnid in enumerate(WNIDS):
        boxes = []
        for i in range(per_class):
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(100 * k + i)
            boxes.append(f"{wnid}_{i}.JPEG\t0\t0\t63\t63")
        files[f"train/{wnid}/{wnid}_boxes.txt"] = "\n".join(boxes).encode()
    lines = []
    for i in range(11):
        files[f"val/images/val_{i}.JPEG"] = jpeg(1000 + i)
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t32\t44\t62")
    files["val/val_annotations.txt"] = "\n".join(lines).encode() + b"\n"
    files["test/images/test_0.JPEG"] = jpeg(5000)
    return files


def tiny_imagenet_archive(path: Path, files: dict[str, bytes]) -> Path:
    """tiny-imagenet-200.zip: images stored as they are, texts compressed."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("tiny-imagenet-200")
        for name, data in files.items():
            kind = zipfile.ZIP_STORED if name.endswith("_0.JPEG") else zipfile.ZIP_DEFLATED
            archive.writestr(f"tiny-imagenet-200/{name}", data, kind)
    return path
