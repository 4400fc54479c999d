"""Arms x seeds from the same start: does guidance help, and when?"""
