"""Quality of a packed model: what is measured, the record of it, and comparisons of several."""
