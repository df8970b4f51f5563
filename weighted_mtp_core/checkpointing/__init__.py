"""Saved state of a run.

`manager` decides when snapshots are written and which are kept. A `snapshot` contains everything that a stage
needs to continue: `state` copies it from modules, optimisers and random generators and restores it, and
`shards` reads and writes sharded tensors. `best_model` reads and writes the best weights of a run, for which
`whole_files` writes sharded tensors as one file. `resume` finds the run to continue.
"""
