"""The other ways of running a quantized model on a CPU that quantlib is measured beside.

One module per peer. All are optional: `make peers` installs them (`install.py`), and a peer that is
not there, or cannot do a shape, raises `PeerMissing` with the reason. A benchmark reports that
sentence in the peer's place and goes on.
"""
