"""What is written to disk and read back: the work directory, the layer bank, packed checkpoints.

disk.py        atomic files, free space, and what the operating system's errors mean to a user
journal.py     the append-only list of finished units
lock.py        one process per work directory
workdir.py     the three above, put together: units of work that survive a kill
bank.py        every weight in every candidate scheme, rounded once and kept in a work directory
tensorfile.py  safetensors files written one tensor at a time, and their headers
staging.py     a folder that appears all at once
writer.py      a packed checkpoint, complete or absent
reader.py      a packed checkpoint, validated from its headers and mapped into memory
provenance.py  hashes and versions
"""
