"""Version of the package and of the packed format that it writes."""

__version__ = "0.1.0"

# Raised when a reader of an older version could misread what is written. Readers for old versions stay.
FORMAT_VERSION = 1

# How to install this package. It is not on PyPI, where anybody could take its name: no message may send readers there.
INSTALL = "`pip install ./kernels .` in the repository of hf_pcdvq"
