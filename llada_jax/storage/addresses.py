"""The kinds of object storage that TensorStore reaches, and what an address says: gs://BUCKET/NAME or s3://BUCKET/NAME.

An s3:// address may belong to another maker's storage, or to an emulator: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL says
where it is, as for other programs, and AWS_REGION or AWS_DEFAULT_REGION its region. TensorStore and s3fs read different
ones of these variables, so `elsewhere` reads them for both. TensorStore reads the credentials as other programs do.
"""

import os
from typing import Any, NamedTuple

from llada_jax.config import UserError

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


def elsewhere() -> tuple[str, str]:
    """Returns the endpoint of s3:// and the region there, each "" if it is not given.

    Without an endpoint no region counts: the bucket's own is looked up, which need not be that of the machine.
    """
    first = lambda *names: next((os.environ[name] for name in names if os.environ.get(name)), "")  # noqa: E731
    endpoint = first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return endpoint, first("AWS_REGION", "AWS_DEFAULT_REGION") if endpoint else ""


def spec(kind: str, bucket: str) -> dict[str, Any]:
    """Returns TensorStore's description of a bucket."""
    result: dict[str, Any] = {"driver": DRIVERS[kind], "bucket": bucket}
    if kind == "s3":
        endpoint, region = elsewhere()
        result |= {"endpoint": endpoint} if endpoint else {}
        result |= {"aws_region": region} if region else {}
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # otherwise TensorStore complains that there is no ~/.aws/config
            result["aws_credentials"] = {"type": "environment"}
    return result


def opened(kind: str, bucket: str, context: Any, **more: Any) -> Any:
    """Returns TensorStore's view of a bucket. No request is sent.

    Args:
      kind: The kind of storage.
      bucket: The name of the bucket.
      context: TensorStore's context, which says how requests are sent.
      more: Further fields of its description.

    Raises:
      UserError: If there can be no such bucket, for example because its name has capital letters.
    """
    import tensorstore

    try:
        return tensorstore.KvStore.open(spec(kind, bucket) | more, context=context).result()
    except ValueError as error:
        raise UserError(f"{kind}://{bucket} cannot be used: {' '.join(str(error).split())[:200]}") from error
