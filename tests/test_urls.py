"""How the addresses of shards are shown and told apart, and where their credentials are kept."""

import pytest

from flatcal_dist import config as configuration
from flatcal_dist.ranks.distributed import describe
from flatcal_dist.urls import base_name, hide, identity, shown
from tests.runs.test_credentials import told


@pytest.mark.parametrize(
    ("address", "seen", "same"),
    [
        ("http://me:hunter2pw@h:80/x-{0..3}.tar?sig=SeKret9#f", "http://h:80/x-{0..3}.tar",
         "http://h/x-{0..3}.tar"),
        ("HTTPS://Me@Host:8443/a.tar", "HTTPS://Host:8443/a.tar", "https://host:8443/a.tar"),
        ("http://me:hunter/2pw@h/x.tar", "http://h/x.tar", "http://h/x.tar"),
        ("http://h:1/@me/x.tar?a@b", "http://h:1/@me/x.tar", "http://h:1/@me/x.tar"),
        ("http://[::1]:80/@me/x.tar", "http://[::1]:80/@me/x.tar", "http://[::1]/@me/x.tar"),
        ("s3://key:SeKret9@b/k/x.tar?versionId=3", "s3://b/k/x.tar",
         "s3://b/k/x.tar?versionId=3"),
        ("hf://datasets/u/r@main/x.tar", "hf://datasets/u/r@main/x.tar",
         "hf://datasets/u/r@main/x.tar"),
        ("http://h/get?file=a.tar&X-Amz-Signature=SeKret9", "http://h/get",
         "http://h/get?file=a.tar"),
        ("pipe:T=SeKret9 curl -H 'Authorization: Bearer hunter2pw' https://h/x-01.tar?sig=Renewed7",
         "pipe:curl ... x-01.tar",
         "pipe:T=SeKret9 curl -H 'Authorization: Bearer hunter2pw' https://h/x-01.tar"),
        ("pipe:cat /a/b/x-0001.tar", "pipe:cat ... x-0001.tar", "pipe:cat /a/b/x-0001.tar"),
        ("data/x-????.tar", "data/x-????.tar", "data/x-????.tar"),
    ],
)  # fmt: skip
def test_how_an_address_is_shown_and_identified(address, seen, same):
    assert shown(address) == seen
    assert identity(address) == same
    assert identity(same) == same
    assert "SeKret9" not in seen


def test_the_name_of_a_shard_is_that_of_its_file():
    assert base_name("http://h/a/x-0001.tar?sig=a/b") == "x-0001.tar"
    assert base_name("pipe:cat /a/b/x-0001.tar") == "x-0001.tar"
    assert base_name("/a/b/x-0001.tar") == "x-0001.tar"


def test_other_libraries_messages_are_told_without_credentials():
    for text in (
        "HTTPConnectionPool(host='h', port=9): Max retries exceeded with url: /a?sig=SeKret9 (x)",
        "Invalid URL 'http://me:hunter2pw@h/x?SeKret9': no host",
        "401 for Authorization: Bearer SeKret9",
        "token=SeKret9&other=1 is too old",
    ):
        assert not told(hide(text)), hide(text)
        assert not told(describe(RuntimeError(text)))
    assert hide("bad SeKret9/", "http://h/x?sig=SeKret9%2F") == "bad ***"


def test_credentials_are_kept_beside_a_configuration_and_go_where_they_belong(tmp_path):
    urls = '["http://me:hunter2pw@h/x.tar?sig=SeKret9", /own/y.tar, "s3://b/z.tar"]'
    old = configuration.load(None, [f"data.train={urls}", "run.dir=run"])
    configuration.write(old, tmp_path / "config.yaml")
    assert not told((tmp_path / "config.yaml").read_text())
    assert configuration.load(tmp_path / "config.yaml") == old
    # What is edited afterwards is not filled with credentials of something else.
    text = (tmp_path / "config.yaml").read_text().replace("http://h/x.tar", "http://h/other.tar")
    (tmp_path / "config.yaml").write_text(text)
    assert configuration.load(tmp_path / "config.yaml").data.train[0] == "http://h/other.tar"
    configuration.write(configuration.load(None, ["run.dir=run"]), tmp_path / "config.yaml")
    assert not (tmp_path / "config.private.yaml").exists()
