"""The benchmarks, each in a file that reads like its definition."""
