"""Pre-flight checks: do the models, the data and the machine fit? A check is a function that returns a `Finding`."""
