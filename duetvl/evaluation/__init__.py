"""Benchmarks: what is asked, how answers are read and scored, and how far a score can be trusted."""
