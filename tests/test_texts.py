"""Texts as a person reads them: secrets in URLs are masked, and found again where they are known."""

from __future__ import annotations

import pytest

from fewstep.texts import has_masked, masked, one_line, quoted, reason, revealed

URLS = {
    "http://alice:PW@host:5000": "http://alice:***@host:5000",
    "http://alice:PW@127.0.0.1:9/api?x=1": "http://alice:***@127.0.0.1:9/api?x=1",
    "postgresql+psycopg2://u:p%40ss@db/mlflow": "postgresql+psycopg2://u:***@db/mlflow",
    "http://alice:p@ss@host/": "http://alice:***@host/",
    "postgresql://u:PW/with/slash@db/x": "postgresql://u:***@db/x",
    "mysql://u:PW#1?2@db/x": "mysql://u:***@db/x",
    "http://:PW@host": "http://:***@host",
    "https://ghp_TOKEN@host/x": "https://***@host/x",
    "mysql://h/db?user=u&password=PW": "mysql://h/db?user=u&password=***",
    "https://h/x?AccessToken=PW&y=2": "https://h/x?AccessToken=***&y=2",
    "az://c/x?sv=1&sig=PW%3D": "az://c/x?sv=1&sig=***",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3DPW": "mssql+pyodbc:///?odbc_connect=***",
    "mssql+pyodbc:///?odbc_connect=DRIVER=x;UID=u;PWD=PW": "mssql+pyodbc:///?odbc_connect=***;UID=u;PWD=***",
    "s3://key:PW@bucket/runs": "s3://key:***@bucket/runs",
}
PLAIN = [
    "sqlite:////data/mlflow.db",
    "http://host:5000/path?mail=a@b",
    "http://127.0.0.1:5000",
    "http://[::1]:5000/x",
    "s3://bucket/runs?versionId=3",
    "sftp://me@host/runs",
    "a text: with a colon, an @ sign and a key=value",
    "file:///x",
]


@pytest.mark.parametrize("url", URLS)
def test_secrets_in_urls_are_masked(url):
    assert masked(url) == URLS[url]
    assert masked(masked(url)) == masked(url) and has_masked(masked(url))


@pytest.mark.parametrize("text", PLAIN)
def test_texts_without_a_secret_stay(text):
    assert masked(text) == text and not has_masked(text)


def test_secrets_are_masked_in_the_middle_of_texts_and_inside_of_mappings():
    text = "API request to 'http://alice:PW@host/api' failed, see \"https://h?token=PW\" and x@y: timed out"
    assert masked(text) == text.replace("PW", "***")
    nested = {"a": {"b": ["http://u:PW@h", 3, None]}, "c": ("s3://k:PW@b/x",)}
    assert masked(nested) == {"a": {"b": ["http://u:***@h", 3, None]}, "c": ["s3://k:***@b/x"]}


def test_errors_quote_nothing_secret():
    assert quoted("http://u:PW@h") == "'http://u:***@h'"
    error = ValueError("cannot reach\nhttp://u:PW@h")
    assert reason(error) == "cannot reach\nhttp://u:***@h" and one_line(error) == "cannot reach http://u:***@h"


def test_a_masked_url_is_revealed_by_the_one_that_it_stands_for():
    full = "http://alice:PW@host"
    assert revealed("http://alice:***@host", None, "http://bob:PW@host", full) == full
    assert revealed("http://alice:***@host", "http://alice:PW@other") == "http://alice:***@host"
    assert revealed("http://alice:***@host/runs/a", full + "/runs/") == full + "/runs/a"
    assert revealed("http://alice:***@hostile", full) == "http://alice:***@hostile"
    assert revealed("http://host", full) == "http://host" and revealed(None, full) is None
