"""The contract of the seam as a test: every backend, every operation, forward and gradient."""
