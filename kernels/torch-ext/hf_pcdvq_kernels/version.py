"""Version of the package. `hf_pcdvq` requires exactly its own."""

__version__ = "0.1.0"
