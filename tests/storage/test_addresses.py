"""Tests where addresses lead: the variables of the environment, and buckets that cannot be."""

import fsspec
import pytest

from llada_jax.config import UserError
from llada_jax.storage import addresses, objects, ranges

ENDPOINTS, REGIONS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), ("AWS_REGION", "AWS_DEFAULT_REGION")


@pytest.fixture
def clean(monkeypatch):
    """Takes all variables away that say where s3:// is."""
    for name in (*ENDPOINTS, *REGIONS, "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("region", REGIONS)
def test_tensorstore_and_s3fs_are_told_the_same_endpoint_and_region(clean, monkeypatch, endpoint, region):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(fsspec.config, "conf", {})
    bucket = {"driver": "s3", "bucket": "bucket"}
    monkeypatch.setenv(region, "there")  # of this machine: the bucket's own is looked up
    assert addresses.spec("s3", "bucket") == bucket
    objects._prepare.__wrapped__()
    assert not {"endpoint_url", "client_kwargs"} & set(fsspec.config.conf["s3"])
    monkeypatch.setenv(endpoint, "http://x")
    fsspec.config.conf.clear()
    assert addresses.spec("s3", "bucket") == bucket | {"endpoint": "http://x", "aws_region": "there"}
    objects._prepare.__wrapped__()
    told = fsspec.config.conf["s3"]
    assert told["endpoint_url"] == "http://x" and told["client_kwargs"] == {"region_name": "there"}
    monkeypatch.delenv(region)
    assert addresses.spec("s3", "bucket") == bucket | {"endpoint": "http://x"}


def test_the_variable_of_s3_alone_goes_first(clean, monkeypatch):
    for name in (*ENDPOINTS, *REGIONS):
        monkeypatch.setenv(name, name)
    assert addresses.elsewhere() == ("AWS_ENDPOINT_URL_S3", "AWS_REGION")


@pytest.mark.parametrize("url", ["gs://B/run", "s3://b/run"])
def test_a_bucket_that_cannot_be_is_one_line(clean, url):
    for ask in (lambda: objects.exists(f"{url}/x"), lambda: ranges.Folder(url)):
        with pytest.raises(UserError, match=f"^{url[:-4]} cannot be used: .*[Ii]nvalid .* bucket name") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_what_installs_a_missing_package():
    said = {"gs://b/x": ": pip install 'llada_jax[gcs]'", "s3://b/x": ": pip install 'llada_jax[s3]'", "az://b/x": ""}
    assert {path: objects.installation(path) for path in said} == said
