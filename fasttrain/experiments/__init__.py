"""Whole papers: a recipe (runs × seeds × evaluations) -> the commands a person would type -> results -> tables.

``launch/experiment.py`` runs them. Nothing here knows a tensor: what is there is read from the files that runs and
evaluations leave.
"""
