"""`topd study`: arms x seeds from the same start. Does guidance help, and when?"""
