"""The language-model pair: two adapters of SmolLM2-135M-Instruct that solve word problems, each in its own words."""
