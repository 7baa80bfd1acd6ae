"""Faults put upon real runs of ``launch/pretrain.py``, and what has to come out all the same.

``pytest -m faults`` runs each once or a few times; ``python -m tests.faults`` runs the full counts, prints the table
and saves it.
"""
