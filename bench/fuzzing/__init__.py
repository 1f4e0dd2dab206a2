"""What bench/fuzz.py is made of: the kinds of file and their readers, and how a file is changed."""
