"""How an S3 address is written, and what a store that cannot be used says at the start."""

from collections.abc import Iterator
from contextlib import closing

import pytest
from object_worlds import new_prefix
from seaweed import S3Server

from orion.common.errors import ConfigError
from orion.common.net.s3_access import lifecycle_rules, make_client, open_bucket
from orion.common.net.s3_address import S3Address, below, parse_s3_address

pytestmark = pytest.mark.xdist_group("s3")


def test_an_address_says_where_and_how() -> None:
    assert parse_s3_address("s3://my-bucket") == S3Address("my-bucket")
    text = (
        "s3://b.c/runs/1/?endpoint=https://x.example:9000/&region=auto&style=path&verify=size&part_mib=8&abort_days=0"
    )
    assert parse_s3_address(text) == S3Address(
        "b.c", "runs/1/", "https://x.example:9000", "auto", "path", "size", 8 * 2**20, abort_days=0
    )
    assert below("s3://bucket/base?region=x", "run-1") == "s3://bucket/base/run-1?region=x"
    assert below("s3://bucket", "run-1") == "s3://bucket/run-1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/tmp/x", "no S3 address"),
        ("s3://", "bucket's name"),
        ("s3://Upper", "bucket's name"),
        ("s3://key:secret@bucket/x", "credentials"),
        ("s3://bucket/a//b", "prefix"),
        ("s3://bucket/ü", "prefix"),
        ("s3://bucket?colour=red", "unknown option 'colour'"),
        ("s3://bucket?endpoint=localhost:9000", "endpoint"),
        ("s3://bucket?endpoint=http://user:x@host", "endpoint"),
        ("s3://bucket?style=none", "style"),
        ("s3://bucket?verify=", "verify"),
        ("s3://bucket?part_mib=4", "part_mib is a number from 5"),
        ("s3://bucket?abort_days=x", "abort_days"),
    ],
)
def test_an_address_that_cannot_be_meant_says_what_is_wrong(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_s3_address(text)
    with pytest.raises(ConfigError):
        below(text, "run")


@pytest.fixture
def prefix() -> Iterator[str]:
    yield new_prefix()


def test_a_prefix_belongs_to_one_run(s3: S3Server, prefix: str) -> None:
    address = parse_s3_address(s3.address(prefix))
    for _ in range(2):
        open_bucket(address, "mine").client.close()
    with pytest.raises(ConfigError, match="another run's objects; give another prefix"):
        open_bucket(address, "theirs")
    open_bucket(parse_s3_address(s3.address(prefix + "-2")), "theirs").client.close()


def test_a_bucket_is_told_to_drop_unfinished_uploads(s3: S3Server, prefix: str) -> None:
    address = parse_s3_address(s3.address(prefix, "&expire_days=30"))
    with closing(make_client(address)) as client:
        open_bucket(address, "mine").client.close()
        rules = client.get_bucket_lifecycle_configuration(Bucket=address.bucket)["Rules"]
    (ours,) = (rule for rule in rules if rule["Filter"]["Prefix"] == address.prefix)
    assert ours["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 2
    assert ours["Expiration"]["Days"] == 30


def test_other_rules_of_the_bucket_stay() -> None:
    address = S3Address("bucket", "base/run/")
    other = {"ID": "other", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 1}}
    (ours,) = lifecycle_rules(address, [])
    assert lifecycle_rules(address, [other]) == [other, ours] == lifecycle_rules(address, [ours | {"x": 1}, other])
    (base,) = lifecycle_rules(S3Address("bucket", "base/"), [])
    assert lifecycle_rules(address, [base]) == [base], "one rule for all runs below a prefix is enough"
    tagged = base | {"Filter": {"Prefix": "base/", "Tag": {"Key": "x", "Value": "y"}}}
    assert len(lifecycle_rules(address, [tagged])) == 2


def test_what_is_wrong_with_a_bucket_is_said_in_one_line(
    s3: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def advice(text: str) -> str:
        with pytest.raises(ConfigError) as caught:
            open_bucket(parse_s3_address(text), "mine")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no bucket 'not-there'" in advice(s3.address(prefix, bucket="not-there"))
    assert "cannot be reached" in advice(s3.address(prefix, endpoint="http://127.0.0.1:1"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "refuses these credentials (SignatureDoesNotMatch)" in advice(s3.address(prefix))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    assert "refuses these credentials (InvalidAccessKeyId)" in advice(s3.address(prefix))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    assert "no credentials found; set AWS_ACCESS_KEY_ID" in advice(s3.address(prefix))
