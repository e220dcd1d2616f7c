"""The CPU backend: compiled products and decoding, in a shared library without ties to Python's or PyTorch's version.

`csrc/` holds the library (`interface.h` documents its functions), `library.py` loads it, `launch.py` runs ops on it, and
`direct.py` skips PyTorch's dispatcher where nothing needs it.
"""
