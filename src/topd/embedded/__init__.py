"""The embedded task, its tokenizer and the models that ship with the package."""
