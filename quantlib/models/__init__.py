"""How a source model is read: its files, its parameters and their roles, a skeleton to fill.

    source.Source      the folder: config and safetensors headers; tensors by name, on request
    modelmap.ModelMap  every parameter in exactly one row: what is quantized, what is kept, and why
    skeleton           the transformers module without weights, filled and emptied block by block

What we know about a model type is a table (`families.py`, `tables/`); a decoder without a table is
walked once and the table is derived from its module (`generic.py`), so both take the same path.

Import from the modules: this package imports none of them, because reading a safetensors header
(`headers.py`) should not cost the import of transformers.
"""
