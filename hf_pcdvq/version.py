"""Version of the package and of the packed format that it writes."""

__version__ = "0.1.0"

# Raised when a reader of an older version could misread what is written. Readers for old versions stay.
FORMAT_VERSION = 1
