"""Before a run: do the models, the data and the machine fit? Every check is a function that returns a `Finding`."""
