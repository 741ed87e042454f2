"""Credentials in the URLs of shards: used to open them, written and printed nowhere.

Run for real against a server on this machine, and every byte that is left is searched.
"""

import shutil
import stat
from pathlib import Path

import pytest
import yaml

from flatcal_dist import config as configuration
from flatcal_dist.config import ConfigError
from flatcal_dist.data import DataError
from flatcal_dist.data.sets.variants import find
from flatcal_dist.data.shards.access import Access
from flatcal_dist.data.shards.cache import ShardCache
from flatcal_dist.data.shards.listing import list_shards
from flatcal_dist.data.shards.remote import read_small
from tests.support.launching import digits, launch
from tests.support.web import serving

SECRETS = ("hunter2pw", "SeKret9", "Renewed7")
QUICK = Access(stall_timeout=1, retries=0, backoff=0.01)


def told(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


@pytest.fixture(scope="module")
def shards(digits_shards: Path) -> Path:
    return digits_shards


def test_a_run_leaves_no_credentials_behind_and_goes_on_with_renewed_ones(shards, tmp_path):
    """Over a line that breaks; stopped, gone on with another signature; then the server is gone."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    with serving(shards) as web:
        host = web.url.removeprefix("http://")
        web.script = {"digits-train-0000.tar": ["500", "cut"]}

        def words(user: str, signature: str, *more: str) -> list[str]:
            url = f"http://{user}@{host}/digits"
            named = {"train": "0000..0003", "validation": "0000..0001"}
            values = {
                "run": {"dir": str(run)},
                "data": {
                    split: f"{url}-{split}-{{{numbers}}}.tar?X-Amz-Signature={signature}"
                    for split, numbers in named.items()
                },
            }
            # In a file, as on a cluster: everybody reads the words of a command.
            config = tmp_path / "own.yaml"
            plain = [w for w in digits("csam", run, web.url) if "run.dir" not in w]
            config.write_text(yaml.safe_dump({"inherits": plain[1], **values}))
            rest = [w for w in plain[2:] if not w.startswith("data.")]
            streamed = ["data.prepare=null", "data.reader=auto", "data.epoch_samples=800",
                        f"data.cache={cache}", "data.workers=1", "train.max_steps=6",
                        "evaluate.at_end=true"]  # fmt: skip
            return ["--config", str(config), *rest, *streamed, *more]

        started = launch("imagenet_csam", *words("me:hunter2pw", "SeKret9"),
                         "train.stop_after_minutes=0.0001", processes=1)  # fmt: skip
        assert started.returncode == 75, started.stdout
        assert "attempt 1 failed" in started.stdout
        private = run / "config.private.yaml"
        assert "SeKret9" in private.read_text()
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
        served = web.count("digits-validation-0000.tar")
        done = launch("imagenet_csam", *words("you:Renewed7", "Renewed7", "wandb.mode=offline"),
                      processes=1)  # fmt: skip
        assert done.returncode == 0, done.stdout
        assert web.count("digits-validation-0000.tar") == served == 1, "kept under the same name"
        loaded = configuration.load(run / "config.yaml").data
        assert "you:Renewed7@" in loaded.validation, "as a resume needs it"
    shutil.rmtree(cache)
    gone = launch("imagenet_csam", *words("you:Renewed7", "Renewed7", f"run.dir={tmp_path}/new"),
                  "data.retries=0", processes=1)  # fmt: skip
    assert gone.returncode == 1
    assert "gave up" in gone.stdout
    for one in (started, done, gone):
        assert not told(one.stdout), one.stdout
    searched = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name for file in searched}
    assert {"index.html", "metrics.json", "metrics.csv", "config.yaml", "process.log"} <= names
    assert any(name.endswith(".wandb") for name in names)
    for file in searched:
        if file.name not in ("own.yaml", "config.private.yaml"):
            content = file.read_bytes()
            assert not any(s.encode() in content for s in SECRETS), file
            assert not told(str(file))


def test_errors_of_the_web_are_told_without_credentials(shards):
    with serving(shards) as web:
        host = web.url.removeprefix("http://")
        web.always = {"a.tar": "403", "b.tar": "500", "digits-train-0000.tar": "cut"}
        urls = [f"http://me:hunter2pw@{host}/{name}?sig=SeKret9" for name in web.always]
    urls += [f"http://me:hunter2pw@{host}/nobody/there.tar?sig=SeKret9",  # the server is gone now
             "http://me:hunter2pw@[bad/x.tar?sig=SeKret9", "http://me:hunter2pw@/x.tar",
             "http://me:hunter2pw@h\u2100/x.tar?SeKret9", "ftp://me:hunter2pw@h/x?SeKret9",
             "pipe:curl -u me:hunter2pw http://h/x.tar?SeKret9"]  # fmt: skip
    for url in urls:
        with pytest.raises((DataError, ValueError)) as error:
            read_small(url, QUICK)
        while (found := error.value) is not None:
            assert not told(str(found)), found
            error = type("Next", (), {"value": found.__cause__})
    for pattern in (
        "http://me:hunter2pw@h/{0..3.tar?sig=SeKret9",
        "{http://me:hunter2pw@h/x?SeKret9}",
    ):
        with pytest.raises(DataError) as error:
            list_shards(pattern, "train", QUICK)
        assert not told(str(error.value))
    with pytest.raises(DataError) as error:
        find("http://me:hunter2pw@h/x.tar?sig=SeKret9", 10)
    assert not told(str(error.value))


def test_credentials_are_no_part_of_a_configuration_s_identity():
    def config(user: str, signature: str):
        urls = f'["http://{user}@h/x.tar?sig={signature}", /own/y.tar, "s3://b/z.tar"]'
        return configuration.load(None, [f"data.train={urls}", "run.dir=run"])

    old, new = config("me:hunter2pw", "SeKret9"), config("you", "Renewed7")
    assert configuration.differences(old, new) == []
    assert configuration.fingerprint(old) == configuration.fingerprint(new)
    other = old.model_copy(
        update={"data": old.data.model_copy(update={"train": "http://h/q?SeKret9"})}
    )
    (line,) = configuration.differences(old, other)
    assert "http://h/x.tar" in line
    assert not told(line)
    with pytest.raises(ConfigError) as error:
        configuration.load(None, ["http://me:hunter2pw@h/x?sig=SeKret9"])
    assert not told(str(error.value))


def test_a_shard_has_one_place_in_the_cache_whoever_asks(tmp_path):
    cache = ShardCache(tmp_path, QUICK)
    assert cache.path("http://me:a@h/x.tar?sig=1") == cache.path("http://h:80/x.tar?sig=2")
    assert cache.path("http://h/get?file=x.tar&sig=1") == cache.path(
        "http://h/get?file=x.tar&sig=2"
    )
    others = ["http://h/x.tar", "http://h:81/x.tar", "https://h/x.tar", "http://h/get?file=x.tar",
              "http://h/get?file=y.tar", "s3://h/x.tar", "http://h/a/x.tar"]  # fmt: skip
    assert len({cache.path(url) for url in others}) == len(others)
    with pytest.raises(DataError, match="is named twice"):
        list_shards("http://h/x.tar?part={0..3}", "train", QUICK)
