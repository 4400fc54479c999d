"""A ladder of models for studies beyond the embedded pair: a larger teacher, a smaller student, several tasks.

`python -m ladder` makes a pair and its data from nothing; `topd study --config studies/ladder-small.yaml` compares
arms on it. Problems are reasoning-gym's, and so is the check of answers; the worked solutions are ours.
"""
