"""Sphinx: the pages of this directory, and the API reference from docstrings and public headers (`make docs`)."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "linearard"
html_title = "linearard"
version = release = re.findall(r"project\(linearard VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())[0]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "breathe"]

myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px"}

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

# `make docs` runs doxygen before Sphinx.
breathe_projects = {"linearard": str(ROOT / "build" / "docs" / "doxygen" / "xml")}
breathe_default_project = "linearard"
