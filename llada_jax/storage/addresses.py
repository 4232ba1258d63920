"""The kinds of object storage that TensorStore reaches, and what an address says: gs://BUCKET/NAME or s3://BUCKET/NAME.

An s3:// address may belong to another maker's storage, or to an emulator: AWS_ENDPOINT_URL and AWS_REGION say where it
is, as they do for other programs. TensorStore reads the credentials as those do, too.
"""

import os
from typing import Any, NamedTuple

DRIVERS = {"gs": "gcs", "s3": "s3"}  # TensorStore's driver of each kind


class Address(NamedTuple):
    """An address in its parts."""

    kind: str  # gs or s3; "" for a path on this machine
    bucket: str
    name: str  # of an object, or of a folder


def parse(path: str | os.PathLike) -> Address:
    """Returns the parts of an address."""
    kind, found, rest = os.fspath(path).partition("://")
    bucket, _, name = rest.partition("/")
    return Address(kind, bucket, name) if found else Address("", "", os.fspath(path))


def spec(kind: str, bucket: str) -> dict[str, Any]:
    """Returns TensorStore's description of a bucket."""
    result: dict[str, Any] = {"driver": DRIVERS[kind], "bucket": bucket}
    if kind == "s3":
        elsewhere = {"endpoint": "AWS_ENDPOINT_URL", "aws_region": "AWS_REGION"}
        result |= {field: os.environ[name] for field, name in elsewhere.items() if os.environ.get(name)}
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # otherwise TensorStore complains that there is no ~/.aws/config
            result["aws_credentials"] = {"type": "environment"}
    return result
