"""One file a command: its options, what it refuses, and what it calls. `p2w`, launch/ and preprocess/ run them."""
