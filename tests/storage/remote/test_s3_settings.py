"""s3.py: one set of settings for two clients, and which errors may pass. Nothing here needs a server."""

import pytest

from stillroom.storage.errors import StoreError, UsageError
from stillroom.storage.remote.s3 import Location, S3Settings, may_pass


def test_both_clients_get_the_same_settings() -> None:
    settings = S3Settings.from_environment(
        {
            "AWS_ACCESS_KEY_ID": "who", "AWS_SECRET_ACCESS_KEY": "hush", "AWS_SESSION_TOKEN": "today",
            "AWS_DEFAULT_REGION": "eu-north-1", "AWS_ENDPOINT_URL": "http://127.0.0.1:8333/", "AWS_ALLOW_HTTP": "true",
            "STILLROOM_S3_RETRY_S": "7.5",
        }
    )  # fmt: skip
    bytes_, log = settings.filesystem_arguments(), settings.storage_options()
    assert (bytes_["access_key"], bytes_["secret_key"], bytes_["session_token"]) == ("who", "hush", "today")
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    assert tuple(log[name] for name in names) == ("who", "hush", "today")
    assert bytes_["region"] == log["aws_region"] == "eu-north-1"
    assert f"{bytes_['scheme']}://{bytes_['endpoint_override']}" == log["aws_endpoint_url"] == "http://127.0.0.1:8333"
    assert log["aws_allow_http"] == "true"
    assert log["aws_conditional_put"] == "etag"
    assert settings.retry_s == 7.5
    assert not [secret for secret in ("who", "hush", "today") if secret in repr(settings)]


def test_without_keys_and_endpoint_the_chain_and_aws_are_left_to_decide() -> None:
    settings = S3Settings.from_environment({"AWS_SESSION_TOKEN": "a token without a key"})
    assert settings == S3Settings()
    assert not {"access_key", "region", "endpoint_override", "scheme"} & settings.filesystem_arguments().keys()
    assert not {"aws_access_key_id", "aws_region", "aws_endpoint_url"} & settings.storage_options().keys()
    assert S3Settings.from_environment({"AWS_ENDPOINT_URL": "https://s3.example"}).region == "us-east-1"
    both = {"AWS_ENDPOINT_URL": "https://all.example", "AWS_ENDPOINT_URL_S3": "https://s3.example:9000"}
    assert S3Settings.from_environment(both).endpoint == "https://s3.example:9000"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"AWS_ACCESS_KEY_ID": "who"}, "AWS_ACCESS_KEY_ID is set and AWS_SECRET_ACCESS_KEY is not"),
        ({"AWS_SECRET_ACCESS_KEY": "hush"}, "AWS_SECRET_ACCESS_KEY is set and AWS_ACCESS_KEY_ID is not"),
        ({"AWS_ENDPOINT_URL": "http://server"}, "which is not encrypted: set AWS_ALLOW_HTTP=true"),
        ({"AWS_ENDPOINT_URL": "server:9000"}, r"AWS_ENDPOINT_URL is 'server:9000', expected http\(s\)://host"),
        ({"AWS_ENDPOINT_URL_S3": "https://server/path"}, "AWS_ENDPOINT_URL_S3 is .*expected http"),
        ({"AWS_ENDPOINT_URL": "https://who:hush@server"}, "AWS_ENDPOINT_URL holds credentials"),
        ({"STILLROOM_S3_RETRY_S": "soon"}, "STILLROOM_S3_RETRY_S is 'soon', expected a number of seconds"),
        ({"STILLROOM_S3_RETRY_S": "-1"}, "STILLROOM_S3_RETRY_S is '-1'"),
        ({"STILLROOM_S3_RETRY_S": "nan"}, "STILLROOM_S3_RETRY_S is 'nan'"),
    ],
)
def test_settings_that_contradict_are_told(environment: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        S3Settings.from_environment(environment)
    assert "hush" not in str(caught.value)


def test_uris() -> None:
    assert Location.parse("s3://cellar/a/b/") == Location("cellar", "a/b")
    assert Location.parse("s3://cellar/a/b/").uri == "s3://cellar/a/b"
    assert Location.parse("s3://cellar").uri == Location.parse("s3://cellar/").uri == "s3://cellar"
    for uri in ("s3://", "s3:///a", "s3://a", "s3://ce llar/x", "s3://cellar/../x", "s3://cellar/a//b",
                "s3://cellar/a/.", "s3://cellar/a?b=c", "s3://cellar/a\\b"):  # fmt: skip
        with pytest.raises(StoreError, match="expected s3://"):
            Location.parse(uri)
    with pytest.raises(StoreError, match="holds no credentials") as caught:
        Location.parse("s3://who:hush@cellar/x")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect to server", True),
        ("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate.", True),
        ("AWS Error UNKNOWN (HTTP status 503) during PutObject operation", True),
        ("Error performing GET http://x in 1ms - HTTP error: error sending request", True),
        ("Server returned non-2xx status code: 503 Service Unavailable: <Error><Code>SlowDown</Code></Error>", True),
        ("operation timed out", True),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body.", False),
        ("403 Forbidden: <Error><Code>RequestTimeTooSkewed</Code></Error>", False),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation", False),
        ("AWS Error NETWORK_CONNECTION: curlCode: 60, SSL peer certificate was not OK", False),
        ("301 Moved Permanently: <Error><Code>PermanentRedirect</Code></Error>", False),
        ("Invalid JSON in log record", False),
    ],
)
def test_what_may_pass(text: str, passes: bool) -> None:
    assert may_pass(text) == passes
