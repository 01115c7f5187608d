"""Modules: where the parts of a model are, and how to read, rewrite, replace and restore them."""
