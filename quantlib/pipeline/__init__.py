"""The stages in order. Each leaves its results in the work directory before the next begins, under
keys that hash everything they depend on: a run that was killed goes on, and a run that differs in
its budget alone starts at `search`.

    compress    all stages
    opening     how a work directory is opened, and opened again
    run         what stages share: source, map, work directory, recipe, hashes
    estimate    what a run will need, before it starts
    whole       models that are calibrated as a whole, on records of all that they do
    calibrate   statistics of every linear group
    parts       the same of a whole model: of every stream apart, and summed
    measure     the layer bank and the sensitivity table
    scoring     what a rounding error costs each task
    probe       the table's calibration on measured plans
    plan        the allocation problem and its solution
    swap        exchanges on true KL
    reround     the plan again, block by block with quantized inputs
    apply       the checkpoint
    dense       plans measured in the dense model
    task_trials plans measured on every task of a whole model
    bytecount   bytes of a checkpoint before it exists
    workfiles   what people and later commands read in a work directory
    status      how far a run is
    reporting   what the report shows

Nothing is imported here: a search on what was measured reads files, and waits for no model library.
"""
