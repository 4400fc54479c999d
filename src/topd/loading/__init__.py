"""Everything that is loaded by name: models, adapters, tokenizers, data, prompts, options."""
