"""Models of other formats, as ordinary or packed ones."""
