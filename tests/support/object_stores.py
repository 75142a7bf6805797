"""An S3 store that a test run serves to itself, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline import storage

ALLOWED = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'


@contextmanager
def served() -> Iterator[str]:
    """Host and port of a server that asks for credentials; one user has them, in the environment."""
    import boto3
    import requests

    moto = pytest.importorskip("moto.server", reason="pip install 'moto[s3,server]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    _unasked(f"{host}:{port}", "inf")  # moto's state belongs to the process: an earlier server has left some
    requests.post(f"http://{host}:{port}/moto-api/reset", timeout=10)
    anybody = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
    where = {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"}
    boto3.client("s3", **where, **anybody).create_bucket(Bucket="artifacts")
    iam = boto3.client("iam", **where, **anybody)
    iam.create_user(UserName="palisade")
    iam.put_user_policy(UserName="palisade", PolicyName="all", PolicyDocument=ALLOWED)
    key = iam.create_access_key(UserName="palisade")["AccessKey"]
    _unasked(f"{host}:{port}", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        storage._connection.cache_clear()
        yield f"{host}:{port}"
    storage._connection.cache_clear()
    server.stop()


def url(endpoint: str, key: str) -> str:
    """URL of the objects below ``key``, which starts with a bucket: the server has one, ``artifacts``."""
    return f"s3://{key}?endpoint_override={endpoint}&scheme=http&region=us-east-1"


def _unasked(endpoint: str, requests_: str) -> None:
    """Sets how many requests the server answers before it asks for credentials."""
    import requests

    requests.post(f"http://{endpoint}/moto-api/reset-auth", data=requests_, timeout=10)
