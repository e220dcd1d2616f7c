"""Recovery: trains what a packed model stores beside its codes, so that it predicts what its original predicts."""
