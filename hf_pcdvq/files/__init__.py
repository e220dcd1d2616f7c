"""Saved models on disk: their headers, folders, sizes, and the records beside them."""
