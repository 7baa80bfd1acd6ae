"""What only a GPU can say: run by ``launch/bench.py gpu``, skipped where there is none."""
