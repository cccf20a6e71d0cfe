"""Kernel (a) beside Marlin: whose instructions are counted, and what is compared."""

import pytest

from quantlib.bench import marlin
from quantlib.errors import UsageError
from quantlib.kernels.cuda import machine_code

NAME = "_Z6MarlinILi256ELi{}ELi{}ELi{}ELi4EL{}EEvPK4int4S2_PS0_S2_iiiPi"
SECTION = """
\t.section\t.text.{},"ax",@progbits
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0010*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*0020*/                   LOP3.LUT R1, R2, R3, R4, 0xea, !PT ;
        /*0030*/                   HMMA.16816.F32 R8, R4, R2, R8 ;
        /*0040*/                   HFMA2.MMA R1, R2, R3, R4 ;
        /*0050*/                   HMMA.16816.F32 R8, R4, R2, R8 ;
        /*0054*/                   HMMA.16816.F32 R8, R4, R2, R8 ;
        /*0058*/                   HMMA.16816.F32 R8, R4, R2, R8 ;
        /*0060*/              @P0 BRA `(.L_x_1) ;
        /*0070*/                   FFMA R1, R2, R3, R4 ;
        /*0080*/                   CS2R R1, SRZ ;
        /*0090*/                   EXIT ;
"""


def test_kernels_of_a_file_are_told_apart_and_counted_where_they_multiply():
    names = [NAME.format(1, 8, 8, "i8"), NAME.format(2, 16, 4, "in1")]
    found = machine_code.parse_all("".join(SECTION.format(name) for name in names))
    assert list(found) == names
    for code in found.values():
        assert (code.products, code.arithmetic) == (4, 2)
        assert code.arithmetic_around("FFMA") == 2
        assert code.arithmetic_around("HFMA2") == 0, "that block multiplies"


def test_the_kernels_for_groups_of_128_are_compared(tmp_path, monkeypatch):
    source = tmp_path / "marlin_cuda_kernel.cu"
    with pytest.raises(UsageError, match="download"):
        marlin.marlin(source, 80)
    source.touch()
    own = [NAME.format(m, n, k, "i8") for m, n, k in ((1, 8, 8), (2, 16, 4), (4, 16, 4))]
    channel = [name.replace("ELi8E", "ELin1E") for name in own]
    listing = "".join(SECTION.format(name) for name in own + channel)
    monkeypatch.setattr(marlin, "with_nvcc", lambda *_: (b"", None))
    kernels = machine_code.parse_all(listing)
    monkeypatch.setattr(machine_code, "read_all", lambda _: kernels)
    found = {one.tokens: one for one in marlin.marlin(source, 80)}
    assert found[8].per_product == found[64].per_product == 0.5
    # Four products for 16 tokens are of 512 weights, for 64 tokens of 128.
    assert (found[8].weights, found[16].weights, found[64].weights) == (512, 512, 128)
    monkeypatch.setattr(machine_code, "read_all", lambda _: {})
    with pytest.raises(UsageError, match="no Marlin kernel for 8 tokens"):
        marlin.marlin(source, 80)


def test_scaling_counts_beside_the_products():
    own = marlin.Count("kernel (a)", 80, 16, products=16, arithmetic=100, scaling=28, weights=2048)
    assert own.per_product == 6.25
    assert own.with_scaling == 8.0
    assert own.per_thousand_weights == 62.5
