"""What only a GPU can answer, prepared as one bounded command: `make gpu`."""
