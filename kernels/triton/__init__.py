"""Kernels in Triton: what computes on GPUs, and at sizes, that the CUDA kernels are not for.

`layout.py` says how a weight lies in memory, `device.py` reads it, `gemm.py` multiplies, `rows.py`
dequantizes, `rotate.py` rotates and rounds inputs; these three are the kernels. `launch.py` and
`inputs.py` call them with torch tensors, `plan.py` says what they are compiled for,
`configurations.py` chooses their sizes from `tables/`, `tune.py` measures
such tables, `ahead.py` compiles every kernel for any GPU without one.

Without a GPU they run in Triton's interpreter, when TRITON_INTERPRET=1 was in the environment as
Triton was imported. It computes bfloat16 wrongly, so none is computed with there (`launch.py`).
"""
