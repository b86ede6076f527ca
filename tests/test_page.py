"""Pages from templates: text stays text, and a missing or unwritable value is an error."""

from __future__ import annotations

import math
from pathlib import Path

import jinja2
import pytest

from fewstep.page import render


@pytest.fixture
def template(tmp_path) -> Path:
    (tmp_path / "page.html").write_text("<p>{{ text }}</p><script>{{ data | tojson }}</script>{{ 0.1 | shown(2) }}")
    return tmp_path / "page.html"


def test_text_stays_text(template):
    page = render(template, text="a < b & c", data={"x": "</script>"})
    assert page == '<p>a &lt; b &amp; c</p><script>{"x":"\\u003c/script\\u003e"}</script>0.1'


def test_a_missing_value_and_nan_are_errors(template):
    with pytest.raises(jinja2.UndefinedError, match="'text' is undefined"):
        render(template, data={})
    with pytest.raises(ValueError, match="Out of range float values"):
        render(template, text="", data=math.nan)
