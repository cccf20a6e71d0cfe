"""What searches that train have in common: `fliqs.py` and `csq.py` stand on it.

    numbers      what a layer may be trained in: integers, small floats, schemes
    quantizers   rounding that gradients pass through, equal to what ships
    layers       linears and convolutions that round as they are told; decisions over them
    costs        what a choice costs: bit operations, or milliseconds of this machine
    measured     what every option loses alone, and the exact choice by that
    loop         the training loop that every method runs in
    state        its file: resumed only by the same settings
    outcome      the plan of a finished choice

A method is what differs: which numbers each step trains in, what is added to the loss, and what is
learned from how it went (`loop.Method`).
"""
