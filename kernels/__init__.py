"""Who computes it: operators on packed weights (`ops`), their reference in torch (`reference`), and
the C++ kernels behind them (`cpu`)."""
