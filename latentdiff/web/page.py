"""The page: a heading and five tabs, each made by a module of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from latentdiff.web import edit, explore, generate, measure, runs

if TYPE_CHECKING:
    from latentdiff.web.context import Context

# The title of each tab, and what fills it
TABS = {
    "Generate": generate.build,
    "Edit": edit.build,
    "Explore": explore.build,
    "Runs": runs.build,
    "Measure": measure.build,
}
CACHE_SECONDS = (300, 3600)  # how often results and uploads are looked through, and the age at which they are removed
# Only fonts of the visitor's own machine: the page asks for nothing from elsewhere
FONTS = ("system-ui", "sans-serif")
MONOSPACED = ("ui-monospace", "monospace")
# Small images are enlarged without blurring. A gallery shows all its images instead of a window with a scroll bar, all of its
# columns on a phone too. What has no content yet is not shown
CSS = """
.pixels img {image-rendering: pixelated}
.rows .grid-container {min-width: 34rem}
.whole .grid-wrap {min-height: 0 !important; max-height: none !important; overflow: visible !important}
.rows .grid-wrap {overflow-x: auto !important}
.whole .grid-container {grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important;
  grid-template-rows: none !important; grid-auto-rows: auto !important}
.when-full:has(.empty) {display: none !important}
"""


def theme() -> Any:
    """The look of the page."""
    return gr.themes.Default(font=FONTS, font_mono=MONOSPACED)


def build_page(context: Context) -> gr.Blocks:
    """The page of a server."""
    with gr.Blocks(title="latentdiff", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.Markdown("# latentdiff")
        for title, build in TABS.items():
            with gr.Tab(title, id=title.lower()):
                build(context)
    return page
