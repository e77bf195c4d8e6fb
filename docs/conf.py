"""The documentation site: python -m sphinx -W docs build/site"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
project = "fastres"
author = "the fastres authors"
copyright = author
found = re.search(r'__version__ = "(.+)"', (ROOT / "fastres" / "version.py").read_text())
assert found is not None
version = release = found[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_templates"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
# A line of a terminal is not a language that Pygments could get wrong.
highlight_language = "text"


# The docstrings' single backticks are code, as in Markdown.
default_role = "code"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_title = "fastres"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["fastres.css"]
html_sidebars = {"**": ["site-navigation"]}
html_show_sourcelink = False
html_copy_source = False
# No request leaves the reader's browser: nothing of a page lies on another server.
html_theme_options = {
    "logo": {"text": "fastres"},
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "navbar_persistent": ["search-button"],
    "primary_sidebar_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
