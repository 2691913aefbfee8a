"""The page as a whole."""


def test_the_page_has_five_tabs(visit):
    assert visit.page.get_by_role("tab").all_inner_texts() == ["Generate", "Edit", "Explore", "Runs", "Measure"]
