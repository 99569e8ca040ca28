"""Settings of the documentation site, which `make docs` builds in build/docs."""

import tokenward

project = "tokenward"
release = tokenward.__version__
html_title = f"tokenward {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 4
nitpicky = True
# Signatures and docstrings name types of torch, transformers and inner modules, which have no page here.
nitpick_ignore_regex = [("py:.*", ".*")]

add_module_names = False
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
