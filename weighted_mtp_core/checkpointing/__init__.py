"""Save the state of a run, and resume a run from its saved state.

A snapshot contains everything that a stage needs to continue. The modules of this package have these tasks:

- `manager` decides when snapshots are written and which snapshots are kept.
- `snapshot` defines the content of a snapshot, and writes and reads its files.
- `state` copies the state of modules, optimisers and random generators, and restores it.
- `shards` writes and reads the sharded tensors of a snapshot.
- `best_model` writes and reads the best weights of a run; `whole_files` writes sharded weights as one file.
- `resume` finds the run to continue, and refuses changes that are not allowed.
"""
