"""Running packed checkpoints: modules that hold packed weights, and the ways into them.

    packed_module.py        packed weights as buffers of a module, or as tiles
    row_blocks.py           ... of a stack of experts, one by one
    modules.py              linear, embedding, tied head, experts
    assemble.py             putting them into a model, empty or loaded
    prepare.py              ... for a checkpoint that transformers is about to load
    transformers_plugin.py  `AutoModelForCausalLM.from_pretrained` reads packed checkpoints
    autoregister.py         ... after `import quantlib`, which stays light
    engine_spec.py          what the native engine must know of a model's configuration
    engine_weights.py       its weights, straight from the checkpoint's files
    engine.py               the native engine: one C++ call per step
    load.py, generate.py    `quantlib.load`, and text from what it returns

This file imports nothing: `import quantlib` passes through it.
"""
