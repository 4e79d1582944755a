"""The table of what goes where in known models is what its command makes."""

from __future__ import annotations

import sys

import pytest

from tests.docs.test_docs import DOCS


def test_the_table_of_models_is_what_param_groups_does(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(DOCS))
    import make_model_table

    try:
        page = make_model_table.PAGE.read_text()
        rows = make_model_table.table()
        assert make_model_table.page_with(rows, page) == page, "run python docs/make_model_table.py"
        assert rows.count("\n|") > 40
    finally:
        for name in ("make_model_table", "model_classes"):
            sys.modules.pop(name, None)
