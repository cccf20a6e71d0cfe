"""CUDA kernels on a processor: the same `.cu` files, compiled by a C++ compiler and run by fibers.

There is usually no GPU where kernels are written. What can be known without one (whether a kernel
computes the right numbers, reads what was written, waits for what it must, whatever the order in
which its threads run) is checked here, on the source that GPUs get. `src/machine.h` says what is
checked and what is not.
"""
