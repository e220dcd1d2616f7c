"""Plain PyTorch implementations of every op: the oracle for the tests and the fallback on any device."""
