"""Loading by name: models, adapters, tokenizers, data, prompts, options."""
