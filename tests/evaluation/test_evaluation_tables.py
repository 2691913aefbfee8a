"""Markdown tables: no name can end a cell or a row; a value is written with the error that is known."""

from latentdiff.evaluation.tables import NONE, format_setting, format_value, markdown_table, value_cells


def test_a_cell_with_a_bar_or_a_line_break_stays_one_cell():
    assert markdown_table(("", "a|b"), [("x\ny", 1), ("---", None)]) == [
        "| | a\\|b |",
        "|---|---|",
        "| x y | 1 |",
        "| --- | None |",
    ]


def test_a_value_stands_with_its_standard_error_else_with_its_spread():
    entry = {"value": 1.0, "stderr": 0.5, "spread": 2.0, "floor": 3.0, "floor_seed_spread": 0.25, "images": 7}
    assert format_value(entry) == "1.0000 ± 0.5000" and format_value(entry, "floor") == "3.0000 ± 0.2500"
    assert value_cells(entry) == ("1.0000 ± 0.5000", "3.0000 ± 0.2500", NONE, "7")
    assert format_setting(None) == "not stated" and format_setting({"a": 1, "b": [2]}) == "a 1, b [2]"
