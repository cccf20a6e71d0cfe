"""Changes of basis: the model computes what it did, and its numbers are easier to round.

wiring.py          what reads and writes what in a model
tables.py          ... of the known families, as data
binding.py         a table and one model make its wiring
rotation.py        the bases a model is changed to, checked, on disk
hadamard.py        Hadamard matrices of every size there is a construction for
changes.py         rotated parameters from original ones
online.py          what no weight can hold: hooks
attention.py       queries, keys and values as a rotated and rounded cache keeps them
apply.py           a model in memory rotated; a source that is rotated when it is read

moments.py         second moments of what linears and attentions read
energies.py        what an error at an input costs at the outputs
fixed_point.py     which directions deserve more bits
mixing.py          directions by importance become a rotation
bases.py           from moments to bases
turned.py          statistics of the folded model in the rotated one's basis
"""
