"""Import of other formats, as ordinary or packed models."""
