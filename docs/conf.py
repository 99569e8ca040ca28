"""Settings of the documentation site, which `make docs` builds in build/docs."""

import tokenward

project = "tokenward"
release = tokenward.__version__
html_title = f"tokenward {release}"

extensions = ["myst_parser"]
myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 4
nitpicky = True

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
