"""Saved models on disk: their headers, folders and sizes, and the records beside them."""
