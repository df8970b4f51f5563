"""Configuration of the site that `make docs` builds from the Markdown files in this folder."""

from importlib.metadata import version as installed_version

project = "weighted_mtp_core"
version = release = installed_version("weighted-mtp-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["mermaid"]  # the fence that GitHub renders
myst_heading_anchors = 4
default_role = "code"  # docstrings write `code` as Markdown does

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True

html_theme = "furo"
html_title = "Weighted MTP"
