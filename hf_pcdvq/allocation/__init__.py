"""Mixed bits: which layers of a model get how many, for a given size (docs/mixed_bits.md)."""
