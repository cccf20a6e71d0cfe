"""Running packed checkpoints: modules that hold packed weights, and the ways into them.

    packed_module.py        packed weights as buffers of a module
    modules.py              linear, embedding, tied head, experts
    assemble.py             putting them into a model, empty or loaded
    prepare.py              ... for a checkpoint that transformers is about to load
    transformers_plugin.py  `AutoModelForCausalLM.from_pretrained` reads packed checkpoints
    autoregister.py         ... after `import quantlib`, which stays light
    load.py, generate.py    `quantlib.load`, and text from what it returns

This file imports nothing: `import quantlib` passes through it.
"""
