"""Save, verify, resume; the export of the backbone alone is another thing (:mod:`fasttrain.export`).

::

    weights, optimiser state, random state         state.py      copied to rank 0's host; training goes on
                    │
    serialise, hash, fsync, rename, verify         files.py      in rank 0's background (saver.py)
                    │
    the last k, every n-th, the best stay          retention.py
                    │
    read once, checked, sent to all ranks          resume.py     by the same command, run again

A checkpoint is a directory that either is whole or is not there::

    checkpoints/
      latest                          the name of the newest checkpoint, for people
      step-00000500/
        manifest.json                 size and SHA-256 of each of the next four
        state.json                    step, world size, configuration, data fingerprint, loss scale, versions
        model.safetensors             every weight and buffer, whole, under its name in the module
        optimizer.safetensors         every optimiser state, whole: "<state>/<parameter>"
        ranks.safetensors             each rank's random state and own buffers: "<rank>/<name>"
        metrics.json                  what evaluations found there, if any; later than the rest, and not sealed

Weights and optimiser states are stored whole and by name, so any world size and ZeRO stage can read them. Nothing is
pickled, so reading one cannot run code. Rank 0 alone touches the disk: no other host needs to see the folder, and no
collective can be left waiting for a write.
"""

from fasttrain.checkpoint.files import MODEL, Checkpoint, find, read, verify
from fasttrain.checkpoint.resume import Start, contradictions, resume
from fasttrain.checkpoint.retention import lacks_best
from fasttrain.checkpoint.saver import Saver
from fasttrain.checkpoint.state import restore

__all__ = [
    "MODEL",
    "Checkpoint",
    "Saver",
    "Start",
    "contradictions",
    "find",
    "lacks_best",
    "read",
    "restore",
    "resume",
    "verify",
]
