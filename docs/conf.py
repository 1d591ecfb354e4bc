"""Sphinx's configuration: `make docs` builds the pages into dist/docs, and every warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from p2pgz import __version__  # found by the line above

project = "p2pgz"
version = release = __version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"p2pgz {__version__}"
html_show_copyright = False
html_copy_source = False
# the same pages are read on code hosts: headings have the anchors that those make
myst_heading_anchors = 4
myst_links_external_new_tab = False
nitpicky = True
