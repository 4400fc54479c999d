"""`topd demo`: both methods on the embedded pair, and how the embedded models are built."""
