"""The runs behind the tables: lists of commands, and running them."""
