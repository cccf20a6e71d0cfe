"""Softmax, GELU and LayerNorm in integers: the operators of I-BERT, I-ViT and FQ-ViT.

    integers.py    grids, and the integer arithmetic that the methods share
    ibert.py       polynomials of second order, Newton's square root
    ivit.py        shifts in place of multiplications: Shiftmax, ShiftGELU
    fqvit.py       channels on grids of powers of two, softmax in logarithms
    operators.py   one of these with its grids, as a layer uses it, fits it and stores it

These are references: torch integers, whose results any engine must equal bit for bit.
"""

from quantlib.kernels.nonlinear.operators import CANDIDATES, KINDS, Kind, Operator, fit, sqnr

__all__ = ["CANDIDATES", "KINDS", "Kind", "Operator", "fit", "sqnr"]
