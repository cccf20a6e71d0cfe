"""Published ways of rounding weights, activations and KV cache near 4 bits, as their papers have
them, on models in memory: what `bench.quality_w4a4` measures quantlib beside."""
