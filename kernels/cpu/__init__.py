"""The C++ kernels for CPUs: sources, build, and calls."""
