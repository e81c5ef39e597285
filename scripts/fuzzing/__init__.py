"""Random calls of the wrapper and their float64 answers, for the GPU script and the CPU tests."""
