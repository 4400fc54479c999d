"""Accuracy on benchmarks: problems, engines, samples, results, and the statistics of the whole project."""
