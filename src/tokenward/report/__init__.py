"""A finished run as one page, as coloured text or as a picture: artifacts in, no model needed."""
