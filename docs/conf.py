"""Settings of the site that `make docs` builds from the Markdown files beside this one."""

from importlib.metadata import version as installed_version

project = "weighted_mtp_core"
version = release = installed_version("weighted-mtp-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["mermaid"]  # as GitHub shows it
myst_heading_anchors = 3
default_role = "code"  # docstrings write `code` as Markdown does

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True

html_theme = "furo"
html_title = "Weighted MTP"
