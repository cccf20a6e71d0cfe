"""The formats that kernels are tested with."""

INTEGER_WIDTHS = [f"w{bits}{{}}{zero}" for bits in range(2, 9) for zero in ("", "z")]
"""With a place for the group."""
FRACTIONAL_ZEROS = ["w2{}z8", "w4{}z6", "w5{}z7", "w3{}z4", "w8{}z4"]
GROUPS = ("g16", "g32", "g64", "g128", "g256", "", "t")
TWO_LEVEL = ["w4g64zs6", "w3g32s4", "w8g16zs8", "w2g16s5", "w6g256zs7", "w4g64z6s6"]
SHARED_BYTE = ["w2g64z4s4", "w2g16z2s6", "w3g32zs5", "w4g128zs4"]
"""Scale and zero point fit one byte."""
EXPONENTS = ["w4g32e", "w3g64ze", "w5g16z7e", "w2g128e", "w8e", "w8te", "w6g256z4e"]
FLOATS = ["fp8", "fp8e5m2g64", "fp8t", "fp6g32", "fp6e2m3", "fp4g64s6", "mxfp8", "mxfp8e5m2"]
FLOATS += ["mxfp6", "mxfp6e2m3", "mxfp4", "nvfp4", "fp5e2m2g32", "fp5e3m1", "fp6e4m1g16"]
FLOATS += ["fp7e2m4g64s5", "fp7e3m3g128", "fp7e4m2t", "fp7e5m1", "fp8e2m5g32", "fp8e3m4"]

EVERY = [
    *(family.format(group) for family in (*INTEGER_WIDTHS, *FRACTIONAL_ZEROS) for group in GROUPS),
    *TWO_LEVEL,
    *SHARED_BYTE,
    *EXPONENTS,
    *FLOATS,
]
MIXED = [
    [("w4g64", 448), ("w8", 64)],
    [("w2g16z", 100), ("w4g128z6", 31), ("w8g32", 445)],
    [("w3", 1), ("w5g256zs6", 575)],
    [("fp5e2m2g32", 90), ("fp7e2m4", 131), ("w4g64", 64)],
    [("fp7e5m1g16", 50), ("fp8e2m5g64", 77), ("fp5e3m1", 33), ("w8", 30)],
]
"""Segments of one weight, with their lengths."""
