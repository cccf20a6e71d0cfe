"""What a number is: element types, schemes, packing, quantized weights, plain rounding and exact
byte counts."""

from quantlib.formats.elements import (
    FLOATS,
    FloatElement,
    code_book,
    decode_float,
    encode_float,
    float_element,
)
from quantlib.formats.groups import GroupBlock, group_blocks
from quantlib.formats.packing import (
    pack_bits,
    pack_codes,
    pack_zeros,
    packed_bytes,
    packed_words,
    unpack_bits,
    unpack_codes,
    unpack_zeros,
)
from quantlib.formats.rtn import choose_scales, encode, quantize_rtn, store_scales
from quantlib.formats.scheme import CHANNEL, KEPT, TENSOR, Scheme, Segment, WeightFormat
from quantlib.formats.size import (
    bits_per_weight,
    kept_bytes,
    payload_bytes,
    safetensors_file_bytes,
)
from quantlib.formats.weight import (
    QuantizedSegment,
    QuantizedWeight,
    TensorLayout,
    check_segments,
    decode_scales,
    decode_zeros,
    dequantize,
    effective_scale,
    pack,
    packed_layout,
    unpack,
)

__all__ = [
    "CHANNEL",
    "FLOATS",
    "KEPT",
    "TENSOR",
    "FloatElement",
    "GroupBlock",
    "QuantizedSegment",
    "QuantizedWeight",
    "Scheme",
    "Segment",
    "TensorLayout",
    "WeightFormat",
    "bits_per_weight",
    "check_segments",
    "choose_scales",
    "code_book",
    "decode_float",
    "decode_scales",
    "decode_zeros",
    "dequantize",
    "effective_scale",
    "encode",
    "encode_float",
    "float_element",
    "group_blocks",
    "kept_bytes",
    "pack",
    "pack_bits",
    "pack_codes",
    "pack_zeros",
    "packed_bytes",
    "packed_layout",
    "packed_words",
    "payload_bytes",
    "quantize_rtn",
    "safetensors_file_bytes",
    "store_scales",
    "unpack",
    "unpack_bits",
    "unpack_codes",
    "unpack_zeros",
]
