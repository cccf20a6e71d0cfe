"""Hand-written kernels for NVIDIA GPUs, sm_80 and later, and what surrounds them.

`src/` has the sources, `fragments.py` what the PTX manual says about tensor cores, `layout.py` how
weights are packed for them, `decode.py` the cases that a kernel is compiled for and its arguments,
`segmented.py` the same of the segmented integer product, with `integer_layout.py` and `tokens.py`,
`quantizer.py` of what rotates and rounds its inputs, `attention.py` of packed KV caches,
`toolkit.py` and `compile.py` the compilers, `machine_code.py` what came out of them, `cubins.py`
kernels compiled ahead of time. `cache.py` and `loading.py` bring a kernel to a GPU, `launch.py`
passes tensors to it, or to the emulator.
"""
