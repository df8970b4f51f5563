"""Saved state of a run.

`manager` decides when snapshots are written and which are kept. A `snapshot` is everything that a training
needs to continue; `state` takes it from modules, optimisers and generators and restores it, and `shards` are
its files for sharded tensors. `best_model` is the weights that a run keeps. `resume` finds the run to
continue.
"""
