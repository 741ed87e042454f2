"""Versions, code and devices of a run, for environment.json and `flatcal environment`."""

import hashlib
import json
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "flatcal_dist", "torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset",
    "wandb", "numpy", "scikit-learn", "pillow", "simplejpeg",
)  # fmt: skip


def describe_environment(decoder: str = "auto") -> dict:
    """Return versions of Python and packages, git commit and changes, host, devices and job.

    `decoder` is what `data.decoder` holds. The record names the decoder that is used here.
    """
    import torch  # here, because launch/submit.py needs the rest of this module alone

    from flatcal_dist.data.images.decode import describe_decoder

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": code_version(),
        "cpu_count": os.cpu_count(),
        "devices": [
            torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
        ],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "decoder": describe_decoder(decoder),
        "slurm": {key: value for key, value in os.environ.items() if key.startswith("SLURM_JOB_")},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_version() -> dict[str, str | None]:
    """Return the git commit, and a hash of the changes since; None outside of a repository."""
    root = Path(__file__).resolve().parents[2]
    snapshot = root / "snapshot.json"  # written by launch/submit.py, beside the code it copied
    if snapshot.exists():
        return json.loads(snapshot.read_text())

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    difference = git("diff", "HEAD")
    return {
        "commit": commit.strip() if commit else None,
        "diff_sha256": hashlib.sha256(difference.encode()).hexdigest() if difference else None,
    }
