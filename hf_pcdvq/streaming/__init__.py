"""Quantizing checkpoints larger than memory: a model on the meta device whose weights are read part by part."""
