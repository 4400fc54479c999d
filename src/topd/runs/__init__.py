"""Keep a run alive and visible: checkpoints, resuming, interrupts, NaN guards, console, records."""
